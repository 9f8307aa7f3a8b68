"""The jitted step: one program computes a ragged batch and samples from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.kernels.metadata import AttentionMetadata
from jaxserve.models.llama import Llama
from jaxserve.sampler import SamplingInputs, sample
from jaxserve.step_inputs import StepShape


@dataclass(frozen=True)
class ModelDefinition:
    """A model taken apart: how to put it together again from flat parameter leaves inside a step.

    Attributes:
        names, shapes: of the leaves, in order.
    """

    graph: Any
    treedef: Any
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, build: Callable[[], Llama]) -> ModelDefinition:
        """Take apart the model that `build` makes; no parameter is allocated."""
        graph, state = nnx.split(nnx.eval_shape(build), nnx.Param)
        paths, treedef = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
        names = tuple(".".join(str(key.key) for key in path) for path, _ in paths)
        return cls(graph, treedef, names, tuple(tuple(leaf.shape) for _, leaf in paths))

    def build(self, leaves: list[jax.Array]) -> Llama:
        """The model with these parameters."""
        state = nnx.State(jax.tree_util.tree_unflatten(self.treedef, leaves))
        model: Llama = nnx.merge(self.graph, state)
        return model


Step = Callable[[list[jax.Array], list[jax.Array], jax.Array], tuple[jax.Array, list[jax.Array]]]
"""(parameter leaves, kv_pools to donate, packed inputs int32 [shape.size]) → (outputs, kv_pools)."""


def make_step(
    definition: ModelDefinition, shape: StepShape, *, max_logprobs: int, processed_logprobs: bool
) -> Step:
    """The function to compile for one bucket.

    Its outputs are int32 [S, 3 + 2 · max_logprobs]; a row is: token id, bits of its logprob, its rank, the top
    ids, the bits of their logprobs.
    """

    def step(
        leaves: list[jax.Array], kv_pools: list[jax.Array], packed: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        inputs = shape.unpack(packed)
        model = definition.build(leaves)
        hidden, kv_pools = _forward(model, inputs, kv_pools)
        logits = model.logits(hidden[inputs["logits_index"]])
        sampling = SamplingInputs(
            temperature=_floats(inputs["temperature"]),
            top_p=_floats(inputs["top_p"]),
            min_p=_floats(inputs["min_p"]),
            top_k=inputs["top_k"],
            seed_low=inputs["seed_low"].astype(jnp.uint32),
            seed_high=inputs["seed_high"].astype(jnp.uint32),
            choice=inputs["choice"],
            position=inputs["seq_lens"],
            num_logprobs=inputs["num_logprobs"],
        )
        out = sample(logits, sampling, max_logprobs=max_logprobs, processed_logprobs=processed_logprobs)
        columns = jnp.stack([out.token_ids, _bits(out.logprobs), out.ranks], axis=1)
        return jnp.concatenate([columns, out.top_ids, _bits(out.top_logprobs)], axis=1), kv_pools

    return step


def make_all_logits(definition: ModelDefinition, shape: StepShape) -> Step:
    """Like a step, but its outputs are the logits of all tokens, float32 [T, V]: for tests and comparisons."""

    def all_logits(
        leaves: list[jax.Array], kv_pools: list[jax.Array], packed: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        model = definition.build(leaves)
        hidden, kv_pools = _forward(model, shape.unpack(packed), kv_pools)
        return model.logits(hidden), kv_pools

    return all_logits


def _forward(
    model: Llama, inputs: dict[str, jax.Array], kv_pools: list[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    num_single_tokens, num_tiles, num_copies = inputs["counts"]
    kv_pools = copy_blocks(kv_pools, inputs["block_copies"], num_copies)
    metadata = AttentionMetadata(
        block_tables=inputs["block_tables"],
        seq_lens=inputs["seq_lens"],
        query_start_loc=inputs["query_start_loc"],
        positions=inputs["positions"],
        token_rows=inputs["token_rows"],
        slot_mapping=inputs["slot_mapping"],
        num_single_tokens=num_single_tokens,
        tiles=inputs["tiles"],
        num_tiles=num_tiles,
    )
    return model(inputs["token_ids"], inputs["positions"], kv_pools, metadata)


def copy_blocks(kv_pools: list[jax.Array], copies: jax.Array, num_copies: jax.Array) -> list[jax.Array]:
    """Copy-on-write: for each of the first `num_copies` rows (source, target) of `copies`, in order, copy the
    block in every layer."""

    def copy_one(i: jax.Array, pools: list[jax.Array]) -> list[jax.Array]:
        source, target = copies[i, 0], copies[i, 1]
        return [
            lax.dynamic_update_slice_in_dim(pool, lax.dynamic_slice_in_dim(pool, source, 1), target, axis=0)
            for pool in pools
        ]

    return lax.fori_loop(0, num_copies, copy_one, kv_pools)


def _floats(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _bits(floats: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(floats, jnp.int32)
