"""Ragged paged attention for GPU in Pallas (Triton): a step's K and V are written, then attended over.

FlashAttention's online softmax (Dao et al. 2022) over a paged cache (Kwon et al. 2023). Single tokens are attended
with the context split over several programs, whose parts are merged afterwards (split-K, "Flash-Decoding", Dao et al.
2023); longer rows in tiles of QUERY_TILE tokens. All programs of a call are independent: what must come before is
another call. docs/kernels.md draws the layouts and gives the reasons.

JAX deprecates this lowering in favour of Mosaic GPU; of all other files only `pallas_mosaic_gpu` depends on it. JAX's
own kernels say page for block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxserve.kernels.metadata import QUERY_TILE, AttentionMetadata
from jaxserve.kernels.reference import QuantizedPool, quantize_kv

MASKED = -1e30  # finite, so that a row without any context gives 0 and no NaN
LOG2E = math.log2(math.e)  # the hardware has a power of two, and none of e
MIN_ROWS = 16  # of the tensor cores' smallest tile
SPLIT_PROGRAMS = (
    2048  # single tokens are split until there are about this many programs: several for each core
)
MAX_SPLITS = 16
POOL_DTYPES = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")
QUERY_DTYPES = ("bfloat16", "float16", "float32")
NARROW_BYTES = 2**32  # Pallas counts offsets into an array in 32 bits up to here, in 64 bits beyond
NARROW_ELEMENTS = 2**31  # what 32 bits count, of which one is a sign

Ref = Any  # pallas' refs have no public type
State = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about the kernels that is known before the data is. Letters as in docs/architecture.md.

    Attributes:
        G: query heads per kv head; Dp: D padded to a power of two.
        num_singles: tokens that may have to be attended one by one.
        single_heads: query heads that a program of a single token handles, padded to MIN_ROWS; `head_groups` such
            programs share a kv head.
        tile_heads: query heads of a program of a tile.
        num_splits: parts that a single token's context is split into.
        kv_tile: tokens of one softmax update.
    """

    T: int
    S: int
    M: int
    B: int
    H: int
    K: int
    G: int
    D: int
    Dp: int
    num_singles: int
    single_heads: int
    head_groups: int
    tile_heads: int
    num_splits: int
    kv_tile: int
    kv_dtype: Any
    query_dtype: Any
    quantized: bool
    scale: float
    sliding_window: int | None
    soft_cap: float | None

    @property
    def compute_dtype(self) -> Any:
        wide = self.query_dtype == jnp.float32 or self.kv_dtype == jnp.float32
        return jnp.dtype(jnp.float32) if wide else self.query_dtype

    @property
    def precision(self) -> lax.Precision:
        return lax.Precision.HIGHEST if self.compute_dtype == jnp.float32 else lax.Precision.DEFAULT

    @property
    def num_warps(self) -> int:
        """Of a program of a tile: its accumulator should not take more than half of a thread's registers."""
        return 8 if self.tile_heads * QUERY_TILE * self.Dp > 64 * 128 else 4

    @property
    def num_stages(self) -> int:
        """Tiles of K and V in flight; two of these would not fit in an L4's shared memory."""
        return 1 if self.Dp > 128 and self.compute_dtype == jnp.float32 else 2


def unsupported(queries: jax.Array, kv_pool: jax.Array | QuantizedPool) -> str | None:
    """Why these kernels cannot do it, or None."""
    pool = kv_pool.values if isinstance(kv_pool, QuantizedPool) else kv_pool
    H, D = queries.shape[1:]
    if pool.ndim != 5 or pool.shape[1] != 2 or pool.shape[4] != D:
        return f"the pool has shape {pool.shape}; it must be [N, 2, K, B, {D}]"
    _, _, K, B, _ = pool.shape
    if queries.dtype.name not in QUERY_DTYPES:
        return f"queries are {queries.dtype.name}, not one of {', '.join(QUERY_DTYPES)}"
    if pool.dtype.name not in POOL_DTYPES:
        return f"the pool is {pool.dtype.name}, not one of {', '.join(POOL_DTYPES)}"
    if (pool.dtype.itemsize == 1) != isinstance(kv_pool, QuantizedPool):
        return f"a pool of {pool.dtype.name} {'needs' if pool.dtype.itemsize == 1 else 'takes no'} scales"
    if D > 256 or D % 8:
        return f"head_dim {D} is not a multiple of 8 up to 256"
    if H % K:
        return f"{H} query heads are no multiple of {K} kv heads"
    if B not in (16, 32, 64, 128, 256):
        return f"block_size {B} is not one of 16, 32, 64, 128, 256"
    reach = reachable_blocks(pool)
    if reach < pool.shape[0]:
        return (
            f"of {pool.shape[0]:,} blocks of one-byte elements, Pallas' 32-bit offsets reach {reach:,}: use no more "
            "than these, or more than 4 GiB"
        )
    return None


def reachable_blocks(pool: jax.Array | jax.ShapeDtypeStruct) -> int:
    """How many blocks of a pool [N, …], of all layers or of one, the kernels' offsets reach: all, unless its elements
    have one byte and take between 2 and 4 GiB."""
    size = math.prod(pool.shape)
    if size <= NARROW_ELEMENTS or size * pool.dtype.itemsize > NARROW_BYTES:
        return int(pool.shape[0])
    return NARROW_ELEMENTS // math.prod(pool.shape[1:])


def make_plan(
    queries: jax.Array,
    kv_pool: jax.Array | QuantizedPool,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Plan:
    """Tile sizes for these shapes; docs/kernels.md says why these."""
    pool = kv_pool.values if isinstance(kv_pool, QuantizedPool) else kv_pool
    T, H, D = queries.shape
    _, _, K, B, _ = pool.shape
    S, M = metadata.block_tables.shape
    G = H // K
    Dp = _ceil_power_of_two(D)
    wide = jnp.float32 in (queries.dtype, pool.dtype)
    has_tiles = metadata.tiles.shape[0] > 0
    num_singles = min(T, S) if has_tiles else T
    head_groups = -(-G // MIN_ROWS)
    programs = num_singles * K * head_groups
    return Plan(
        T=T,
        S=S,
        M=M,
        B=B,
        H=H,
        K=K,
        G=G,
        D=D,
        Dp=Dp,
        num_singles=num_singles,
        single_heads=min(G, MIN_ROWS),
        head_groups=head_groups,
        tile_heads=2 if G % 2 == 0 and Dp <= 128 and not wide else 1,
        num_splits=splits_for(programs),
        kv_tile=max(16, min(64, (8192 if not wide else 4096) // Dp)),
        kv_dtype=pool.dtype,
        query_dtype=queries.dtype,
        quantized=isinstance(kv_pool, QuantizedPool),
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )


def splits_for(programs: int) -> int:
    """Parts of each context, given so many programs without."""
    return min(MAX_SPLITS, _ceil_power_of_two(SPLIT_PROGRAMS // programs))


def paged_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_pool: jax.Array | QuantizedPool,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    decode_only: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    """Write this step's keys and values into the pool and attend: same meaning as `reference`.

    Args:
        queries: [T, H, D], bfloat16, float16 or float32.
        keys, values: [T, K, D].
        kv_pool: [N, 2, K, B, D], or a QuantizedPool with scales [N, 2, K, B]; donate it.
        metadata: the ragged batch, with its tiles (none, where all tokens are attended one by one).
        decode_only: the caller promises that every row has one token.
        interpret: run on any platform, slowly.

    Returns:
        (out [T, H, D] in the queries' dtype, 0 for padding tokens; the pool).

    Raises:
        ValueError: it cannot be done, and why.
    """
    if reason := unsupported(queries, kv_pool):
        raise ValueError(f"pallas_triton: {reason}.")
    if decode_only:
        metadata = metadata._replace(tiles=metadata.tiles[:0])
    plan = make_plan(
        queries, kv_pool, metadata, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap
    )
    kv_pool = write_kv(kv_pool, keys, values, metadata, interpret=interpret)
    pools = list(kv_pool) if isinstance(kv_pool, QuantizedPool) else [kv_pool]
    out = _attend_singles(plan, queries, pools, metadata, interpret)
    if metadata.tiles.shape[0]:
        out = attend_tiles(plan, queries, pools, metadata, out, interpret)
    return out, kv_pool


# -- writing ----------------------------------------------------------------------------------------------------


def write_kv(
    kv_pool: jax.Array | QuantizedPool,
    keys: jax.Array,
    values: jax.Array,
    metadata: AttentionMetadata,
    *,
    interpret: bool = False,
) -> jax.Array | QuantizedPool:
    """Put the keys and values ([T, K, D] each) of this step's tokens into the pool, in place; a program a token.
    (XLA's scatter transposes the whole pool first.)"""
    pool = kv_pool.values if isinstance(kv_pool, QuantizedPool) else kv_pool
    T, K, D = keys.shape
    new = jnp.stack([keys, values], axis=1)  # [T, 2, K, D]
    if isinstance(kv_pool, QuantizedPool):
        pools, rows = list(kv_pool), list(quantize_kv(new, pool.dtype))
    else:
        pools, rows = [kv_pool], [new.astype(pool.dtype)]
    first_pool = 2 + len(rows)
    written = pl.pallas_call(
        functools.partial(_write_kernel, K, pool.shape[3], D),
        grid=(T,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools],
        input_output_aliases={first_pool + i: i for i in range(len(pools))},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_kv_write",
    )(metadata.slot_mapping, metadata.query_start_loc[-1:], *rows, *pools)
    return QuantizedPool(*written) if isinstance(kv_pool, QuantizedPool) else written[0]


def _write_kernel(K: int, B: int, D: int, slot_mapping: Ref, num_tokens: Ref, *refs: Ref) -> None:
    rows, pools = refs[: len(refs) // 3], refs[-(len(refs) // 3) :]
    token = pl.program_id(0)

    @pl.when(token < num_tokens[0])
    def _() -> None:
        slot = slot_mapping[token]
        block, offset = div(slot, B), mod(slot, B)
        # K and V of all heads below each other
        row = jnp.arange(_ceil_power_of_two(2 * K))
        side, head, real = row // K, row % K, row < 2 * K
        if len(pools) == 2:
            at = (side, head)
            scales = plgpu.load(rows[1].at[token, *at], mask=real)
            plgpu.store(pools[1].at[block, *at, offset], scales, mask=real)
        lane = jnp.arange(_ceil_power_of_two(D))
        side, head, lane = side[:, None], head[:, None], lane[None, :]
        mask = real[:, None] & (lane < D)
        new = plgpu.load(rows[0].at[token, side, head, lane], mask=mask)
        plgpu.store(pools[0].at[block, side, head, offset, lane], new, mask=mask)


# -- single tokens ----------------------------------------------------------------------------------------------


def _attend_singles(
    plan: Plan, queries: jax.Array, pools: list[jax.Array], metadata: AttentionMetadata, interpret: bool
) -> jax.Array:
    """[T, H, D]; 0 for tokens that are attended in tiles, and for padding."""
    p = plan
    operands = {
        "count": metadata.num_single_tokens[None],
        "token_rows": metadata.token_rows,
        "positions": metadata.positions,
        "block_tables": metadata.block_tables,
        "q": queries,
        **_named(pools),
    }
    f32 = jnp.float32
    shape = (p.num_singles, p.H, p.num_splits)
    if p.num_splits == 1:
        outputs = {"out": jax.ShapeDtypeStruct((p.num_singles, p.H, p.D), p.query_dtype)}
    else:
        outputs = {
            "acc": jax.ShapeDtypeStruct((*shape, p.D), f32),
            "peak": jax.ShapeDtypeStruct(shape, f32),
            "total": jax.ShapeDtypeStruct(shape, f32),
        }
    results = _call(
        functools.partial(_single_kernel, p),
        (p.num_singles, p.K * p.head_groups, p.num_splits),
        operands,
        outputs,
        plgpu.CompilerParams(num_warps=4, num_stages=p.num_stages),
        interpret,
        "paged_attention_decode",
    )
    if p.num_splits > 1:
        results = _call(
            functools.partial(_merge_kernel, p),
            (p.num_singles, p.H),
            {"count": operands["count"], **results},
            {"out": jax.ShapeDtypeStruct((p.num_singles, p.H, p.D), p.query_dtype)},
            plgpu.CompilerParams(num_warps=1, num_stages=1),
            interpret,
            "paged_attention_merge",
        )
    return jnp.pad(results["out"], ((0, p.T - p.num_singles), (0, 0), (0, 0)))


def _single_kernel(plan: Plan, r: SimpleNamespace) -> None:
    """One token, up to `single_heads` query heads of one kv head, one part of the context."""
    p = plan
    token, split = pl.program_id(0), pl.program_id(2)
    kv_head, group = pl.program_id(1) // p.head_groups, pl.program_id(1) % p.head_groups
    first_head = kv_head * p.G + group * p.single_heads
    local = jnp.arange(MIN_ROWS)
    real = (local < p.single_heads) & (group * p.single_heads + local < p.G)
    heads, lanes = first_head + local, jnp.arange(p.Dp)
    index = (token, heads[:, None], lanes[None, :])
    mask = real[:, None] & (lanes < p.D)[None, :]

    @pl.when(token < r.count[0])
    def _() -> None:
        q = plgpu.load(r.q.at[*index], mask=mask, other=0.0).astype(p.compute_dtype)
        position = r.positions[token]
        first = context_start(p, position)
        share = ceil_div(ceil_div(position + 1 - first, p.kv_tile), p.num_splits) * p.kv_tile
        start = first + split * share
        stop = jnp.minimum(start + share, position + 1)
        q_positions = jnp.full((MIN_ROWS,), position, jnp.int32)
        peak, total, acc = _attend(p, r, q, q_positions, r.token_rows[token], kv_head, start, stop)
        if p.num_splits == 1:
            plgpu.store(r.out.at[*index], _normalize(acc, total).astype(p.query_dtype), mask=mask)
        else:
            plgpu.store(r.acc.at[token, heads[:, None], split, lanes[None, :]], acc, mask=mask)
            plgpu.store(r.peak.at[token, heads, split], peak, mask=real)
            plgpu.store(r.total.at[token, heads, split], total, mask=real)

    if p.num_splits == 1:

        @pl.when(token >= r.count[0])
        def _() -> None:
            plgpu.store(r.out.at[*index], jnp.zeros((MIN_ROWS, p.Dp), p.query_dtype), mask=mask)


def _merge_kernel(plan: Plan, r: SimpleNamespace) -> None:
    """The parts of one token and query head → its output."""
    p = plan
    token, head = pl.program_id(0), pl.program_id(1)
    lanes = jnp.arange(p.Dp)
    mask = lanes < p.D

    @pl.when(token < r.count[0])
    def _() -> None:
        splits = jnp.arange(p.num_splits)
        peaks = r.peak[token, head, splits]
        factors = jnp.exp2(peaks - jnp.max(peaks))
        total = jnp.sum(factors * r.total[token, head, splits])
        index = (token, head, splits[:, None], lanes[None, :])
        parts = plgpu.load(r.acc.at[*index], mask=mask[None, :], other=0.0)
        acc = jnp.sum(parts * factors[:, None], axis=0)
        plgpu.store(r.out.at[token, head, lanes], (acc / total).astype(p.query_dtype), mask=mask)

    @pl.when(token >= r.count[0])
    def _() -> None:
        plgpu.store(r.out.at[token, head, lanes], jnp.zeros(p.Dp, p.query_dtype), mask=mask)


# -- tiles ------------------------------------------------------------------------------------------------------


def attend_tiles(
    plan: Plan,
    queries: jax.Array,
    pools: list[jax.Array],
    metadata: AttentionMetadata,
    out: jax.Array,
    interpret: bool,
) -> jax.Array:
    """`out` with the tokens of all tiles filled in, in place."""
    p = plan
    operands = {
        "count": metadata.num_tiles[None],
        "tiles": metadata.tiles,
        "query_start_loc": metadata.query_start_loc,
        "positions": metadata.positions,
        "block_tables": metadata.block_tables,
        "q": queries,
        **_named(pools),
        "out_in": out,
    }
    results = _call(
        functools.partial(_tile_kernel, p),
        (metadata.tiles.shape[0], p.H // p.tile_heads),
        operands,
        {"out": jax.ShapeDtypeStruct(out.shape, out.dtype)},
        plgpu.CompilerParams(num_warps=p.num_warps, num_stages=p.num_stages),
        interpret,
        "paged_attention_prefill",
        aliases={"out_in": "out"},
    )
    return results["out"]


def _tile_kernel(plan: Plan, r: SimpleNamespace) -> None:
    """Up to QUERY_TILE tokens of one row, `tile_heads` query heads of one kv head: rows of head after head."""
    p = plan
    tile, first_head = pl.program_id(0), pl.program_id(1) * p.tile_heads

    @pl.when(tile < r.count[0])
    def _() -> None:
        row, first_token = r.tiles[tile, 0], r.tiles[tile, 1]
        local = jnp.arange(p.tile_heads * QUERY_TILE)
        tokens, heads = first_token + mod(local, QUERY_TILE), first_head + div(local, QUERY_TILE)
        last_token = jnp.minimum(first_token + QUERY_TILE, r.query_start_loc[row + 1]) - 1
        real = tokens <= last_token
        lanes = jnp.arange(p.Dp)
        index = (tokens[:, None], heads[:, None], lanes[None, :])
        mask = real[:, None] & (lanes < p.D)[None, :]
        q = plgpu.load(r.q.at[*index], mask=mask, other=0.0).astype(p.compute_dtype)
        first_position = r.positions[first_token]
        q_positions = first_position + mod(local, QUERY_TILE)
        start, stop = context_start(p, first_position), first_position + (last_token - first_token) + 1
        _, total, acc = _attend(p, r, q, q_positions, row, first_head // p.G, start, stop)
        plgpu.store(r.out.at[*index], _normalize(acc, total).astype(p.query_dtype), mask=mask)


# -- what both do -----------------------------------------------------------------------------------------------


def _attend(
    plan: Plan,
    r: SimpleNamespace,
    queries: jax.Array,
    q_positions: jax.Array,
    row: jax.Array,
    kv_head: jax.Array,
    start: jax.Array,
    stop: jax.Array,
) -> State:
    """queries [rows, Dp] over positions start … stop − 1 of a row: (peak [rows], total [rows], acc [rows, Dp]); peaks
    are base-2 logarithms."""
    p = plan
    lanes = jnp.arange(p.Dp)

    def update(i: jax.Array, state: State) -> State:
        peak, total, acc = state
        positions = start + i * p.kv_tile + jnp.arange(p.kv_tile)
        inside = positions < stop
        # what lies behind the end reads the null block, masked
        blocks = plgpu.load(r.block_tables.at[row, div(positions, p.B)], mask=inside, other=0)
        offsets = mod(positions, p.B)
        mask = inside[:, None] & (lanes < p.D)[None, :]

        def load(side: int) -> jax.Array:
            at = (blocks[:, None], side, kv_head, offsets[:, None], lanes[None, :])
            return _as_operand(plgpu.load(r.pool.at[*at], mask=mask), mask, p.compute_dtype)

        def scales(side: int) -> jax.Array:
            return plgpu.load(r.scales.at[blocks, side, kv_head, offsets], mask=inside, other=0.0)[None, :]

        scores = _dot(queries, load(0), 1, p.precision) * p.scale
        if p.quantized:
            scores = scores * scales(0)
        if p.soft_cap is not None:
            scores = p.soft_cap * jnp.tanh(scores / p.soft_cap)
        visible = is_visible(positions[None, :], q_positions[:, None], p.sliding_window) & inside[None, :]
        scores = jnp.where(visible, scores * LOG2E, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        rescale = jnp.exp2(peak - new_peak)
        weights = jnp.where(visible, jnp.exp2(scores - new_peak[:, None]), 0.0)
        total = total * rescale + jnp.sum(weights, axis=1)
        if p.quantized:
            weights = weights * scales(1)
        product = _dot(weights.astype(p.compute_dtype), load(1), 0, p.precision)
        return new_peak, total, acc * rescale[:, None] + product

    rows = queries.shape[0]
    nothing = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((rows, p.Dp)))
    return lax.fori_loop(0, ceil_div(jnp.maximum(stop - start, 0), p.kv_tile), update, nothing)


def context_start(plan: Plan, position: jax.Array) -> jax.Array:
    """First position that a token at `position` sees."""
    if plan.sliding_window is None:
        return jnp.int32(0)
    return jnp.maximum(position - (plan.sliding_window - 1), 0)


def is_visible(kv_positions: jax.Array, q_positions: jax.Array, sliding_window: int | None) -> jax.Array:
    visible = kv_positions <= q_positions
    if sliding_window is not None:
        visible &= kv_positions > q_positions - sliding_window
    return visible


def _as_operand(x: jax.Array, mask: jax.Array, dtype: Any) -> jax.Array:
    """What a masked load brought, as an operand of the tensor cores; 0 where nothing was loaded."""
    if x.dtype == jnp.float8_e4m3fn:
        x = _decode_float8(lax.bitcast_convert_type(x, jnp.int8))
    return jnp.where(mask, x.astype(dtype), jnp.zeros((), dtype))


def _decode_float8(bits: jax.Array) -> jax.Array:
    """float8_e4m3fn → float32 by way of float16, whose exponent is one bit longer and whose bias 8 greater: Ampere
    has no such conversion."""
    wide = bits.astype(jnp.int16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return lax.bitcast_convert_type(half.astype(jnp.int16), jnp.float16).astype(jnp.float32) * 256.0


def _normalize(acc: jax.Array, total: jax.Array) -> jax.Array:
    return acc / jnp.where(total > 0, total, 1.0)[:, None]


def _dot(a: jax.Array, b: jax.Array, axis: int, precision: lax.Precision) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision, preferred_element_type=jnp.float32)


# -- small things -----------------------------------------------------------------------------------------------


def _named(pools: list[jax.Array]) -> dict[str, jax.Array]:
    return dict(zip(("pool", "scales"), pools, strict=False))


def _call(
    kernel: Any,
    grid: tuple[int, ...],
    operands: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    compiler_params: plgpu.CompilerParams,
    interpret: bool,
    name: str,
    aliases: dict[str, str] | None = None,
) -> dict[str, jax.Array]:
    """`pallas_call` on whole arrays; refs are named, so that variants with fewer of them stay readable."""
    names = [*operands, *outputs]
    results = pl.pallas_call(
        lambda *refs: kernel(SimpleNamespace(**dict(zip(names, refs, strict=True)))),
        grid=grid,
        out_shape=list(outputs.values()),
        input_output_aliases={
            list(operands).index(source): list(outputs).index(target)
            for source, target in (aliases or {}).items()
        },
        compiler_params=compiler_params,
        interpret=interpret,
        name=name,
    )(*operands.values())
    return dict(zip(outputs, results, strict=True))


# Sizes are powers of two: shifts and masks, where a division would be a dozen instructions.


def div(x: jax.Array, n: int) -> jax.Array:
    return x >> (n.bit_length() - 1)


def mod(x: jax.Array, n: int) -> jax.Array:
    return x & (n - 1)


def ceil_div(x: jax.Array, n: int) -> jax.Array:
    return div(x + (n - 1), n)


def _ceil_power_of_two(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()
