"""What paged attention means, in plain jax.numpy and float32: the oracle that every kernel is tested against.

It gathers each token's whole context, so its memory grows with T · context: for tests only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.kernels.metadata import AttentionMetadata


def write_kv(kv_pool: jax.Array, keys: jax.Array, values: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    """Put this step's keys and values into the pool.

    Args:
        kv_pool: [N, 2, K, B, D]; K and V of a block side by side.
        keys, values: [T, K, D].
        slot_mapping: [T] int32.
    """
    block_size = kv_pool.shape[3]
    new = jnp.stack([keys, values], axis=1).astype(kv_pool.dtype)
    return kv_pool.at[slot_mapping // block_size, :, :, slot_mapping % block_size].set(new)


def paged_attention(
    queries: jax.Array,
    kv_pool: jax.Array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> jax.Array:
    """Causal attention of every token over its sequence's blocks.

    Args:
        queries: [T, H, D].
        kv_pool: [N, 2, K, B, D], this step's K and V already written.
        sliding_window: a token sees itself and the `sliding_window − 1` tokens before it; None: all.

    Returns:
        [T, H, D] in the queries' dtype; rows of padding tokens hold anything finite.
    """
    T, H, D = queries.shape
    _, _, K, B, _ = kv_pool.shape
    M = metadata.block_tables.shape[1]
    rows, positions = metadata.token_rows, metadata.positions
    context = kv_pool[metadata.block_tables[rows]].astype(jnp.float32)  # [T, M, 2, K, B, D]
    keys = context[:, :, 0].transpose(0, 2, 1, 3, 4).reshape(T, K, M * B, D)
    values = context[:, :, 1].transpose(0, 2, 1, 3, 4).reshape(T, K, M * B, D)
    grouped = queries.astype(jnp.float32).reshape(T, K, H // K, D)
    scores = jnp.einsum("tkgd,tkld->tkgl", grouped, keys, precision="highest") * scale
    kv_positions = jnp.arange(M * B)
    visible = kv_positions <= positions[:, None]
    if sliding_window is not None:
        visible &= kv_positions > positions[:, None] - sliding_window
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), axis=-1)
    out = jnp.einsum("tkgl,tkld->tkgd", weights, values, precision="highest")
    return out.reshape(T, H, D).astype(queries.dtype)
