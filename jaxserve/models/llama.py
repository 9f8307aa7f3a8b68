"""Llama (Touvron et al. 2023; Grattafiori et al. 2024) and its relatives, over a paged KV cache.

Projections that read the same input are fused: q, k, v into `qkv_proj`, gate and up into `gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.metadata import AttentionMetadata
from jaxserve.kernels.paged_attention import paged_attention
from jaxserve.kernels.reference import QuantizedPool
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Embedding, Linear, RMSNorm, matmul, rotary_embedding
from jaxserve.models.loader import TensorSlot
from jaxserve.models.rope import rope_frequencies

Pool = jax.Array | QuantizedPool
Attend = Callable[..., tuple[jax.Array, Pool]]


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv_proj = Linear(
            config.hidden_size, heads * config.head_dim, bias=config.attention_bias, dtype=dtype
        )
        self.o_proj = Linear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.attention_bias, dtype=dtype
        )

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        kv_pool: Pool,
        metadata: AttentionMetadata,
        attend: Attend,
    ) -> tuple[jax.Array, Pool]:
        c = self.config
        T, H, K, D = x.shape[0], c.num_heads, c.num_kv_heads, c.head_dim
        qkv = self.qkv_proj(x).reshape(T, H + 2 * K, D)
        rotated = rotary_embedding(qkv[:, : H + K], cos, sin).astype(x.dtype)
        out, kv_pool = attend(
            rotated[:, :H],
            rotated[:, H:],
            qkv[:, H + K :].astype(x.dtype),
            kv_pool,
            metadata,
            scale=D**-0.5,
            sliding_window=c.sliding_window,
        )
        return self.o_proj(out.reshape(T, H * D)), kv_pool


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(hidden, 2 * inner, bias=config.mlp_bias, dtype=dtype)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj((jax.nn.silu(gate) * up).astype(x.dtype))


class DecoderLayer(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        kv_pool: Pool,
        metadata: AttentionMetadata,
        attend: Attend,
    ) -> tuple[jax.Array, Pool]:
        attended, kv_pool = self.self_attn(self.input_layernorm(x), cos, sin, kv_pool, metadata, attend)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kv_pool


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
        kv_pools: list[Pool],
        metadata: AttentionMetadata,
        attend: Attend = paged_attention,
    ) -> tuple[jax.Array, list[Pool]]:
        """Hidden states of this step's tokens.

        Args:
            token_ids, positions: [T] int32.
            kv_pools: one per layer, as `attend` wants them.
            attend: `kernels.paged_attention`, or a partial application of it.

        Returns:
            (hidden [T, E], the updated kv_pools).
        """
        inv_freq, rope_scale = rope_frequencies(self.config, self.max_model_len)
        angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inv_freq)
        cos, sin = jnp.cos(angles) * rope_scale, jnp.sin(angles) * rope_scale
        # the residual stream stays in float32: sums of 2 · num_layers roundings would be most of the error
        x = self.embed_tokens(token_ids).astype(jnp.float32)
        new_pools = []
        for layer, kv_pool in zip(self.layers, kv_pools, strict=True):
            x, updated = layer(x, cos, sin, kv_pool, metadata, attend)
            new_pools.append(updated)
        return self.norm(x), new_pools

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
