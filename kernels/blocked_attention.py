"""Paged attention in plain XLA: portable, and the fast path on CPU.

FlashAttention's online softmax (Dao et al. 2022, algorithm 1) over chunks of KV_CHUNK tokens. The loops' trip
counts are data, so that one program serves every context length and costs what the batch at hand needs:
decode rows are taken DECODE_ROWS at a time up to the longest of them, other rows in tiles of QUERY_TILE tokens
up to their own end. A chunk that is masked out whole changes no bit of the result, so a row's result does not
depend on its neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels.metadata import QUERY_TILE, AttentionMetadata

DECODE_ROWS = 8
KV_CHUNK = 256  # tokens; the gathered chunk of DECODE_ROWS rows should stay in the L2 cache
MASKED = -1e30  # finite, so that a row without any context gives 0 and no NaN


def write_kv(
    kv_pool: jax.Array, keys: jax.Array, values: jax.Array, slot_mapping: jax.Array, num_tokens: jax.Array
) -> jax.Array:
    """Put the keys and values ([T, K, D] each) of this step's first `num_tokens` tokens into the pool."""
    _, _, K, B, D = kv_pool.shape
    new = jnp.stack([keys, values], axis=1)  # [T, 2, K, D]
    new = lax.bitcast_convert_type(new, kv_pool.dtype) if _holds_bits(kv_pool) else new.astype(kv_pool.dtype)

    def write(t: jax.Array, pool: jax.Array) -> jax.Array:
        update = lax.dynamic_slice_in_dim(new, t, 1).reshape(1, 2, K, 1, D)
        zero = jnp.int32(0)
        return lax.dynamic_update_slice(pool, update, (slot_mapping[t] // B, zero, zero, slot_mapping[t] % B, zero))

    return lax.fori_loop(0, num_tokens, write, kv_pool)


def _holds_bits(kv_pool: jax.Array) -> bool:
    """A pool of uint16 holds the bits of the model's 16-bit floats. XLA:CPU widens every update of a bfloat16
    array to float32, the whole array with it; integers stay as they are."""
    return bool(kv_pool.dtype == jnp.uint16)


def paged_attention(
    queries: jax.Array,
    kv_pool: jax.Array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> jax.Array:
    """Same meaning as `reference.paged_attention`.

    Args:
        queries: [T, H, D], T a multiple of DECODE_ROWS.
        kv_pool: [N, 2, K, B, D].

    Returns:
        [T, H, D] in the queries' dtype.
    """
    T, H, D = queries.shape
    _, _, K, B, _ = kv_pool.shape
    S, M = metadata.block_tables.shape
    G = H // K
    blocks_per_chunk = max(1, min(KV_CHUNK // B, M))
    chunk = blocks_per_chunk * B
    # rows of (block, k-or-v, head): one gather brings [.., K, blocks, B, D] without a transpose
    flat_pool = kv_pool.reshape(-1, B, D)
    heads = jnp.arange(K, dtype=jnp.int32)
    tables = jnp.pad(metadata.block_tables, ((0, 0), (0, -M % blocks_per_chunk)))
    precision = lax.Precision.HIGHEST if kv_pool.dtype == jnp.float32 else None

    def gather(block_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """block_ids [R, C/B] → keys, values [R, K, C, D]."""
        index = block_ids[:, None, :] * (2 * K) + heads[None, :, None]
        shape = (block_ids.shape[0], K, chunk, D)
        keys = flat_pool.at[index].get(mode="promise_in_bounds").reshape(shape)
        values = flat_pool.at[index + K].get(mode="promise_in_bounds").reshape(shape)
        if _holds_bits(kv_pool):
            keys, values = (lax.bitcast_convert_type(x, queries.dtype) for x in (keys, values))
        return keys, values

    def attend(q: jax.Array, block_rows: jax.Array, q_positions: jax.Array, lens: jax.Array) -> jax.Array:
        """q [R, K, Q, D] with positions [R, Q], block_rows [R, M], lens [R] → [R, K, Q, D] float32."""
        R, _, Q, _ = q.shape
        last_chunk = (jnp.max(lens) + chunk - 1) // chunk
        first_chunk = jnp.int32(0)
        if sliding_window is not None:
            oldest = jnp.min(jnp.where(lens > 0, q_positions[:, 0], jnp.iinfo(jnp.int32).max))
            first_chunk = jnp.clip((oldest - sliding_window + 1) // chunk, 0, last_chunk)

        def body(c: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            peak, total, acc = carry
            block_ids = lax.dynamic_slice_in_dim(block_rows, c * blocks_per_chunk, blocks_per_chunk, axis=1)
            keys, values = gather(block_ids)
            scores = lax.dot_general(
                q, keys, (((3,), (3,)), ((0, 1), (0, 1))), precision, preferred_element_type=jnp.float32
            )  # [R, K, Q, C]
            kv_positions = c * chunk + jnp.arange(chunk, dtype=jnp.int32)
            visible = (kv_positions <= q_positions[:, :, None]) & (kv_positions < lens[:, None, None])
            if sliding_window is not None:
                visible &= kv_positions > q_positions[:, :, None] - sliding_window
            visible = visible[:, None]
            scores = jnp.where(visible, scores * scale, MASKED)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
            rescale = jnp.exp(peak - new_peak)
            weights = jnp.where(visible, jnp.exp(scores - new_peak[..., None]), 0.0)
            out = lax.dot_general(
                weights.astype(values.dtype),
                values,
                (((3,), (2,)), ((0, 1), (0, 1))),
                precision,
                preferred_element_type=jnp.float32,
            )
            return new_peak, total * rescale + jnp.sum(weights, axis=-1), acc * rescale[..., None] + out

        start = (jnp.full((R, K, Q), MASKED), jnp.zeros((R, K, Q)), jnp.zeros((R, K, Q, D)))
        _, total, acc = lax.fori_loop(first_chunk, last_chunk, body, start)
        return acc / jnp.maximum(total, 1e-30)[..., None]

    def decode_group(g: jax.Array, out: jax.Array) -> jax.Array:
        first = g * DECODE_ROWS
        rows = first + jnp.arange(DECODE_ROWS, dtype=jnp.int32)
        lens = lax.dynamic_slice_in_dim(metadata.seq_lens, first, DECODE_ROWS)
        lens = jnp.where(rows < metadata.num_decode_rows, lens, 0)
        q = lax.dynamic_slice_in_dim(queries, first, DECODE_ROWS).reshape(DECODE_ROWS, K, G, D)
        block_rows = lax.dynamic_slice_in_dim(tables, first, DECODE_ROWS)
        positions = jnp.broadcast_to(lens[:, None] - 1, (DECODE_ROWS, G))
        result = attend(q, block_rows, positions, lens).reshape(DECODE_ROWS, H, D)
        return lax.dynamic_update_slice_in_dim(out, result.astype(out.dtype), first, axis=0)

    def prefill_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        row, first = metadata.tiles[i, 0], metadata.tiles[i, 1]
        seq_len = metadata.seq_lens[row]
        position = seq_len - metadata.query_start_loc[row + 1] + first
        q = lax.dynamic_slice_in_dim(padded_queries, first, QUERY_TILE)  # [QUERY_TILE, H, D]
        q = q.reshape(QUERY_TILE, K, G, D).transpose(1, 2, 0, 3).reshape(1, K, G * QUERY_TILE, D)
        positions = jnp.tile(position + jnp.arange(QUERY_TILE, dtype=jnp.int32), G)[None]
        end = jnp.minimum(seq_len, position + QUERY_TILE)
        result = attend(q, lax.dynamic_slice_in_dim(tables, row, 1), positions, end[None])
        result = result.reshape(K, G, QUERY_TILE, D).transpose(2, 0, 1, 3).reshape(QUERY_TILE, H, D)
        # what a tile writes past its row's end, the tiles behind it write again
        return lax.dynamic_update_slice_in_dim(out, result.astype(out.dtype), first, axis=0)

    padded_queries = jnp.pad(queries, ((0, QUERY_TILE), (0, 0), (0, 0)))
    num_groups = (metadata.num_decode_rows + DECODE_ROWS - 1) // DECODE_ROWS
    out = jnp.zeros((T + QUERY_TILE, H, D), queries.dtype)
    out = lax.fori_loop(0, num_groups, decode_group, out)
    out = lax.fori_loop(0, metadata.num_tiles, prefill_tile, out)
    return out[:T]
