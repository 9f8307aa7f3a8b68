"""Paged attention in plain XLA: portable, and the fast path on CPU.

FlashAttention's online softmax (Dao et al. 2022, algorithm 1) over chunks of tokens. The loops' trip
counts are data, so that one program serves every context length and costs what the batch at hand needs:
single tokens are taken in groups up to the longest context in each, longer rows in tiles of
QUERY_TILE tokens up to their own end; behind a long context two at a time, because larger products are faster. A chunk
that is masked out whole changes no bit of the result, so a token's result does not depend on other rows; on how its own
row is cut into steps it depends as far as rounding goes, since it decides which products a token is in.

The pool is [N, 2, K, B · D]: a block's values are [B, D], its keys are stored transposed, [D, B]. So both are what
XLA:CPU multiplies with as they are; keys as [B, D] it transposes anew in every product, which takes as long as the
rest of it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels.metadata import QUERY_TILE, AttentionMetadata
from jaxserve.kernels.reference import QuantizedPool, quantize_kv

Pool = jax.Array | QuantizedPool

TOKEN_GROUP = 16
LARGE_TOKEN_GROUP = 32  # faster if it gets full
DECODING_BATCHES = (32, 64)  # sizes of which most tokens decode, each a multiple of the large group
GROUP_CHUNK = 64  # tokens of K and V at a time
TILE_CHUNK = 128  # of one context, for every tile
LONG_CONTEXT = 256  # behind fewer tokens, the chunks of two tiles are mostly masked out
MASKED = -1e30  # finite, so that a row without any context gives 0 and no NaN
# XLA:CPU widens every update of an array of small floats to float32, the whole array with it; integers stay as they
# are. So a pool may hold the bits: which floats they are follows from the integer.
BITS = {"bfloat16": jnp.uint16, "float16": jnp.int16, "float8_e4m3fn": jnp.uint8}
FLOATS = {jnp.dtype(bits): jnp.dtype(name) for name, bits in BITS.items()}


def storage_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What XLA:CPU keeps a pool of `dtype` as."""
    return jnp.dtype(BITS.get(dtype.name, dtype))


def kv_dtype(stored: jnp.dtype) -> jnp.dtype:
    """The inverse of `storage_dtype`; other dtypes are themselves."""
    return FLOATS.get(stored, stored)


def reinterpret(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The same bits."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def pool_shape(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int) -> tuple[int, ...]:
    """Of K and V of one layer; a QuantizedPool's scales are [N, 2, K, B]."""
    return num_blocks, 2, num_kv_heads, block_size * head_dim


def write_kv(
    kv_pool: Pool, keys: jax.Array, values: jax.Array, slot_mapping: jax.Array, num_tokens: jax.Array
) -> Pool:
    """Put the keys and values ([T, K, D] each) of this step's first `num_tokens` tokens into the pool."""
    _, K, D = keys.shape
    B = (kv_pool.values if isinstance(kv_pool, QuantizedPool) else kv_pool).shape[3] // D
    blocks, offsets = lax.div(slot_mapping, jnp.int32(B)), lax.rem(slot_mapping, jnp.int32(B))

    def write(
        pool: jax.Array, rows: jax.Array, column: Callable[[jax.Array], tuple[jax.Array | int, ...]]
    ) -> jax.Array:
        """Put each token's `rows` [T, …] where its block, and in it `column` of its offset, is."""

        def put(t: jax.Array, pool: jax.Array) -> jax.Array:
            index = [_item(blocks, t), *column(_item(offsets, t))]
            return lax.dynamic_update_slice(pool, _slice(rows, t, 1), index, allow_negative_indices=False)

        written: jax.Array = lax.fori_loop(0, num_tokens, put, pool)
        return written

    def write_elements(pool: jax.Array, rows: jax.Array) -> jax.Array:
        """Keys are columns of their block, values are rows. One loop each: one for both would copy the pool."""
        rows = reinterpret(rows.astype(kv_dtype(pool.dtype)), pool.dtype)
        new_keys, new_values = rows[:, 0].reshape(-1, 1, K, D, 1), rows[:, 1].reshape(-1, 1, K, D)
        with_keys = write(pool.reshape(-1, 2, K, D, B), new_keys, lambda offset: (0, 0, 0, offset))
        return write(with_keys.reshape(pool.shape), new_values, lambda offset: (1, 0, offset * D))

    new = jnp.stack([keys, values], axis=1)  # [T, 2, K, D]
    if not isinstance(kv_pool, QuantizedPool):
        return write_elements(kv_pool, new)
    quantized, scales = quantize_kv(new, kv_dtype(kv_pool.values.dtype))
    return QuantizedPool(
        write_elements(kv_pool.values, quantized),
        write(kv_pool.scales, scales[..., None], lambda offset: (0, 0, offset)),
    )


# Plain indexing normalizes negative indices: a dozen instructions an index, in every layer of every program.


def _slice(x: jax.Array, start: jax.Array, size: int, axis: int = 0) -> jax.Array:
    """x[start : start + size] along `axis`, start ≥ 0."""
    starts = [0] * x.ndim
    sizes = list(x.shape)
    sizes[axis] = size
    indices = [start if a == axis else s for a, s in enumerate(starts)]
    return lax.dynamic_slice(x, indices, sizes, allow_negative_indices=False)


def _item(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] of a vector, index ≥ 0."""
    return _slice(x, index, 1)[0]


def _update(x: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
    """x with rows from `start` ≥ 0 on replaced."""
    index = [start] + [0] * (x.ndim - 1)
    return lax.dynamic_update_slice(x, update.astype(x.dtype), index, allow_negative_indices=False)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] along the first axis, 0 ≤ index < len(x)."""
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def paged_attention(
    queries: jax.Array,
    kv_pool: Pool,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> jax.Array:
    """Same meaning as `reference.paged_attention`.

    Args:
        queries: [T, H, D], T at most TOKEN_GROUP or a multiple of it.
        kv_pool: `pool_shape(…)`, in `storage_dtype` or as it is. Or a QuantizedPool of such.

    Returns:
        [T, H, D] in the queries' dtype.
    """
    T, H, D = queries.shape
    pool = kv_pool.values if isinstance(kv_pool, QuantizedPool) else kv_pool
    scales = kv_pool.scales if isinstance(kv_pool, QuantizedPool) else None
    dtype = kv_dtype(pool.dtype)
    _, _, K, size = pool.shape
    B, M = size // D, metadata.block_tables.shape[1]
    G = H // K
    group = min(LARGE_TOKEN_GROUP if T in DECODING_BATCHES else TOKEN_GROUP, T)
    # rows of (block, k-or-v, head): a gather brings [.., K, blocks, …], of which only keys of several blocks need a
    # transpose
    key_rows, value_rows = pool.reshape(-1, D, B), pool.reshape(-1, B, D)
    scale_rows = None if scales is None else scales.reshape(-1, B)
    heads = jnp.arange(K, dtype=jnp.int32)
    # a chunk may begin with a table's last block
    tables = jnp.pad(metadata.block_tables, ((0, 0), (0, max(1, 2 * TILE_CHUNK // B) - 1)))
    # 8-bit numbers are exact in every float of 16 bits
    tile_dtype = queries.dtype if scales is not None else jnp.promote_types(queries.dtype, dtype)
    precision = lax.Precision.HIGHEST if tile_dtype == jnp.float32 else None

    def gather(index: jax.Array, *, tiled: bool) -> tuple[jax.Array, jax.Array]:
        """Rows of keys [R, K, blocks] → keys [R, K, D, C] and values [R, K, C, D]."""
        R, K, num_blocks = index.shape
        keys, values = _take(key_rows, index), _take(value_rows, index + K)
        if num_blocks > 1:
            keys = keys.transpose(0, 1, 3, 2, 4)
        # few rows a product: XLA:CPU is faster in float32 there
        keys, values = (
            reinterpret(x, dtype).astype(tile_dtype if tiled else jnp.float32) for x in (keys, values)
        )
        return keys.reshape(R, K, D, num_blocks * B), values.reshape(R, K, num_blocks * B, D)

    def attend(
        q: jax.Array, block_rows: jax.Array, q_positions: jax.Array, lens: jax.Array, *, num_tiles: int = 0
    ) -> jax.Array:
        """q [R, K, Q, D] with positions [R, Q], block_rows [R, M], lens [R] → [R, K, Q, D] float32. num_tiles: 0 for
        single tokens."""
        R, _, Q, _ = q.shape
        blocks_per_chunk = max(1, min((TILE_CHUNK * num_tiles or GROUP_CHUNK) // B, M))
        chunk = blocks_per_chunk * B
        last_chunk = _ceil_div(jnp.max(lens), chunk)
        first_chunk = jnp.int32(0)
        if sliding_window is not None:
            oldest = jnp.min(jnp.where(lens > 0, q_positions[:, 0], jnp.iinfo(jnp.int32).max))
            first_chunk = jnp.minimum(
                lax.div(jnp.maximum(oldest - sliding_window + 1, 0), jnp.int32(chunk)), last_chunk
            )

        def body(c: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            peak, total, acc = carry
            block_ids = _slice(block_rows, c * blocks_per_chunk, blocks_per_chunk, axis=1)
            index = block_ids[:, None, :] * (2 * K) + heads[None, :, None]
            keys, values = gather(index, tiled=num_tiles > 0)
            scores = _product(q.astype(keys.dtype), keys, precision) * scale  # [R, K, Q, C]
            if scale_rows is not None:
                scores *= _take(scale_rows, index).reshape(R, K, 1, chunk)
            kv_positions = c * chunk + jnp.arange(chunk, dtype=jnp.int32)
            visible = (kv_positions <= q_positions[:, :, None]) & (kv_positions < lens[:, None, None])
            if sliding_window is not None:
                visible &= kv_positions > q_positions[:, :, None] - sliding_window
            visible = jnp.broadcast_to(visible[:, None], scores.shape)
            scores = lax.select(visible, scores, jnp.full_like(scores, MASKED))
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
            rescale = jnp.exp(peak - new_peak)
            weights = lax.select(visible, jnp.exp(scores - new_peak[..., None]), jnp.zeros_like(scores))
            scaled = weights
            if scale_rows is not None:
                scaled *= _take(scale_rows, index + K).reshape(R, K, 1, chunk)
            out = _product(scaled.astype(values.dtype), values, precision)
            return new_peak, total * rescale + jnp.sum(weights, axis=-1), acc * rescale[..., None] + out

        start = (jnp.full((R, K, Q), MASKED), jnp.zeros((R, K, Q)), jnp.zeros((R, K, Q, D)))
        _, total, acc = lax.fori_loop(first_chunk, last_chunk, body, start)
        return acc / jnp.maximum(total, 1e-30)[..., None]

    def token_group(g: jax.Array, out: jax.Array) -> jax.Array:
        first = g * group
        positions = _slice(metadata.positions, first, group)
        single = first + jnp.arange(group, dtype=jnp.int32) < metadata.num_single_tokens
        q = _slice(queries, first, group).reshape(group, K, G, D)
        block_rows = _take(tables, _slice(metadata.token_rows, first, group))
        q_positions = jnp.broadcast_to(positions[:, None], (group, G))
        lens = lax.select(single, positions + 1, jnp.zeros_like(positions))
        result = attend(q, block_rows, q_positions, lens)
        return _update(out, result.reshape(group, H, D), first)

    def tiles(i: jax.Array, out: jax.Array, num_tiles: int) -> jax.Array:
        """The i-th and those behind it, of the same row, into out [T + padding, H, D]."""
        size = num_tiles * QUERY_TILE
        row, first = _slice(metadata.tiles, i, 1)[0]
        position = _item(metadata.positions, first)
        q = _slice(padded_queries, first, size)  # [size, H, D]
        q = q.reshape(size, K, G, D).transpose(1, 2, 0, 3).reshape(1, K, G * size, D)
        q_positions = jnp.tile(position + jnp.arange(size, dtype=jnp.int32), G)[None]
        end = jnp.minimum(_slice(metadata.seq_lens, row, 1), position + size)
        result = attend(q, _slice(tables, row, 1), q_positions, end, num_tiles=num_tiles)
        result = result.reshape(K, G, size, D).transpose(2, 0, 1, 3).reshape(size, H, D)
        return _update(
            out, result, first
        )  # what it writes past its row's end, the tiles behind it write again

    def next_tiles(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, out = carry
        rows = _slice(tile_rows, i, 2)
        behind = _item(metadata.positions, _slice(metadata.tiles, i, 1)[0, 1])
        same_row = (i + 1 < metadata.num_tiles) & (rows[0] == rows[1])
        two = (same_row & (behind >= LONG_CONTEXT)).astype(jnp.int32)
        # What branches return is copied, so these are loops of one turn or none. What did not depend on their own
        # number, which is 0, would be computed in any case.
        out = lax.fori_loop(0, two, lambda zero, out: tiles(i + zero, out, 2), out)
        out = lax.fori_loop(two, 1, lambda zero, out: tiles(i + zero, out, 1), out)
        return i + 1 + two, out

    if group >= T:  # one group needs no loop, and loops are most of what there is to compile
        return token_group(jnp.int32(0), jnp.zeros_like(queries))
    num_groups = _ceil_div(metadata.num_single_tokens, group)
    if metadata.tiles.shape[0] == 0:
        return lax.fori_loop(0, num_groups, token_group, jnp.zeros_like(queries))
    # where there are two, the first is full: they reach no further past the end than one. In a batch of fewer tokens
    # there never are two, but their slice must fit all the same.
    padding = max(QUERY_TILE, 2 * QUERY_TILE - T)
    padded_queries = jnp.pad(queries, ((0, padding), (0, 0), (0, 0)))
    tile_rows = jnp.pad(metadata.tiles[:, 0], (0, 1))
    out = lax.fori_loop(0, num_groups, token_group, jnp.zeros_like(padded_queries))
    return lax.while_loop(lambda carry: carry[0] < metadata.num_tiles, next_tiles, (jnp.int32(0), out))[1][:T]


def _product(a: jax.Array, b: jax.Array, precision: lax.Precision | None) -> jax.Array:
    """[R, K, Q, X] · [R, K, X, Y] → [R, K, Q, Y] float32."""
    dimensions = (((3,), (2,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)


def _ceil_div(a: jax.Array, b: int) -> jax.Array:
    """For a ≥ 0."""
    return lax.div(a + (b - 1), jnp.int32(b))
