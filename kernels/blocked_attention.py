"""Paged attention in plain XLA: portable, and the fast path on CPU.

FlashAttention's online softmax (Dao et al. 2022, algorithm 1) over chunks of tokens. The loops' trip
counts are data, so that one program serves every context length and costs what the batch at hand needs:
single tokens are taken in groups up to the longest context in each, longer rows in tiles of
QUERY_TILE tokens up to their own end, several at a time (TILE_CHUNKS), because larger products are faster. A chunk
that is masked out whole changes no bit of the result, so what a token gets from it does not depend on other rows. Up to
rounding it depends on how its own row is cut into steps, which decides the products that a token is in, and on whether
its context is split because those of its neighbours are much shorter (`lanes.py`).

The pool is [N, 2, K, B · D]: a block's values are [B, D], its keys are stored transposed, [D, B]. So both are what
XLA:CPU multiplies with as they are; keys as [B, D] it transposes anew in every product, which takes as long as the
rest of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels.lanes import GROUP_CHUNK, chunk_size, group_size
from jaxserve.kernels.metadata import QUERY_TILE, AttentionMetadata, Lanes
from jaxserve.kernels.reference import QuantizedPool, quantize_kv

Pool = jax.Array | QuantizedPool

# tiles of a row that are attended at once → tokens of context at a time: of what all of them see (without a sliding
# window), and of the rest
TILE_CHUNKS = {1: (512, 128), 2: (512, 128), 4: (512, 256)}
MASKED = -1e30  # finite, so that a row without any context gives 0 and no NaN
LOG2_E = math.log2(math.e)
# 2^x for |x| ≤ 1/2 as a polynomial, lowest power first: least squares of (2^x − 1) / x, so that 2^0 is 1. Relative
# errors: 3.7e-6, which is nothing beside what 16 bits round, and 2e-9 (1e-7 in float32).
EXP2_16_BITS = (1.0, 0.6931210932891191, 0.24022228492875905, 0.055921747732396276, 0.009672155872803723)
EXP2_32_BITS = (
    1.0,
    0.6931472055824737,
    0.24022648461939752,
    0.055503290233891195,
    0.009618373264045986,
    0.0013399853069519408,
    0.00015370710149842454,
)
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
    context = _Context.of(kv_pool, queries, scale, sliding_window)
    K, B, M = context.num_kv_heads, context.block_size, metadata.block_tables.shape[1]
    G = H // K
    group = group_size(T)
    # a masked chunk may begin with a table's last block, and any chunk be longer than a table
    longest_chunk = max(GROUP_CHUNK, *(chunk for chunks in TILE_CHUNKS.values() for chunk in chunks))
    tables = jnp.pad(metadata.block_tables, ((0, 0), (0, max(1, longest_chunk // B) - 1)))

    chunk = chunk_size(B, M)

    def token_group(g: jax.Array, out: jax.Array) -> jax.Array:
        first = g * group
        positions = _slice(metadata.positions, first, group)
        single = first + jnp.arange(group, dtype=jnp.int32) < metadata.num_single_tokens
        q = _slice(queries, first, group).reshape(group, K, G, D)
        block_rows = _take(tables, _slice(metadata.token_rows, first, group))
        lens = lax.select(single, positions + 1, jnp.zeros_like(positions))
        state = _attend_tokens(q, context, block_rows, lens, chunk=chunk)
        return _update(out, _normalize(state).reshape(group, H, D), first)

    flat_tables = tables.reshape(-1)

    def lane_group(lanes: Lanes, g: jax.Array, out: jax.Array) -> jax.Array:
        """Into out [≥ T + group, H, D]; what lanes of one token have seen is put together in its place."""
        tokens, first_blocks, lens = _slice(lanes.lanes, g * group, group).T
        q = _take(queries, tokens).reshape(group, K, G, D)
        width = tables.shape[1]
        # a part that is shorter than others reads on to the end of its own row's table, and there it stays
        columns = jnp.minimum(first_blocks[:, None] + jnp.arange(width, dtype=jnp.int32), width - 1)
        block_rows = _take(flat_tables, (_take(metadata.token_rows, tokens) * width)[:, None] + columns)
        state = _attend_tokens(q, context, block_rows, lens, chunk=chunk)
        first, begin, end = _slice(lanes.groups, g, 1)[0]
        out = _update(out, _normalize(state).reshape(group, H, D), first)

        def put_merged(i: jax.Array, out: jax.Array) -> jax.Array:
            token = _item(lanes.merged, i)
            return _update(out, _normalize(_merge(state, tokens == token)).reshape(1, H, D), token)

        return lax.fori_loop(begin, end, put_merged, out)

    def attend_tokens(rows: int) -> jax.Array:
        """[≥ rows, H, D] float32: updates of anything smaller are updates of a copy."""
        if metadata.lanes is not None:
            out = jnp.zeros((max(rows, T + group), H, D))
            return lax.fori_loop(0, metadata.lanes.num_groups, partial(lane_group, metadata.lanes), out)
        out = jnp.zeros((rows, H, D))
        if group >= T:  # one group needs no loop, and loops are most of what there is to compile
            return token_group(jnp.int32(0), out)
        return lax.fori_loop(0, _ceil_div(metadata.num_single_tokens, group), token_group, out)

    def tiles(i: jax.Array, out: jax.Array, num_tiles: int) -> jax.Array:
        """The i-th and those behind it, of the same row, into out [T + padding, H, D]."""
        size = num_tiles * QUERY_TILE
        row, first = _slice(metadata.tiles, i, 1)[0]
        q = _slice(padded_queries, first, size)  # [size, H, D]
        q = q.reshape(size, K, G, D).transpose(1, 2, 0, 3).reshape(K, G * size, D)
        table, position = _slice(tables, row, 1)[0], _item(metadata.positions, first)
        result = _attend_tiles(q, context, table, position, num_tiles)
        result = result.reshape(K, G, size, D).transpose(2, 0, 1, 3).reshape(size, H, D)
        # what it writes past its row's end, the tiles behind it write again
        return _update(out, result, first)

    # as many as a batch of T tokens can fill, and half as many: each size is something to compile
    *fewer, most = [n for n in TILE_CHUNKS if n == 1 or n * QUERY_TILE <= T][-2:]

    def next_tiles(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, out = carry
        rows = _slice(tile_rows, i, most)
        ahead = i + jnp.arange(most, dtype=jnp.int32)
        left = jnp.sum(((rows == rows[0]) & (ahead < metadata.num_tiles)).astype(jnp.int32))
        # What branches return is copied, so these are loops of one turn or none. What did not depend on their own
        # number, which is 0, would be computed in any case.
        take_most = (left > most // 2).astype(jnp.int32)
        for n in fewer:
            out = lax.fori_loop(0, 1 - take_most, lambda zero, out, n=n: tiles(i + zero, out, n), out)
        out = lax.fori_loop(0, take_most, lambda zero, out: tiles(i + zero, out, most), out)
        return i + left, out

    if metadata.tiles.shape[0] == 0:
        return attend_tokens(T)[:T].astype(queries.dtype)
    # Of n tiles taken at once half or more have tokens, so they reach less than n / 2 tiles past T, or one if n is 1.
    # One tile that is taken as two reaches less than two past it, and is so only where the most is four.
    padding = max(1, most // 2) * QUERY_TILE
    padded_queries = jnp.pad(queries, ((0, padding), (0, 0), (0, 0)))
    tile_rows = jnp.pad(metadata.tiles[:, 0], (0, most - 1))
    out = attend_tokens(T + padding)
    _, out = lax.while_loop(lambda carry: carry[0] < metadata.num_tiles, next_tiles, (jnp.int32(0), out))
    return out[:T].astype(queries.dtype)


class _Context(NamedTuple):
    """How a call reads its pool, and what of it a token may see.

    Attributes:
        keys: [.., D, B] and values: [.., B, D]: each of (block, k-or-v, head), both of the same array.
        scales: [.., B] of a QuantizedPool.
        dtype: of the floats whose bits the pool holds.
        tile_dtype: what tiles multiply in.
    """

    keys: jax.Array
    values: jax.Array
    scales: jax.Array | None
    dtype: jnp.dtype
    tile_dtype: jnp.dtype
    num_kv_heads: int
    scale: float
    sliding_window: int | None

    @classmethod
    def of(cls, kv_pool: Pool, queries: jax.Array, scale: float, sliding_window: int | None) -> _Context:
        pool = kv_pool.values if isinstance(kv_pool, QuantizedPool) else kv_pool
        scales = kv_pool.scales if isinstance(kv_pool, QuantizedPool) else None
        D = queries.shape[2]
        dtype = kv_dtype(pool.dtype)
        return cls(
            keys=pool.reshape(-1, D, pool.shape[3] // D),
            values=pool.reshape(-1, pool.shape[3] // D, D),
            scales=None if scales is None else scales.reshape(-1, scales.shape[3]),
            dtype=dtype,
            # 8-bit numbers are exact in every float of 16 bits
            tile_dtype=queries.dtype if scales is not None else jnp.promote_types(queries.dtype, dtype),
            num_kv_heads=pool.shape[2],
            scale=scale,
            sliding_window=sliding_window,
        )

    @property
    def block_size(self) -> int:
        return self.values.shape[1]

    def gather(self, blocks: jax.Array, heads: jax.Array | int, dtype: jnp.dtype) -> KV:
        """Of blocks […, n] and heads that broadcast to them, with C = n · B tokens."""
        index = blocks * (2 * self.num_kv_heads) + heads
        *lead, n = index.shape
        _, D, B = self.keys.shape
        keys, values = _take(self.keys, index), _take(self.values, index + self.num_kv_heads)
        if n > 1:
            keys = keys.swapaxes(-3, -2)  # what makes them one chunk; values are as they lie
        keys, values = (reinterpret(x, self.dtype).astype(dtype) for x in (keys, values))
        keys, values = keys.reshape(*lead, D, n * B), values.reshape(*lead, n * B, D)
        if self.scales is None:
            return KV(keys, values, None, None)
        key_scales, value_scales = (
            _take(self.scales, i).reshape(*lead, 1, n * B) for i in (index, index + self.num_kv_heads)
        )
        return KV(keys, values, key_scales, value_scales)

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """[…, Q, X] · […, X, Y] → […, Q, Y] float32."""
        batch = tuple(range(a.ndim - 2))
        dimensions = (((a.ndim - 1,), (a.ndim - 2,)), (batch, batch))
        precision = lax.Precision.HIGHEST if self.tile_dtype == jnp.float32 else None
        return lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)


# of weights so far: the logarithm of the largest, their sum, and the sum of weighted values
State = tuple[jax.Array, jax.Array, jax.Array]


class KV(NamedTuple):
    """Keys […, D, C] and values […, C, D] of a chunk, with scales […, 1, C] if they are quantized."""

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None
    value_scales: jax.Array | None


def _attend_tokens(
    q: jax.Array, context: _Context, block_rows: jax.Array, lens: jax.Array, *, chunk: int
) -> State:
    """q [R, K, G, D] of single tokens, each of which sees the first lens [R] tokens in blocks block_rows [R, M] → what
    it has seen, [R, K, G] each and [R, K, G, D]."""
    R, K, G, D = q.shape
    blocks_per_chunk = chunk // context.block_size
    heads = jnp.arange(K, dtype=jnp.int32)[None, :, None]
    window = context.sliding_window
    last_chunk = _ceil_div(jnp.max(lens), chunk)
    first_chunk = jnp.int32(0)
    if window is not None:
        shortest = jnp.min(jnp.where(lens > 0, lens, jnp.iinfo(jnp.int32).max))
        first_chunk = jnp.minimum(lax.div(jnp.maximum(shortest - window, 0), jnp.int32(chunk)), last_chunk)

    def body(c: jax.Array, carry: State) -> State:
        peak, total, acc = carry
        block_ids = _slice(block_rows, c * blocks_per_chunk, blocks_per_chunk, axis=1)
        # float32: faster, with few rows a product
        kv = context.gather(block_ids[:, None], heads, jnp.dtype(jnp.float32))
        scores = context.product(q.astype(jnp.float32), kv.keys) * context.scale  # [R, K, G, C]
        if kv.key_scales is not None:
            scores *= kv.key_scales
        kv_positions = c * chunk + jnp.arange(chunk, dtype=jnp.int32)
        visible = kv_positions < lens[:, None]
        if window is not None:
            visible &= kv_positions >= lens[:, None] - window
        visible = jnp.broadcast_to(visible[:, None, None], scores.shape)
        scores = lax.select(visible, scores, jnp.full_like(scores, MASKED))
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
        rescale = jnp.exp(peak - new_peak)
        weights = lax.select(visible, jnp.exp(scores - new_peak[..., None]), jnp.zeros_like(scores))
        scaled = weights if kv.value_scales is None else weights * kv.value_scales
        out = context.product(scaled, kv.values)
        return new_peak, total * rescale + jnp.sum(weights, axis=-1), acc * rescale[..., None] + out

    start = (jnp.full((R, K, G), MASKED), jnp.zeros((R, K, G)), jnp.zeros((R, K, G, D)))
    state: State = lax.fori_loop(first_chunk, last_chunk, body, start)
    return state


def _merge(state: State, own: jax.Array) -> State:
    """What those lanes have seen together, own [R] bool: [1, K, G] each and [1, K, G, D]."""
    peaks, totals, accs = state
    own = own[:, None, None]
    peak = jnp.max(jnp.where(own, peaks, MASKED), axis=0, keepdims=True)
    weights = jnp.where(own, jnp.exp(peaks - peak), 0.0)
    total = jnp.sum(jnp.where(own, weights * totals, 0.0), axis=0, keepdims=True)
    acc = jnp.where(own[..., None], weights[..., None] * accs, 0.0)  # NaN of others stay with them
    return peak, total, jnp.sum(acc, axis=0, keepdims=True)


def _normalize(state: State) -> jax.Array:
    _, total, acc = state
    return acc / jnp.maximum(total, 1e-30)[..., None]


def _attend_tiles(
    q: jax.Array, context: _Context, table: jax.Array, position: jax.Array, num_tiles: int
) -> jax.Array:
    """q [K, Q, D] of num_tiles tiles of one row, whose first token is at `position`, in blocks table [M] → [K, Q, D]
    float32. Tokens behind the row's last see what lies there in the pool; nobody reads their results."""
    K, Q, D = q.shape
    tokens = num_tiles * QUERY_TILE
    q_positions = jnp.tile(position + jnp.arange(tokens, dtype=jnp.int32), Q // tokens)
    long, short = TILE_CHUNKS[num_tiles]
    short = max(1, short // context.block_size) * context.block_size
    ratio = max(1, long // short)
    window = context.sliding_window

    def visible(kv_positions: jax.Array) -> jax.Array:
        mask = kv_positions <= q_positions[:, None]
        return mask if window is None else mask & (kv_positions > q_positions[:, None] - window)

    states = _start(q)
    if window is None:
        num_long = lax.div(position + 1, jnp.int32(ratio * short))
        states = lax.fori_loop(0, num_long, _chunks(q, context, table, ratio * short), states)
        first = num_long * ratio
    else:
        first = lax.div(jnp.maximum(position - window + 1, 0), jnp.int32(short))
    last = _ceil_div(position + tokens, short)
    states = lax.fori_loop(first, last, _chunks(q, context, table, short, visible), states)
    return jnp.stack([_normalize(state) for state in states]).reshape(K, Q, D)


def _parts(K: int) -> int:
    """How many parts K heads are, which are independent of each other until all are done, so that XLA:CPU has work for
    several threads: its products of this size use one, and of a kernel over three heads one thread would get two."""
    return next(n for n in (3, 4, 5, 7, 2, 1) if K % n == 0)


def _start(q: jax.Array) -> tuple[State, ...]:
    """Of no context, for q [K, Q, D]: one state for each part of the heads."""
    K, Q, D = q.shape
    n = _parts(K)
    shape = (Q,) if n == K else (K // n, Q)
    # above MASKED, so that what is masked has no weight even if nothing was visible before
    start = jnp.full(shape, MASKED / 2), jnp.zeros(shape), jnp.zeros((*shape, D))
    return (start,) * n


def _chunks(
    q: jax.Array,
    context: _Context,
    table: jax.Array,
    size: int,
    visible: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[jax.Array, tuple[State, ...]], tuple[State, ...]]:
    """The body of a loop over chunks of `size` tokens in blocks table [M], which q [K, Q, D] attend to.

    Args:
        visible: a mask [Q, C] for the chunk's positions [C]; without it all is visible.
    """
    K, n = len(q), _parts(len(q))
    q = q.astype(context.tile_dtype)
    num_blocks, factor = size // context.block_size, context.scale * LOG2_E
    polynomial = EXP2_32_BITS if context.tile_dtype == jnp.float32 else EXP2_16_BITS

    heads = jnp.arange(K, dtype=jnp.int32)
    if n == K:  # without a dimension of one, for whose sake weights would be computed twice
        parts = [(q[k], heads[k]) for k in range(K)]
    else:
        parts = list(zip(jnp.split(q, n), jnp.split(heads[:, None], n), strict=True))

    @jax.jit  # traced once for all parts
    def attend(
        queries: jax.Array, heads: jax.Array, blocks: jax.Array, mask: jax.Array | None, state: State
    ) -> State:
        peak, total, acc = state
        kv = context.gather(blocks, heads, context.tile_dtype)
        scores = context.product(queries, kv.keys)  # […, Q, C]
        if kv.key_scales is not None:
            scores *= kv.key_scales
        if mask is not None:
            masked = jnp.full_like(scores, MASKED / factor)
            scores = lax.select(jnp.broadcast_to(mask, scores.shape), scores, masked)
        # from here on logarithms are base 2; what is scaled once is what has fewer numbers
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1) * factor)
        rescale = exp2(peak - new_peak, EXP2_32_BITS)
        weights = exp2(scores * factor - new_peak[..., None], polynomial)
        scaled = weights if kv.value_scales is None else weights * kv.value_scales
        # without the barrier weights would be computed once more for their sum
        rounded = lax.optimization_barrier(scaled.astype(context.tile_dtype))
        summed = rounded.astype(jnp.float32) if kv.value_scales is None else weights
        total = total * rescale + jnp.sum(summed, axis=-1)
        return new_peak, total, acc * rescale[..., None] + context.product(rounded, kv.values)

    def body(c: jax.Array, states: tuple[State, ...]) -> tuple[State, ...]:
        blocks = _slice(table, c * num_blocks, num_blocks)
        mask = None if visible is None else visible(c * size + jnp.arange(size, dtype=jnp.int32))
        return tuple(attend(*part, blocks, mask, state) for part, state in zip(parts, states, strict=True))

    return body


def exp2(x: jax.Array, polynomial: tuple[float, ...]) -> jax.Array:
    """2^x of float32 x ≤ 0; 0 where x ≤ −127. Faster than XLA's `exp`. NaN stays NaN if the last 9 bits of its payload
    are 0, as they are in those that arithmetic makes.

    Args:
        polynomial: EXP2_16_BITS or EXP2_32_BITS.
    """
    x = jnp.maximum(x, -127.0)
    whole = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    rest = x - whole
    power = jnp.full_like(x, polynomial[-1])
    for coefficient in polynomial[-2::-1]:
        power = power * rest + coefficient
    # times 2^whole: added to the exponent. The last bits of 1.5 · 2^23 + whole are those of whole.
    exponent = lax.shift_left(lax.bitcast_convert_type(whole + 1.5 * 2**23, jnp.int32), jnp.int32(23))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(power, jnp.int32) + exponent, jnp.float32)


def _ceil_div(a: jax.Array, b: int) -> jax.Array:
    """For a ≥ 0."""
    return lax.div(a + (b - 1), jnp.int32(b))
