"""What paged attention means, in plain jax.numpy and float32: the oracle that every kernel is tested against.

It gathers each token's whole context, so its memory grows with T · context: for tests only.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxserve.kernels.metadata import AttentionMetadata

INT8_MAX = 127.0
FLOAT8_MAX = 448.0  # of float8_e4m3fn


class QuantizedPool(NamedTuple):
    """A pool of 8-bit K and V with one scale per token and head.

    Attributes:
        values: int8 or float8_e4m3fn; [N, 2, K, B, D] here, a kernel may choose another layout.
        scales: float32, what a value is multiplied with; [N, 2, K, B] here.
    """

    values: jax.Array
    scales: jax.Array


Pool = TypeVar("Pool", jax.Array, QuantizedPool)


def quantize_kv(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """[..., D] → (values [..., D] in `dtype`, scales [...] float32): the largest of a head's elements becomes the
    largest that the dtype has."""
    x = x.astype(jnp.float32)
    largest = INT8_MAX if dtype == jnp.int8 else FLOAT8_MAX
    scales = jnp.max(jnp.abs(x), axis=-1) / largest
    values = x / jnp.where(scales > 0, scales, 1.0)[..., None]
    if dtype == jnp.int8:
        values = jnp.round(values)
    return jnp.clip(values, -largest, largest).astype(dtype), scales


def dequantize(pool: jax.Array | QuantizedPool) -> jax.Array:
    """K and V in float32."""
    if isinstance(pool, QuantizedPool):
        return pool.values.astype(jnp.float32) * pool.scales[..., None]
    return pool.astype(jnp.float32)


def write_kv(kv_pool: Pool, keys: jax.Array, values: jax.Array, slot_mapping: jax.Array) -> Pool:
    """Put this step's keys and values into the pool.

    Args:
        kv_pool: [N, 2, K, B, D]; K and V of a block side by side. Or a QuantizedPool.
        keys, values: [T, K, D].
        slot_mapping: [T] int32.
    """
    new = jnp.stack([keys, values], axis=1)  # [T, 2, K, D]
    if isinstance(kv_pool, QuantizedPool):
        quantized, scales = quantize_kv(new, kv_pool.values.dtype)
        return QuantizedPool(
            _put(kv_pool.values, quantized, slot_mapping), _put(kv_pool.scales, scales, slot_mapping)
        )
    return _put(kv_pool, new.astype(kv_pool.dtype), slot_mapping)


def _put(pool: jax.Array, new: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    block_size = pool.shape[3]
    return pool.at[slot_mapping // block_size, :, :, slot_mapping % block_size].set(new)


def paged_attention(
    queries: jax.Array,
    kv_pool: jax.Array | QuantizedPool,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Causal attention of every token over its sequence's blocks.

    Args:
        queries: [T, H, D].
        kv_pool: [N, 2, K, B, D], this step's K and V already written. Or a QuantizedPool.
        sliding_window: a token sees itself and the `sliding_window − 1` tokens before it; None: all.
        soft_cap: scores become soft_cap · tanh(score / soft_cap), as in Gemma 2; None: they stay.

    Returns:
        [T, H, D] in the queries' dtype; rows of padding tokens hold anything finite.
    """
    T, H, D = queries.shape
    pool = dequantize(kv_pool)
    _, _, K, B, _ = pool.shape
    M = metadata.block_tables.shape[1]
    rows, positions = metadata.token_rows, metadata.positions
    context = pool[metadata.block_tables[rows]]  # [T, M, 2, K, B, D]
    keys = context[:, :, 0].transpose(0, 2, 1, 3, 4).reshape(T, K, M * B, D)
    values = context[:, :, 1].transpose(0, 2, 1, 3, 4).reshape(T, K, M * B, D)
    grouped = queries.astype(jnp.float32).reshape(T, K, H // K, D)
    scores = jnp.einsum("tkgd,tkld->tkgl", grouped, keys, precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    kv_positions = jnp.arange(M * B)
    visible = kv_positions <= positions[:, None]
    if sliding_window is not None:
        visible &= kv_positions > positions[:, None] - sliding_window
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), axis=-1)
    out = jnp.einsum("tkgl,tkld->tkgd", weights, values, precision="highest")
    return out.reshape(T, H, D).astype(queries.dtype)
