"""Llama (Touvron et al. 2023; Grattafiori et al. 2024) and its relatives, over a paged KV cache.

Projections that read the same input are fused: q, k, v into `qkv_proj`, gate and up into `gate_up_proj`.

On several chips each has a model of its own share of the heads, the MLP and the vocabulary (`shard_config`); their
attention and MLP outputs are added up. A chip's `qkv_proj` has the rows of its own q, k and v heads, in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.kernels.metadata import AttentionMetadata
from jaxserve.kernels.paged_attention import paged_attention
from jaxserve.kernels.reference import QuantizedPool
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import (
    Embedding,
    LayerIndex,
    Linear,
    PartialSums,
    QuantizedRows,
    RMSNorm,
    quantize_rows,
    rotary_embedding,
    uses_partial_sums,
)
from jaxserve.models.loader import Part, TensorSlot
from jaxserve.models.rope import rope_frequencies
from jaxserve.sharding import ONE_CHIP, TensorParallel, VocabShard, shard_config

Pool = jax.Array | QuantizedPool
Attend = Callable[..., tuple[jax.Array, Pool]]


class Attention(nnx.Module):
    """Parameters of grouped-query self-attention with rotary positions."""

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, group: TensorParallel, *, quantized: bool
    ) -> None:
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv_proj = Linear(
            config.hidden_size,
            heads * config.head_dim,
            bias=config.attention_bias,
            dtype=dtype,
            quantized=quantized,
        )
        self.o_proj = Linear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            dtype=dtype,
            quantized=quantized,
            summed_over=group,
        )


class MLP(nnx.Module):
    """Parameters of SwiGLU (Shazeer 2020)."""

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, group: TensorParallel, *, quantized: bool
    ) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(hidden, 2 * inner, bias=bias, dtype=dtype, quantized=quantized)
        # what comes in here is a product of two, and has outliers
        self.down_proj = Linear(
            inner, hidden, bias=bias, dtype=dtype, quantized=quantized, summed_over=group, fine=True
        )


class DecoderLayer(nnx.Module):
    """Parameters of one layer but for its norms, which are in `Llama`."""

    def __init__(
        self, config: ModelConfig, dtype: jnp.dtype, group: TensorParallel, *, quantized: bool
    ) -> None:
        self.self_attn = Attention(config, dtype, group, quantized=quantized)
        self.mlp = MLP(config, dtype, group, quantized=quantized)


class Llama(nnx.Module):
    """The whole decoder, or one chip's share of it. Make it under `nnx.eval_shape`: parameters come from a
    checkpoint, not from here.

    Args:
        config: of the whole model.
        quantized: whether projections, embeddings and output layer are int8 (layers.py).
        group: the chips that share it.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jnp.dtype,
        max_model_len: int,
        quantized: bool = False,
        group: TensorParallel = ONE_CHIP,
    ) -> None:
        vocab = VocabShard(config.vocab_size, group)
        self.config = config = shard_config(config, group.size)
        self.max_model_len = max_model_len
        self.embed_tokens = Embedding(vocab, config.hidden_size, dtype=dtype, quantized=quantized)
        self.layers = nnx.List(
            [DecoderLayer(config, dtype, group, quantized=quantized) for _ in range(config.num_layers)]
        )

        def norms(num_layers: int = 1) -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, num_layers=num_layers)

        self.input_layernorm = norms(config.num_layers)
        self.post_attention_layernorm = norms(config.num_layers)
        self.norm = norms()
        tied = config.tie_word_embeddings
        self.lm_head = (
            None
            if tied
            else Linear(
                config.hidden_size,
                config.vocab_size,
                bias=False,
                dtype=dtype,
                quantized=quantized,
                fine=True,
            )
        )

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        kv_pool: Pool,
        metadata: AttentionMetadata,
        attend: Attend = paged_attention,
        *,
        block_size: int,
        unroll: bool,
        layers: tuple[LayerIndex, LayerIndex] | None = None,
    ) -> tuple[jax.Array, Pool]:
        """The residual stream of this step's tokens.

        Args:
            x: [T, E] float32; `embed_tokens` of the tokens, or what the layers before made of it.
            positions: [T] int32.
            kv_pool: of all layers: [L, N, …] with the rest as `attend` wants it.
            attend: `kernels.paged_attention`, or a partial application of it.
            block_size: B.
            unroll: compile every layer on its own instead of one for all.
            layers: the first one and the one to stop before, if they are not all to be computed; not with `unroll`.

        Returns:
            (x [T, E] float32 behind these layers, the updated kv_pool).
        """
        num_layers = self.config.num_layers
        num_blocks = jax.tree.leaves(kv_pool)[0].shape[1]
        inv_freq, rope_scale = rope_frequencies(self.config, self.max_model_len)
        angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inv_freq)
        cos, sin = jnp.cos(angles) * rope_scale, jnp.sin(angles) * rope_scale

        def compute_layer(layer: LayerIndex, carry: tuple[jax.Array, Pool]) -> tuple[jax.Array, Pool]:
            x, pool = carry
            blocks = metadata.shifted(layer * num_blocks, block_size)
            q, k, v = self._queries_keys_values(layer, x, cos, sin)
            attended, pool = attend(
                q, k, v, pool, blocks, scale=q.shape[-1] ** -0.5, sliding_window=self.config.sliding_window
            )
            x = x + self._apply(layer, lambda m: m.self_attn.o_proj, attended.reshape(len(x), -1))
            return x + self._mlp(layer, x), pool

        # the residual stream stays in float32: sums of 2 · num_layers roundings would be most of the error
        carry = x, jax.tree.map(lambda a: a.reshape(num_layers * num_blocks, *a.shape[2:]), kv_pool)
        if unroll:
            for layer in range(num_layers):
                carry = compute_layer(layer, carry)
        else:
            first, stop = layers or (0, num_layers)
            carry = lax.fori_loop(first, stop, compute_layer, carry)
        x, flat_pool = carry
        return x, jax.tree.map(lambda a, shaped: a.reshape(shaped.shape), flat_pool, kv_pool)

    def _queries_keys_values(
        self, layer: LayerIndex, x: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [T, E] → [T, H, D], [T, K, D], [T, K, D]; positions are rotated into the first two."""
        c = self.config
        H, K = c.num_heads, c.num_kv_heads
        x = self.input_layernorm(x, layer)
        qkv = self._apply(layer, lambda m: m.self_attn.qkv_proj, x).reshape(len(x), H + 2 * K, c.head_dim)
        rotated = rotary_embedding(qkv[:, : H + K], cos, sin).astype(x.dtype)
        return rotated[:, :H], rotated[:, H:], qkv[:, H + K :].astype(x.dtype)

    def _mlp(self, layer: LayerIndex, x: jax.Array) -> jax.Array:
        x = self.post_attention_layernorm(x, layer)
        gate, up = jnp.split(self._apply(layer, lambda m: m.mlp.gate_up_proj, x), 2, axis=-1)
        return self._apply(layer, lambda m: m.mlp.down_proj, (jax.nn.silu(gate) * up).astype(x.dtype))

    # In a loop over the layers, `layer` is data: then every layer's weights are a branch of a switch, which reads them
    # where they are. Stacked weights would be copied in every step, and unrolled layers take long to compile.

    def _apply(self, layer: LayerIndex, part: Callable[[DecoderLayer], Linear], x: jax.Array) -> jax.Array:
        if isinstance(layer, int):
            return part(self.layers[layer])(x)
        inputs: jax.Array | QuantizedRows = x
        first = part(self.layers[0])
        if first.scale is not None:
            inputs = quantize_rows(x, first.summed_over, fine=first.fine)  # once, not in every branch
        if uses_partial_sums(x, first.weight[...]):
            row = (inputs.steps() if isinstance(inputs, QuantizedRows) else inputs.astype(jnp.float32))[0]
            parts = lax.switch(layer, [partial(_partial_sums, part(module)) for module in self.layers], row)
            return first.add_up(parts, inputs)
        # functions, not modules: JAX names each branch, and of a module it would print all of it
        out: jax.Array = lax.switch(layer, [partial(_call, part(module)) for module in self.layers], inputs)
        return out

    def logits(self, x: jax.Array) -> jax.Array:
        """x [R, E] behind all layers → [R, V] float32; a chip's share, its padding included."""
        hidden = self.norm(x)
        return self.embed_tokens.logits(hidden) if self.lm_head is None else self.lm_head.product(hidden)


def _call(module: Linear, x: jax.Array | QuantizedRows) -> jax.Array:
    return module(x)


def _partial_sums(module: Linear, row: jax.Array) -> PartialSums:
    return module.partial_sums(row)


def checkpoint_slots(config: ModelConfig, *, num_shards: int = 1, shard: int = 0) -> dict[str, TensorSlot]:
    """Where each tensor of a Hugging Face checkpoint goes: its name → rows of a parameter of `Llama`.

    Args:
        config: of the whole model.
        num_shards, shard: chips that share the model, and the one whose parameters these are.
    """
    c, s = config, shard_config(config, num_shards)
    kv_shard = shard * c.num_kv_heads // num_shards if num_shards > c.num_kv_heads else shard

    def part(axis: int, size: int, total: int, index: int = shard) -> Part | None:
        first = min(index * size, total)
        return None if num_shards == 1 else Part(axis, first, min(first + size, total))

    vocabulary = part(0, s.vocab_size, c.vocab_size)
    table = (c.vocab_size, c.hidden_size)
    slots = {
        "model.embed_tokens.weight": TensorSlot("embed_tokens.weight", 0, table, vocabulary),
        "model.norm.weight": TensorSlot("norm.weight", 0, (c.hidden_size,)),
    }
    if not c.tie_word_embeddings:
        slots["lm_head.weight"] = TensorSlot("lm_head.weight", 0, table, vocabulary)

    def add_rows(
        layer: str, name: str, param: str, row: int, rows: int, cut: Part | None, bias: bool
    ) -> None:
        """Rows of a fused projection, of which each chip has some."""
        slots[f"{layer}.{name}.weight"] = TensorSlot(f"{param}.weight", row, (rows, c.hidden_size), cut)
        if bias:
            slots[f"{layer}.{name}.bias"] = TensorSlot(f"{param}.bias", row, (rows,), cut)

    def add_columns(layer: str, name: str, param: str, columns: int, cut: Part | None, bias: bool) -> None:
        """A projection whose inputs are spread over the chips. Its bias is added to their sum."""
        slots[f"{layer}.{name}.weight"] = TensorSlot(f"{param}.weight", 0, (c.hidden_size, columns), cut)
        if bias:
            slots[f"{layer}.{name}.bias"] = TensorSlot(f"{param}.bias", 0, (c.hidden_size,))

    q, kv, inner = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    own_q, own_kv, own_inner = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim, s.intermediate_size
    q_part, kv_part = part(0, own_q, q), part(0, own_kv, kv, kv_shard)
    for i in range(c.num_layers):
        layer, param = f"model.layers.{i}", f"layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            slots[f"{layer}.{norm}.weight"] = TensorSlot(
                f"{norm}.weight", i * c.hidden_size, (c.hidden_size,)
            )
        qkv, gate_up = f"{param}.self_attn.qkv_proj", f"{param}.mlp.gate_up_proj"
        add_rows(layer, "self_attn.q_proj", qkv, 0, q, q_part, c.attention_bias)
        add_rows(layer, "self_attn.k_proj", qkv, own_q, kv, kv_part, c.attention_bias)
        add_rows(layer, "self_attn.v_proj", qkv, own_q + own_kv, kv, kv_part, c.attention_bias)
        o_proj = f"{param}.self_attn.o_proj"
        add_columns(layer, "self_attn.o_proj", o_proj, q, part(1, own_q, q), c.attention_bias)
        add_rows(layer, "mlp.gate_proj", gate_up, 0, inner, part(0, own_inner, inner), c.mlp_bias)
        add_rows(layer, "mlp.up_proj", gate_up, own_inner, inner, part(0, own_inner, inner), c.mlp_bias)
        down_proj = f"{param}.mlp.down_proj"
        add_columns(layer, "mlp.down_proj", down_proj, inner, part(1, own_inner, inner), c.mlp_bias)
    return slots
