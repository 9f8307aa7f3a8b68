"""The jitted step: one program computes a ragged batch and samples from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.kernels.metadata import AttentionMetadata, Lanes
from jaxserve.kernels.paged_attention import paged_attention
from jaxserve.kernels.reference import QuantizedPool
from jaxserve.logits_processors import ProcessorInputs, SlotTables, write_tokens
from jaxserve.models.llama import Llama, Pool
from jaxserve.sampler import SamplingInputs, logprobs_of, sample
from jaxserve.sampling_params import DRAW_INPUTS
from jaxserve.sharding import VocabShard
from jaxserve.step_shapes import StepProgram, StepShape


@dataclass(frozen=True)
class ModelDefinition:
    """A model taken apart: how to put it together again from flat parameter leaves inside a step.

    Attributes:
        names, shapes, dtypes: of the leaves, in order.
    """

    graph: Any
    treedef: Any
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[jnp.dtype, ...]

    @classmethod
    def of(cls, build: Callable[[], Llama]) -> ModelDefinition:
        """Take apart the model that `build` makes; no parameter is allocated."""
        graph, state = nnx.split(nnx.eval_shape(build), nnx.Param)
        paths, treedef = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
        names = tuple(".".join(str(key.key) for key in path) for path, _ in paths)
        shapes = tuple(tuple(leaf.shape) for _, leaf in paths)
        return cls(graph, treedef, names, shapes, tuple(leaf.dtype for _, leaf in paths))

    @property
    def table_dtype(self) -> jnp.dtype:
        """Of embeddings and output layer."""
        return self.dtypes[self.names.index("embed_tokens.weight")]

    def abstract(self) -> list[jax.ShapeDtypeStruct]:
        """The leaves' shapes and dtypes."""
        return list(map(jax.ShapeDtypeStruct, self.shapes, self.dtypes))

    def build(self, leaves: list[jax.Array]) -> Llama:
        """The model with these parameters."""
        state = nnx.State(jax.tree_util.tree_unflatten(self.treedef, leaves))
        model: Llama = nnx.merge(self.graph, state)
        return model


class Pools(NamedTuple):
    """What a step updates in place; donated.

    Attributes:
        kv: [L, N, …]; the rest is the attention backend's.
        tokens: [N, B] int32; the token id of every slot.
        sampled: [rows at most] int32; what the rows of the last step sampled.
        logits: [rows at most, V] float32, where rows that are not in use are skipped: room, so that no step has to
            make any.
        hidden: [2, tokens at most, E] float32, where steps may compute a part of the layers: the residual stream of the
            last step that computed all of them, and of the last that did not, from which the next one goes on.
    """

    kv: jax.Array | QuantizedPool
    tokens: jax.Array
    sampled: jax.Array
    logits: jax.Array | None = None
    hidden: jax.Array | None = None


class StepOutputs(NamedTuple):
    """What a step says, int32 throughout.

    Attributes:
        sampled: [S, 3 + 2 · L]; token id, bits of its logprob, its rank, the top ids, the bits of their logprobs.
        candidates: [S, 3 · C]; of beams: token ids, bits of their scores, bits of their raw logprobs.
        prompt: [T, 2 + 2 · L] (or [0, …]) of `prompt_tokens`: bits of the logprob, rank, top ids, bits of their
            logprobs.
    """

    sampled: jax.Array
    candidates: jax.Array
    prompt: jax.Array


Step = Callable[[list[jax.Array], Pools, SlotTables, jax.Array], tuple[StepOutputs, Pools]]
"""(parameter leaves, pools to donate, slot tables, packed inputs int32 [layout.size]) → (outputs, pools)."""

PROMPT_GROUP = 64  # tokens of a prompt whose logits exist at a time
UNROLLED_PROMPT_GROUP = 512  # each is a branch, which takes seconds to compile, so there are few
FEWEST_ROWS = 8  # whose logits are computed by a product of their own

Carry = TypeVar("Carry")


def make_step(
    definition: ModelDefinition,
    program: StepProgram,
    vocab: VocabShard,
    *,
    max_logprobs: int,
    processed_logprobs: bool,
    attention_backend: str = "auto",
    unroll_layers: bool = False,
    unroll_prompts: bool = False,
) -> Step:
    """The function to compile, with several chips what each of them does; `attention_backend` as in
    `kernels.paged_attention`; `unroll_prompts`: tokens of prompts are rated without a loop. With room for logits in the
    pools, rows that are not in use are skipped."""
    layout = program.layout

    def step(
        leaves: list[jax.Array], pools: Pools, tables: SlotTables, packed: jax.Array
    ) -> tuple[StepOutputs, Pools]:
        inputs = layout.unpack(packed)
        model = definition.build(leaves)
        hidden, pools = _forward(
            model, program, packed, pools, attention_backend=attention_backend, unroll_layers=unroll_layers
        )
        index, num_rows = inputs["logits_index"], inputs["counts"][5]
        if pools.logits is None or layout.num_rows == 1:
            logits, num_rows = model.logits(hidden[index]), layout.num_rows
        else:
            logits = _logits_of_rows(model, hidden, index, num_rows, pools.logits)
            pools = pools._replace(logits=logits)
        out = sample(
            logits,
            num_rows,
            lambda: _sampling_inputs(layout.unpack(packed), pools.tokens, tables),
            vocab,
            max_logprobs=max_logprobs,
            processed_logprobs=processed_logprobs,
        )
        outputs = StepOutputs(
            sampled=jnp.concatenate([out.token_ids[:, None], out.logprobs], axis=1),
            candidates=out.candidates,
            prompt=_prompt_logprobs(model, hidden, inputs, vocab, max_logprobs, unroll=unroll_prompts),
        )
        # of a step without logits the next one reads nothing, but of the one before it
        token_ids = jnp.where(inputs["counts"][5] > 0, out.token_ids, pools.sampled[: layout.num_rows])
        sampled = lax.dynamic_update_slice_in_dim(pools.sampled, token_ids, 0, axis=0)
        return outputs, pools._replace(sampled=sampled)

    return step


def logits_sizes(num_rows: int) -> list[int]:
    """Numbers of rows for whose logits a program of `num_rows` has a product."""
    return [
        *(size for size in (FEWEST_ROWS << i for i in range(num_rows.bit_length())) if size < num_rows),
        num_rows,
    ]


def _logits_of_rows(
    model: Llama, hidden: jax.Array, index: jax.Array, num_rows: jax.Array, logits: jax.Array
) -> jax.Array:
    """Put the logits of the tokens `index` [S], of which the first `num_rows` are in use, into `logits` [S or more, V]
    by the smallest product that takes them: beside a prompt that of 64 rows is 6 % of the step."""
    for smaller, size in itertools.pairwise([0, *logits_sizes(index.shape[0])]):

        def compute(zero: jax.Array, logits: jax.Array, size: int = size) -> jax.Array:
            return lax.dynamic_update_slice(logits, model.logits(hidden[index[:size] + zero]), (0, 0))

        logits = _run_if((num_rows > smaller) & (num_rows <= size), compute, logits)
    return logits


def _sampling_inputs(
    inputs: dict[str, jax.Array], token_pool: jax.Array, tables: SlotTables
) -> SamplingInputs:
    processors = ProcessorInputs(
        rows=inputs["processed_rows"],
        num_rows=inputs["counts"][3],
        slot=inputs["slot"],
        num_biases=inputs["num_biases"],
        prompt_len=inputs["prompt_len"],
        num_counted=inputs["num_counted"],
        repetition=_floats(inputs["repetition"]),
        frequency=_floats(inputs["frequency"]),
        presence=_floats(inputs["presence"]),
        normalize=inputs["num_candidates"] > 0,
        block_tables=inputs["block_tables"],
        token_pool=token_pool,
        tables=tables,
    )
    draws = dict(zip(DRAW_INPUTS, inputs["draws"], strict=True))
    return SamplingInputs(
        temperature=_floats(draws["temperature"]),
        top_p=_floats(draws["top_p"]),
        min_p=_floats(draws["min_p"]),
        top_k=draws["top_k"],
        seed_low=draws["seed_low"].astype(jnp.uint32),
        seed_high=draws["seed_high"].astype(jnp.uint32),
        choice=draws["choice"],
        position=inputs["seq_lens"],
        num_logprobs=draws["num_logprobs"],
        num_candidates=inputs["num_candidates"],
        processors=processors,
    )


def _prompt_logprobs(
    model: Llama,
    hidden: jax.Array,
    inputs: dict[str, jax.Array],
    vocab: VocabShard,
    max_logprobs: int,
    *,
    unroll: bool,
) -> jax.Array:
    """[T, 2 + 2 · L]; how likely each of `prompt_targets` was. The logits of one group of tokens exist at a time. With
    `unroll` groups are larger, and each is a branch instead of a turn of a loop."""
    targets, tokens = inputs["prompt_targets"], inputs["prompt_tokens"]
    T = targets.shape[0]
    out = jnp.zeros((T, 2 + 2 * max_logprobs), jnp.int32)
    if T == 0:
        return out
    group = min(UNROLLED_PROMPT_GROUP if unroll else PROMPT_GROUP, T)

    def rate(g: jax.Array, out: jax.Array) -> jax.Array:
        first = jnp.minimum(g * group, T - group)
        index = lax.dynamic_slice_in_dim(tokens, first, group)
        logits = vocab.mask_padding(model.logits(hidden[index]))
        group_targets = lax.dynamic_slice_in_dim(targets, first, group)
        rows = logprobs_of(logits, group_targets, vocab, max_logprobs)
        return lax.dynamic_update_slice_in_dim(out, rows, first, axis=0)

    num_groups = (inputs["counts"][4] + group - 1) // group
    if not unroll:
        return lax.fori_loop(0, num_groups, rate, out)
    for g in range(-(-T // group)):
        out = lax.cond(g < num_groups, partial(rate, jnp.int32(g)), lambda out: out, out)
    return out


def make_all_logits(
    definition: ModelDefinition,
    shape: StepShape,
    vocab: VocabShard,
    *,
    attention_backend: str = "auto",
    unroll_layers: bool = False,
) -> Callable[[list[jax.Array], Pools, jax.Array], tuple[jax.Array, Pools]]:
    """Like a step, but its outputs are the logits of all tokens, float32 [T, V]: for tests and comparisons."""
    program = StepProgram((shape,))

    def all_logits(leaves: list[jax.Array], pools: Pools, packed: jax.Array) -> tuple[jax.Array, Pools]:
        model = definition.build(leaves)
        hidden, pools = _forward(
            model, program, packed, pools, attention_backend=attention_backend, unroll_layers=unroll_layers
        )
        return vocab.group.gather(model.logits(hidden), axis=1)[:, : vocab.size], pools

    return all_logits


def _forward(
    model: Llama,
    program: StepProgram,
    packed: jax.Array,
    pools: Pools,
    *,
    attention_backend: str,
    unroll_layers: bool,
) -> tuple[jax.Array, Pools]:
    """The residual stream [T, E] of the step's tokens, T those of the program's largest shape; and the pools."""
    inputs = program.layout.unpack(packed)
    pools = copy_blocks(pools, inputs["block_copies"], inputs["counts"][2], flatten=not unroll_layers)
    token_ids = _known_tokens(inputs["token_ids"], pools.sampled)
    pools = pools._replace(tokens=write_tokens(pools.tokens, token_ids, inputs["slot_mapping"]))
    embedded = model.embed_tokens(token_ids)

    def compute(
        shape: StepShape,
        x: jax.Array,
        kv_pool: Pool,
        layers: tuple[jax.Array, jax.Array] | None = None,
        zero: jax.Array | int = 0,
    ) -> tuple[jax.Array, Pool]:
        own = shape.narrow(program.layout.unpack(packed + zero))
        num_single_tokens, num_tiles = own["counts"][:2]
        metadata = AttentionMetadata(
            block_tables=own["block_tables"],
            seq_lens=own["seq_lens"],
            query_start_loc=own["query_start_loc"],
            positions=own["positions"],
            token_rows=own["token_rows"],
            slot_mapping=own["slot_mapping"],
            num_single_tokens=num_single_tokens,
            tiles=own["tiles"],
            num_tiles=num_tiles,
            lanes=Lanes(own["lanes"], own["lane_groups"], own["merged_tokens"], own["counts"][6])
            if shape.lanes
            else None,
        )
        return model(
            x,
            own["positions"],
            kv_pool,
            metadata,
            partial(paged_attention, backend=attention_backend, decode_only=shape.decode_only),
            block_size=pools.tokens.shape[1],
            unroll=unroll_layers,
            layers=layers,
        )

    if pools.hidden is None or program.layout.num_tokens == 1:
        x, kv_pool = compute(program.layout, embedded, pools.kv)
        return x, pools._replace(kv=kv_pool)
    first, stop = inputs["layers"][0], jnp.minimum(inputs["layers"][1], model.config.num_layers)
    is_part = ((first > 0) | (stop < model.config.num_layers)).astype(jnp.int32)
    carry = pools.hidden, pools.kv
    for i, shape in enumerate(program.shapes):

        def compute_into(zero: jax.Array, carry: tuple[jax.Array, Pool], shape: StepShape = shape) -> Any:
            hidden, kv_pool = carry
            place, size = (is_part, zero, 0), (1, shape.num_tokens, embedded.shape[1])
            begun = lax.dynamic_slice(hidden, place, size)[0]
            x = jnp.where(first > 0, begun, lax.dynamic_slice_in_dim(embedded, zero, shape.num_tokens))
            x, kv_pool = compute(shape, x, kv_pool, (first, stop), zero)
            return lax.dynamic_update_slice(hidden, x[None], place), kv_pool

        carry = _run_if(inputs["shape_index"][0] == i, compute_into, carry)
    pools = pools._replace(hidden=carry[0], kv=carry[1])
    return carry[0][is_part][: program.layout.num_tokens], pools


def _run_if(condition: jax.Array, function: Callable[[jax.Array, Carry], Carry], carry: Carry) -> Carry:
    """`function(0, carry)` or `carry`, updated in place: of a branch XLA:CPU copies what it is given, the KV pool as
    well, so this is a loop of one turn or none. What in it depends neither on `carry` nor on the number 0 is computed
    in any case."""
    result: Carry = lax.fori_loop(0, condition.astype(jnp.int32), function, carry)
    return result


def _known_tokens(token_ids: jax.Array, sampled: jax.Array) -> jax.Array:
    """[T]; −1 − r becomes what row r of the last step sampled. Where that is no token at all, nobody wants the row."""
    source = jnp.maximum(-1 - token_ids, 0)
    return jnp.where(token_ids < 0, jnp.maximum(sampled[source], 0), token_ids)


def copy_blocks(pools: Pools, copies: jax.Array, num_copies: jax.Array, *, flatten: bool = False) -> Pools:
    """Copy-on-write: for each of the first `num_copies` rows (source, target) of `copies`, in order, copy the
    block in every pool; as one dimension if `flatten`: XLA:CPU unrolls a copy of six, and compiles it for a second."""

    def copy_one(i: jax.Array, pools: Pools) -> Pools:
        source, target = copies[i, 0], copies[i, 1]

        def copy(pool: jax.Array, axis: int) -> jax.Array:
            flat = pool.reshape(*pool.shape[: axis + 1], -1) if flatten else pool
            starts: list[jax.Array | int] = [0] * flat.ndim
            starts[axis] = source
            sizes = [1 if i == axis else size for i, size in enumerate(flat.shape)]
            block = lax.dynamic_slice(flat, starts, sizes, allow_negative_indices=False)
            starts[axis] = target
            flat = lax.dynamic_update_slice(flat, block, starts, allow_negative_indices=False)
            return flat.reshape(pool.shape)

        kv = jax.tree.map(lambda pool: copy(pool, 1), pools.kv)
        return pools._replace(kv=kv, tokens=copy(pools.tokens, 0))

    return lax.fori_loop(0, num_copies, copy_one, pools)


def _floats(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
