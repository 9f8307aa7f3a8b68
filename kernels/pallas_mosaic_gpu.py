"""Attention of single tokens for Hopper in Pallas' Mosaic GPU dialect, which is to replace the Triton lowering.

The algorithm is that of `pallas_triton`'s single tokens: each context is split over several programs ("Flash-Decoding",
Dao et al. 2023), whose parts are merged. Here the Tensor Memory Accelerator copies K and V block by block into shared
memory, and `wgmma` multiplies from there. Writing, and rows of several tokens, are `pallas_triton`'s. docs/kernels.md
draws the layouts and gives the reasons.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.kernels import pallas_triton
from jaxserve.kernels.metadata import AttentionMetadata
from jaxserve.kernels.pallas_triton import (
    LOG2E,
    MASKED,
    Plan,
    Ref,
    State,
    ceil_div,
    context_start,
    div,
    is_visible,
    mod,
    splits_for,
)
from jaxserve.kernels.reference import QuantizedPool

ROWS = 64  # of wgmma's only tile; query heads are padded to it
TILE = 64  # tokens of one softmax update
STAGES = 2  # tiles of K, and of V, in shared memory
TILE_ROWS = 8  # of a tile of shared memory, which slices consist of
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 80, 96, 128)
GRID = ("token", "head_group", "split")


def unsupported(queries: jax.Array, kv_pool: jax.Array | QuantizedPool) -> str | None:
    """Why these kernels cannot do it, or None."""
    if reason := pallas_triton.unsupported(queries, kv_pool):
        return reason
    if isinstance(kv_pool, QuantizedPool):
        return f"the pool is {kv_pool.values.dtype.name}: it takes none with scales"
    if queries.dtype != kv_pool.dtype or queries.dtype.name not in DTYPES:
        names = f"queries are {queries.dtype.name} and the pool is {kv_pool.dtype.name}"
        return f"{names}; wgmma takes both in {' or both in '.join(DTYPES)}"
    if queries.shape[2] not in HEAD_DIMS:
        return f"head_dim {queries.shape[2]} is not one of {', '.join(map(str, HEAD_DIMS))}"
    return None


def make_plan(plan: Plan) -> Plan:
    """The same step's plan, for single tokens here: wgmma's rows are many, so more query heads share K and V."""
    heads = max(n for n in range(1, min(plan.G, ROWS) + 1) if plan.G % n == 0)
    programs = plan.num_singles * (plan.H // heads)
    return dataclasses.replace(
        plan,
        single_heads=heads,
        head_groups=plan.G // heads,
        num_splits=splits_for(programs),
        kv_tile=TILE,
    )


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
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    """Write this step's keys and values into the pool and attend: same meaning as `reference`.

    Args:
        queries: [T, H, D], bfloat16 or float16.
        keys, values: [T, K, D].
        kv_pool: [N, 2, K, B, D] in the queries' dtype; donate it.
        metadata: the ragged batch, with its tiles (none, where all tokens are attended one by one).
        decode_only: the caller promises that every row has one token.
        interpret: `mosaic_gpu.InterpretGPUParams(…)` to simulate the kernel, and interpret the others, on any platform.

    Returns:
        (out [T, H, D] in the queries' dtype, 0 for padding tokens; the pool).

    Raises:
        ValueError: it cannot be done, and why.
    """
    if reason := unsupported(queries, kv_pool):
        raise ValueError(f"mosaic_gpu: {reason}.")
    if decode_only:
        metadata = metadata._replace(tiles=metadata.tiles[:0])
    plan = pallas_triton.make_plan(
        queries, kv_pool, metadata, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap
    )
    simulated = bool(interpret)
    pool = cast(jax.Array, pallas_triton.write_kv(kv_pool, keys, values, metadata, interpret=simulated))
    out = _attend_singles(make_plan(plan), queries, pool, metadata, interpret)
    if metadata.tiles.shape[0]:
        out = pallas_triton.attend_tiles(plan, queries, [pool], metadata, out, simulated)
    return out, pool


def _attend_singles(
    plan: Plan, queries: jax.Array, pool: jax.Array, metadata: AttentionMetadata, interpret: Any
) -> jax.Array:
    """[T, H, D]; 0 for tokens that are attended in tiles, and for padding."""
    p = plan
    groups, rows = p.K * p.head_groups, _stored_rows(p)
    q = queries[: p.num_singles].reshape(p.num_singles, groups, p.single_heads, p.D)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - p.single_heads), (0, 0)))
    grid = (p.num_singles, groups, p.num_splits)
    acc, peak, total = plgpu.kernel(
        functools.partial(_single_kernel, p),
        out_type=(
            jax.ShapeDtypeStruct((*grid, rows, p.D), jnp.float32),
            jax.ShapeDtypeStruct((*grid, ROWS), jnp.float32),
            jax.ShapeDtypeStruct((*grid, ROWS), jnp.float32),
        ),
        scratch_types=_scratch(p),
        grid=grid,
        grid_names=GRID,
        compiler_params=plgpu.CompilerParams(approx_math=True),  # of 2^x the hardware's own
        kernel_name="paged_attention_decode",
        interpret=interpret or None,
    )(
        metadata.num_single_tokens[None],
        metadata.token_rows,
        metadata.positions,
        metadata.block_tables,
        q,
        pool,
    )
    out = _merge(p, metadata.num_single_tokens, acc, peak, total)
    return jnp.pad(out, ((0, p.T - p.num_singles), (0, 0), (0, 0)))


def _stored_rows(plan: Plan) -> int:
    """Of a program's query heads, in arrays: whole tiles of shared memory."""
    return -(-plan.single_heads // TILE_ROWS) * TILE_ROWS


def _scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers of a program."""
    p = plan

    def tiled(dtype: Any, *shape: int) -> Any:
        """Tiles of 8 rows, swizzled: as wgmma wants them. Operands of a product share the width of their swizzle, so it
        is what D allows for all."""
        num_bytes = plgpu.find_swizzle(p.D * dtype.itemsize * 8)
        tiling = plgpu.TilingTransform((TILE_ROWS, num_bytes // dtype.itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(num_bytes)))

    keys = values = tiled(p.query_dtype, STAGES, TILE, p.D)
    here = plgpu.Barrier(num_arrivals=TILE // min(p.B, TILE), num_barriers=STAGES)
    return {
        "q": tiled(p.query_dtype, ROWS, p.D),
        "weights": tiled(p.query_dtype, ROWS, TILE),
        # what goes out takes the place of what came in
        "large": plgpu.RefUnion([keys, values], tiled(jnp.dtype(jnp.float32), ROWS, p.D)),
        "peak": plgpu.SMEM((ROWS,), jnp.float32),
        "total": plgpu.SMEM((ROWS,), jnp.float32),
        "q_here": plgpu.Barrier(num_barriers=1),
        "keys_here": here,
        "values_here": here,
    }


def _single_kernel(
    plan: Plan,
    count: Ref,
    token_rows: Ref,
    positions: Ref,
    block_tables: Ref,
    queries: Ref,
    pool: Ref,
    acc_out: Ref,
    peak_out: Ref,
    total_out: Ref,
    **scratch: Ref,
) -> None:
    """One token, up to ROWS query heads of one kv head, one part of the context. Rows beyond the query heads hold
    anything, NaN included: none depends on another."""
    p, s = plan, SimpleNamespace(**scratch)
    (s.keys, s.values), s.acc = s.large
    token, group, split = (lax.axis_index(name) for name in GRID)
    kv_head = lax.div(group, jnp.int32(p.head_groups))
    real = pl.ds(0, _stored_rows(p))

    @pl.when(token < count[0])
    def _() -> None:
        row, position = token_rows[token], positions[token]
        plgpu.copy_gmem_to_smem(queries.at[token, group], s.q.at[real], s.q_here.at[0])
        window = context_start(p, position)
        first, end = div(window, TILE), ceil_div(position + 1, TILE)
        share = ceil_div(end - first, p.num_splits)
        first = first + split * share
        num_tiles = jnp.maximum(jnp.minimum(share, end - first), 0)
        piece = min(p.B, TILE)
        last = position - mod(position, piece)

        def copy(side: int, i: jax.Array, stage: jax.Array) -> None:
            """K (side 0) or V of tile i is on its way."""
            to, here = ((s.keys, s.keys_here), (s.values, s.values_here))[side]
            for offset in range(0, TILE, piece):
                # what lies behind the token's own piece is that one again: it comes from the cache, to be masked
                at = jnp.minimum((first + i) * TILE + offset, last)
                # a product, so that the compiler knows its divisor
                inside = pl.ds(mod(div(at, TILE), p.B // TILE) * TILE if p.B > TILE else 0, piece)
                plgpu.copy_gmem_to_smem(
                    pool.at[block_tables[row, div(at, p.B)], side, kv_head, inside],
                    to.at[stage, pl.ds(offset, piece)],
                    here.at[stage],
                )

        for i in range(STAGES):

            @pl.when(i < num_tiles)
            def _(i: int = i) -> None:
                copy(0, jnp.int32(i), jnp.int32(i))
                copy(1, jnp.int32(i), jnp.int32(i))

        plgpu.barrier_wait(s.q_here.at[0])

        def update(i: jax.Array, state: State) -> State:
            peak, total, acc = state
            stage, start = mod(i, STAGES), (first + i) * TILE
            plgpu.barrier_wait(s.keys_here.at[stage])
            scores = _product(s.q, s.keys.at[stage].T, TILE)
            again = i + STAGES < num_tiles

            @pl.when(again)
            def _() -> None:
                copy(0, i + STAGES, stage)

            seen = is_visible(start + _iota((ROWS, TILE), 1), position, p.sliding_window)
            scores = jnp.where(seen, _capped(p, scores) * LOG2E, MASKED)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
            rescale = jnp.exp2(peak - new_peak)
            # no tile is masked as a whole, so that masked scores are far below every peak
            weights = jnp.exp2(scores - _columns(new_peak, TILE))
            total = total * rescale + jnp.sum(weights, axis=1)
            s.weights[...] = weights.astype(p.query_dtype)
            plgpu.barrier_wait(s.values_here.at[stage])

            @pl.when((start < window) | (start + TILE > position + 1))
            def _() -> None:  # what was not written may be NaN, and 0 · NaN is NaN
                values = s.values.at[stage]
                inside = is_visible(start + _iota((TILE, p.D), 0), position, p.sliding_window)
                values[...] = jnp.where(inside, values[...], jnp.zeros((), p.query_dtype))

            plgpu.commit_smem()
            acc = acc * _columns(rescale, p.D) + _product(s.weights, s.values.at[stage], p.D)

            @pl.when(again)
            def _() -> None:
                copy(1, i + STAGES, stage)

            return new_peak, total, acc

        nothing = (_full((ROWS,), MASKED), _full((ROWS,), 0.0), _full((ROWS, p.D), 0.0))
        s.peak[...], s.total[...], s.acc[...] = lax.fori_loop(0, num_tiles, update, nothing)
        plgpu.commit_smem()
        part = (token, group, split)
        plgpu.copy_smem_to_gmem(s.acc.at[real], acc_out.at[part])
        plgpu.copy_smem_to_gmem(s.peak, peak_out.at[part])
        plgpu.copy_smem_to_gmem(s.total, total_out.at[part])
        plgpu.wait_smem_to_gmem(0)


def _capped(plan: Plan, products: jax.Array) -> jax.Array:
    """Scores. The hardware's tanh is good for three digits only, its 2^x for seven."""
    scores = products * plan.scale
    if plan.soft_cap is None:
        return scores
    return plan.soft_cap * (1 - 2 / (1 + jnp.exp2(scores * (2 * LOG2E / plan.soft_cap))))


def _product(a: Ref, b: Ref, columns: int) -> jax.Array:
    """a [ROWS, n] @ b [n, columns], both in shared memory: float32 in registers."""

    def multiply(acc: Ref) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32))


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _full(shape: tuple[int, ...], value: float) -> jax.Array:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _columns(x: jax.Array, columns: int) -> jax.Array:
    """[ROWS] → [ROWS, columns], the same in each."""
    return lax.broadcast_in_dim(x, (ROWS, columns), (0,))


def _merge(plan: Plan, count: jax.Array, acc: jax.Array, peak: jax.Array, total: jax.Array) -> jax.Array:
    """Parts (acc [tokens, groups, splits, rows, D]; peak, total [tokens, groups, splits, ROWS]) → [tokens, H, D]."""
    p, heads = plan, slice(plan.single_heads)
    acc, peak, total = acc[..., heads, :], peak[..., heads], total[..., heads]
    factors = jnp.exp2(peak - jnp.max(peak, axis=2, keepdims=True))
    out = jnp.sum(acc * factors[..., None], axis=2) / jnp.sum(total * factors, axis=2)[..., None]
    real = jnp.arange(p.num_singles) < count  # of other tokens no part was written
    return jnp.where(real[:, None, None], out.reshape(p.num_singles, p.H, p.D), 0.0).astype(p.query_dtype)
