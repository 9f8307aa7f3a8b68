"""The public operation: write this step's K and V into the pool, then attend over it."""

from __future__ import annotations

import functools

import jax

from jaxserve.kernels import blocked_attention
from jaxserve.kernels.metadata import AttentionMetadata


@functools.partial(jax.jit, static_argnames=("scale", "sliding_window"))  # traced once for all layers
def paged_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_pool: jax.Array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal grouped-query attention over a paged KV cache (PagedAttention, Kwon et al. 2023).

    Args:
        queries: [T, H, D].
        keys, values: [T, K, D], of this step's tokens.
        kv_pool: [N, 2, K, B, D]; donate it, so that it is updated in place.
        metadata: the ragged batch.
        scale: factor of the scores, usually D ** −0.5.
        sliding_window: tokens that a token sees, itself included; None: all before it.

    Returns:
        (out [T, H, D] in the queries' dtype, kv_pool).
    """
    num_tokens = metadata.query_start_loc[-1]
    kv_pool = blocked_attention.write_kv(kv_pool, keys, values, metadata.slot_mapping, num_tokens)
    out = blocked_attention.paged_attention(
        queries, kv_pool, metadata, scale=scale, sliding_window=sliding_window
    )
    return out, kv_pool
