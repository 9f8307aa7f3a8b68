"""Llama (Touvron et al. 2023; Grattafiori et al. 2024) and its relatives, over a paged KV cache.

Projections that read the same input are fused: q, k, v into `qkv_proj`, gate and up into `gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.kernels.metadata import AttentionMetadata
from jaxserve.kernels.paged_attention import paged_attention
from jaxserve.kernels.reference import QuantizedPool
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Embedding, Linear, RMSNorm, matmul, rms_norm, rotary_embedding
from jaxserve.models.loader import TensorSlot
from jaxserve.models.rope import rope_frequencies

Pool = jax.Array | QuantizedPool
Attend = Callable[..., tuple[jax.Array, Pool]]
LayerIndex = int | jax.Array


class Attention(nnx.Module):
    """Parameters of grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv_proj = Linear(
            config.hidden_size, heads * config.head_dim, bias=config.attention_bias, dtype=dtype
        )
        self.o_proj = Linear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.attention_bias, dtype=dtype
        )


class MLP(nnx.Module):
    """Parameters of SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(hidden, 2 * inner, bias=config.mlp_bias, dtype=dtype)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias, dtype=dtype)


class DecoderLayer(nnx.Module):
    """Parameters of one layer."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype)


class Llama(nnx.Module):
    """The whole decoder. Make it under `nnx.eval_shape`: parameters come from a checkpoint, not from here."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, max_model_len: int) -> None:
        self.config = config
        self.max_model_len = max_model_len
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nnx.List([DecoderLayer(config, dtype) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        tied = config.tie_word_embeddings
        self.lm_head = (
            None if tied else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        )

    def __call__(
        self,
        token_ids: jax.Array,
        positions: jax.Array,
        kv_pool: Pool,
        metadata: AttentionMetadata,
        attend: Attend = paged_attention,
        *,
        block_size: int,
        unroll: bool,
    ) -> tuple[jax.Array, Pool]:
        """Hidden states of this step's tokens.

        Args:
            token_ids, positions: [T] int32.
            kv_pool: of all layers: [L, N, …] with the rest as `attend` wants it.
            attend: `kernels.paged_attention`, or a partial application of it.
            block_size: B.
            unroll: compile every layer on its own instead of one for all.

        Returns:
            (hidden [T, E], the updated kv_pool).
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
        x = self.embed_tokens(token_ids).astype(jnp.float32)
        carry = x, jax.tree.map(lambda a: a.reshape(num_layers * num_blocks, *a.shape[2:]), kv_pool)
        if unroll:
            for layer in range(num_layers):
                carry = compute_layer(layer, carry)
        else:
            carry = lax.fori_loop(0, num_layers, compute_layer, carry)
        x, flat_pool = carry
        return self.norm(x), jax.tree.map(lambda a, shaped: a.reshape(shaped.shape), flat_pool, kv_pool)

    def _queries_keys_values(
        self, layer: LayerIndex, x: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [T, E] → [T, H, D], [T, K, D], [T, K, D]; positions are rotated into the first two."""
        c = self.config
        H, K = c.num_heads, c.num_kv_heads
        x = self._normalize(layer, lambda m: m.input_layernorm, x)
        qkv = self._apply(layer, lambda m: m.self_attn.qkv_proj, x).reshape(len(x), H + 2 * K, c.head_dim)
        rotated = rotary_embedding(qkv[:, : H + K], cos, sin).astype(x.dtype)
        return rotated[:, :H], rotated[:, H:], qkv[:, H + K :].astype(x.dtype)

    def _mlp(self, layer: LayerIndex, x: jax.Array) -> jax.Array:
        x = self._normalize(layer, lambda m: m.post_attention_layernorm, x)
        gate, up = jnp.split(self._apply(layer, lambda m: m.mlp.gate_up_proj, x), 2, axis=-1)
        return self._apply(layer, lambda m: m.mlp.down_proj, (jax.nn.silu(gate) * up).astype(x.dtype))

    # In a loop over the layers, `layer` is data: then every layer's weights are a branch of a switch, which reads them
    # where they are. Stacked weights would be copied in every step, and unrolled layers take long to compile.

    def _apply(self, layer: LayerIndex, part: Callable[[DecoderLayer], Linear], x: jax.Array) -> jax.Array:
        if isinstance(layer, int):
            return part(self.layers[layer])(x)
        out: jax.Array = lax.switch(layer, [part(module) for module in self.layers], x)
        return out

    def _normalize(
        self, layer: LayerIndex, part: Callable[[DecoderLayer], RMSNorm], x: jax.Array
    ) -> jax.Array:
        if isinstance(layer, int):
            return part(self.layers[layer])(x)
        weights = jnp.stack([part(module).weight[...] for module in self.layers])
        return rms_norm(x, weights[layer], self.config.rms_norm_eps)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [R, E] → [R, V] float32."""
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return matmul(hidden, head[...])


def checkpoint_slots(config: ModelConfig) -> dict[str, TensorSlot]:
    """Where each tensor of a Hugging Face checkpoint goes: its name → rows of a parameter of `Llama`."""
    c = config
    q_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    slots = {
        "model.embed_tokens.weight": TensorSlot("embed_tokens.weight", 0, (c.vocab_size, c.hidden_size)),
        "model.norm.weight": TensorSlot("norm.weight", 0, (c.hidden_size,)),
    }
    if not c.tie_word_embeddings:
        slots["lm_head.weight"] = TensorSlot("lm_head.weight", 0, (c.vocab_size, c.hidden_size))

    def add(layer: int, name: str, param: str, row: int, shape: tuple[int, ...]) -> None:
        slots[f"model.layers.{layer}.{name}"] = TensorSlot(f"layers.{layer}.{param}", row, shape)

    def add_linear(
        layer: int, name: str, param: str, row: int, shape: tuple[int, int], *, bias: bool
    ) -> None:
        add(layer, f"{name}.weight", f"{param}.weight", row, shape)
        if bias:
            add(layer, f"{name}.bias", f"{param}.bias", row, shape[:1])

    for i in range(c.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(i, f"{norm}.weight", f"{norm}.weight", 0, (c.hidden_size,))
        row = 0
        for name, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
            shape = (rows, c.hidden_size)
            add_linear(i, f"self_attn.{name}", "self_attn.qkv_proj", row, shape, bias=c.attention_bias)
            row += rows
        shape = (c.hidden_size, q_rows)
        add_linear(i, "self_attn.o_proj", "self_attn.o_proj", 0, shape, bias=c.attention_bias)
        for row, name in ((0, "gate_proj"), (c.intermediate_size, "up_proj")):
            shape = (c.intermediate_size, c.hidden_size)
            add_linear(i, f"mlp.{name}", "mlp.gate_up_proj", row, shape, bias=c.mlp_bias)
        add_linear(
            i, "mlp.down_proj", "mlp.down_proj", 0, (c.hidden_size, c.intermediate_size), bias=c.mlp_bias
        )
    return slots
