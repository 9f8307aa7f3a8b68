"""Ragged paged attention for TPU in Pallas (Mosaic): one call writes a step's K and V and attends over the pool.

FlashAttention's online softmax (Dao et al. 2022) over a paged cache (Kwon et al. 2023). Rows of one token take the
decode path: all kv heads of one row at a time, the new K and V inserted into the chunk that has just been read.
Longer rows take the prefill path: their K and V are written first, then tiles of queries attend chunk by chunk.
A phase without work is a loop of zero trips. docs/kernels.md draws the layouts and gives the reasons;
pallas_tpu_layout, pallas_tpu_decode and pallas_tpu_prefill have the parts.

Tiles are loaded first and values are reshaped, never refs: so the kernel also runs in `pltpu.InterpretParams`.
JAX's own kernels say page for block.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels.metadata import AttentionMetadata
from jaxserve.kernels.pallas_tpu_decode import SingleTokens
from jaxserve.kernels.pallas_tpu_layout import LANES, SUBLANES, Plan, make_plan, pad_lanes, unsupported
from jaxserve.kernels.pallas_tpu_prefill import LongRows
from jaxserve.kernels.reference import QuantizedPool, quantize_kv

SCALAR_ROWS = ("block_tables", "seq_lens", "query_start_loc", "counts")

Ref = Any  # pallas' refs have no public type


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
    num_cores: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    """Write this step's keys and values into the pool and attend: same meaning as `reference`.

    No row may read a block that another row of one token writes in this step (the block manager shares full blocks
    only). What lies behind a row's last token in the words or windows that its write touches becomes 0.

    Args:
        queries: [T, H, D], bfloat16 or float32.
        keys, values: [T, K, D].
        kv_pool: `pool_shape(…)`, or a QuantizedPool with scales of `scales_shape(…)`; donate it.
        metadata: the ragged batch; rows of one token first.
        decode_only: the caller promises that every row has one token: half the program, and less memory.
        num_cores: TensorCores that share the kv heads; None: as many as the chip presents as one device.
        interpret: run in the simulator.

    Returns:
        (out [T, H, D] in the queries' dtype, 0 for padding tokens; the pool).

    Raises:
        ValueError: it cannot be done, and why.
    """
    if reason := unsupported(queries, kv_pool, metadata):
        raise ValueError(f"pallas_tpu: {reason}.")
    if num_cores is None:
        num_cores = 1 if interpret else int(pltpu.get_tpu_info().num_cores)
    plan = make_plan(
        queries,
        kv_pool,
        metadata,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        decode_only=decode_only,
        num_cores=num_cores,
    )
    counts = _count_rows(metadata)
    pools = list(kv_pool) if isinstance(kv_pool, QuantizedPool) else [kv_pool]
    operands = {"q_single": _single_queries(plan, queries)}
    if plan.with_prefill:
        operands["q_tiled"] = _tiled_queries(plan, queries)
    operands |= _new_rows(plan, keys, values)
    outputs = _call(plan, metadata, counts, operands, pools, interpret)
    out = _merge_outputs(plan, counts, outputs, queries.shape[2])
    if isinstance(kv_pool, QuantizedPool):
        return out, QuantizedPool(outputs["pool"], outputs["scales"])
    return out, outputs["pool"]


def _count_rows(metadata: AttentionMetadata) -> jax.Array:
    """[rows of one token, rows, tokens]."""
    lengths = metadata.query_start_loc[1:] - metadata.query_start_loc[:-1]
    rows = metadata.seq_lens > 0
    singles = jnp.sum(rows & (lengths == 1), dtype=jnp.int32)
    return jnp.stack([singles, jnp.sum(rows, dtype=jnp.int32), metadata.query_start_loc[-1]])


def _single_queries(plan: Plan, queries: jax.Array) -> jax.Array:
    """[T, H, D] → [rows, K, Gp, Lk], padded with 0."""
    p = plan
    q = queries[: p.num_singles].reshape(p.num_singles, p.K * p.num_instances, p.G, -1)
    return jnp.pad(q, ((0, 0), (0, 0), (0, p.Gp - p.G), (0, p.Lk - q.shape[3])))


def _tiled_queries(plan: Plan, queries: jax.Array) -> jax.Array:
    """[T, H, D] → [tiles, K, G · Q, Lk]: all query heads of a kv head below each other fill the matrix unit."""
    p = plan
    q = jnp.pad(queries, ((0, p.num_tiles * p.Q - p.T), (0, 0), (0, p.Lk - queries.shape[2])))
    q = q.reshape(p.num_tiles, p.Q, p.K * p.num_instances, p.G, p.Lk)
    return q.transpose(0, 2, 3, 1, 4).reshape(p.num_tiles, p.K * p.num_instances, p.G * p.Q, p.Lk)


def _new_rows(plan: Plan, keys: jax.Array, values: jax.Array) -> dict[str, jax.Array]:
    """What is to be written: rows [K, lead + T + …, L] in float32 (only 32-bit rows can be shifted by any
    number of tokens), and for a quantized pool the scales [K, 2, lead + T + …]."""
    p = plan
    operands = {}
    behind = -(-p.T // LANES) * LANES - p.T + 2 * LANES
    if p.quantized:
        keys, key_scales = quantize_kv(keys, p.kv_dtype)
        values, value_scales = quantize_kv(values, p.kv_dtype)
        scales = jnp.stack([key_scales, value_scales]).transpose(2, 0, 1)
        operands["new_scales"] = jnp.pad(scales, ((0, 0), (0, 0), (p.lead, behind)))
    rows = [pad_lanes(x.astype(p.kv_dtype).astype(jnp.float32), p.L // 2) for x in (keys, values)]
    new = jnp.concatenate(rows, axis=-1).transpose(1, 0, 2)
    return {"new": jnp.pad(new, ((0, 0), (p.lead, behind), (0, 0))), **operands}


def _merge_outputs(plan: Plan, counts: jax.Array, outputs: dict[str, jax.Array], head_dim: int) -> jax.Array:
    p = plan
    first_lane = p.L // 2 if p.Lv == p.L else 0
    lanes = slice(first_lane, first_lane + head_dim)
    heads = p.K * p.num_instances * p.G
    token = jnp.arange(p.T, dtype=jnp.int32)[:, None, None]
    single = outputs["out_single"][:, :, : p.G, lanes].reshape(p.num_singles, heads, head_dim)
    single = jnp.pad(single, ((0, p.T - p.num_singles), (0, 0), (0, 0)))
    rest = jnp.zeros_like(single)
    if p.with_prefill:
        tiled = outputs["out_tiled"][..., lanes].reshape(p.num_tiles, heads // p.G, p.G, p.Q, head_dim)
        tiled = tiled.transpose(0, 3, 1, 2, 4).reshape(p.num_tiles * p.Q, heads, head_dim)[: p.T]
        rest = jnp.where(token < counts[2], tiled, 0)
    return jnp.where(token < counts[0], single, rest)


def _call(
    plan: Plan,
    metadata: AttentionMetadata,
    counts: jax.Array,
    operands: dict[str, jax.Array],
    pools: list[jax.Array],
    interpret: bool | pltpu.InterpretParams,
) -> dict[str, jax.Array]:
    """The kernel itself; refs are named, so that variants with fewer of them stay readable."""
    p = plan
    heads = p.K * p.num_instances
    pool_names = ["pool", "scales"][: len(pools)]
    out_shapes = {"out_single": jax.ShapeDtypeStruct((p.num_singles, heads, p.Gp, p.Lv), p.query_dtype)}
    if p.with_prefill:
        shape = (p.num_tiles, heads, p.G * p.Q, p.Lv)
        out_shapes["out_tiled"] = jax.ShapeDtypeStruct(shape, p.query_dtype)
    for name, pool in zip(pool_names, pools, strict=True):
        out_shapes[name] = jax.ShapeDtypeStruct(pool.shape, pool.dtype)
    scratch = _scratch(p)
    in_names = [*SCALAR_ROWS, *operands, *(f"{name}_in" for name in pool_names)]
    names = [*in_names, *out_shapes, *scratch]
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # ANY may be vector memory, which cannot be read at any row
    call = pl.pallas_call(
        functools.partial(_kernel, p, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(SCALAR_ROWS),
            grid=(p.num_instances,),
            in_specs=[hbm] * (len(operands) + len(pools)),
            out_specs=[hbm] * len(out_shapes),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(out_shapes.values()),
        input_output_aliases={
            in_names.index(f"{name}_in"): list(out_shapes).index(name) for name in pool_names
        },
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="paged_attention" if p.with_prefill else "paged_attention_decode",
    )
    outputs = call(
        metadata.block_tables.reshape(-1),  # rows of a two-dimensional array would be padded
        metadata.seq_lens,
        metadata.query_start_loc,
        counts,
        *operands.values(),
        *pools,
    )
    return dict(zip(out_shapes, outputs, strict=True))


def _scratch(plan: Plan) -> dict[str, Any]:
    """Buffers in vector memory; a leading 2 is the double buffer. Semaphores are named after what they guard."""
    p = plan
    f32 = jnp.float32
    buffers = {
        "kv": ((2, p.K, p.chunk, p.L), p.kv_dtype),
        "q": ((2, p.K, p.Gp, p.Lk), p.query_dtype),
        "new_row": ((2, p.K, SUBLANES, p.L), f32),
        "stage": ((2, p.K, p.window_rows, p.L), p.kv_dtype),
        "out": ((2, p.K, p.Gp, p.Lv), p.query_dtype),
        "peak": ((p.K, p.Gp, LANES), f32),
        "total": ((p.K, p.Gp, LANES), f32),
        "acc": ((p.K, p.Gp, p.Lv), f32),
    }
    if p.quantized:
        buffers["kv_scales"] = ((2, p.chunk // p.unit, p.K, 2, LANES), f32)
        buffers["new_scale"] = ((2, p.K, 2, LANES), f32)
        buffers["stage_scales"] = ((2, p.K, 2, LANES), f32)
    if p.with_prefill:
        rows = p.G * p.Q
        buffers["fresh"] = ((2, p.K, p.new_rows + SUBLANES, p.L), f32)
        buffers["tile_q"] = ((2, p.head_group, rows, p.Lk), p.query_dtype)
        buffers["tile_out"] = ((2, p.head_group, rows, p.Lv), p.query_dtype)
        buffers["tile_peak"] = ((p.head_group, rows, LANES), f32)
        buffers["tile_total"] = ((p.head_group, rows, LANES), f32)
        buffers["tile_acc"] = ((p.head_group, rows, p.Lv), f32)
        if p.quantized:
            buffers["fresh_scales"] = ((2, p.K, 2, 2 * LANES), f32)
    semaphores = ("kv_sem", "q_sem", "new_sem", "write_sem", "out_sem")
    return {name: pltpu.VMEM(shape, dtype) for name, (shape, dtype) in buffers.items()} | {
        name: pltpu.SemaphoreType.DMA((2,)) for name in semaphores
    }


def _kernel(plan: Plan, names: list[str], *refs: Ref) -> None:
    named = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    first_head = pl.program_id(0) * plan.K
    singles = SingleTokens(plan, named, first_head)
    if not plan.with_prefill:
        singles.attend_single_tokens()
        return
    rows = LongRows(plan, named, first_head)
    rows.write_prefill_rows()
    if plan.quantized:
        rows.write_prefill_scales()
    singles.attend_single_tokens()
    rows.attend_tiles()
