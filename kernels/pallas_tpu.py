"""Ragged paged attention for TPU in Pallas (Mosaic): one call writes a step's K and V and attends over the pool.

FlashAttention's online softmax (Dao et al. 2022) over a paged cache (Kwon et al. 2023). Rows of one token take the
decode path: all kv heads of one row at a time, the new K and V inserted into the chunk that has just been read.
Longer rows take the prefill path: their K and V are written first, then tiles of queries attend chunk by chunk.
A phase without work is a loop of zero trips. docs/kernels.md draws the layouts and gives the reasons.

Tiles are loaded first and values are reshaped, never refs: so the kernel also runs in `pltpu.InterpretParams`.
JAX's own kernels say page for block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels.metadata import AttentionMetadata
from jaxserve.kernels.reference import QuantizedPool, quantize_kv

LANES = 128  # of a vector register
SUBLANES = 8
READ_ROWS = 4  # the end of a context is read in pieces of a power of two of tokens, at least this many
MASKED = -1e30  # finite, so that a row without any context gives 0 and no NaN
CHUNK_BYTES = (
    2 << 20
)  # of K and V in flight while another chunk is used; more than bandwidth × latency of any chip
MAX_CHUNK = 512  # tokens
DECODE_TILE = 256  # tokens of one softmax update of the decode path
SMEM_TABLE_BYTES = 768 << 10  # of 1 MiB scalar memory, for the block tables
SCALAR_ROWS = ("block_tables", "seq_lens", "query_start_loc", "counts")

Item = tuple[jax.Array, ...]
Ref = Any  # pallas' refs have no public type
POOL_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")


def half_lanes(head_dim: int) -> int:
    """Lanes of K in a row of the pool; as many hold V. Heads of up to 64 share one register of 128 lanes."""
    return LANES // 2 if head_dim <= LANES // 2 else -(-head_dim // LANES) * LANES


def pool_shape(
    num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int
) -> tuple[int, int, int, int]:
    """Shape of one layer's pool: [N, K, B, 2 · half_lanes(D)], a token's K and V side by side in its row."""
    return (num_blocks, num_kv_heads, block_size, 2 * half_lanes(head_dim))


def scales_shape(num_blocks: int, num_kv_heads: int, block_size: int) -> tuple[int, int, int, int]:
    """Shape of the scales of a quantized pool: [N, K, 2, B], tokens in the lanes as the scores have them. Blocks
    of fewer than 128 tokens leave lanes unused: a shorter array would be copied into a padded one in every step."""
    return (num_blocks, num_kv_heads, 2, max(block_size, LANES))


def pack_pool(pool: jax.Array) -> jax.Array:
    """[N, 2, K, B, D] → this kernel's layout; lanes beyond D are 0."""
    half = half_lanes(pool.shape[-1])
    padded = _pad_lanes(pool, half)
    return jnp.concatenate([padded[:, 0], padded[:, 1]], axis=-1)


def unpack_pool(pool: jax.Array, head_dim: int) -> jax.Array:
    """The inverse of `pack_pool`."""
    half = half_lanes(head_dim)
    return jnp.stack([pool[..., :head_dim], pool[..., half : half + head_dim]], axis=1)


def default_block_size(max_num_seqs: int, max_model_len: int) -> int:
    """128 tokens, or the smallest larger block with which all block tables fit in scalar memory.

    Raises:
        ValueError: not even 256 tokens are enough.
    """
    for block_size in (128, 256):
        if table_bytes(max_num_seqs, -(-max_model_len // block_size)) <= SMEM_TABLE_BYTES:
            return block_size
    raise ValueError(
        f"Block tables of {max_num_seqs} sequences of {max_model_len} tokens do not fit in a TPU's scalar memory "
        "even with blocks of 256 tokens: lower --max-num-seqs or --max-model-len."
    )


def table_bytes(max_num_seqs: int, max_blocks_per_seq: int) -> int:
    """What the block tables take in scalar memory."""
    return 4 * max_num_seqs * max_blocks_per_seq


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about one kernel that is known before the data is. Letters as in docs/architecture.md.

    Attributes:
        K: kv heads that one instance of the kernel handles; there are `num_instances`, one per TensorCore.
        G: query heads per kv head; Gp: the same, padded to whole tiles for single tokens.
        L: lanes of a row of the pool; Lk: of K (and of the queries); Lv: of V (and of the output).
        chunk: tokens of one step of the pipeline; unit: tokens of one DMA, at most a block.
        new_rows: tokens that the write of a prefill row moves at a time.
        Q: tokens of a query tile; head_group: kv heads that a query tile handles at a time.
        lead: padding in front of the new tokens, so that a window may begin before the first.
    """

    T: int
    S: int
    M: int
    B: int
    K: int
    G: int
    Gp: int
    L: int
    Lk: int
    Lv: int
    num_instances: int
    num_singles: int
    num_tiles: int
    chunk: int
    unit: int
    new_rows: int
    Q: int
    head_group: int
    lead: int
    kv_dtype: Any
    query_dtype: Any
    with_prefill: bool
    quantized: bool
    scale: float
    sliding_window: int | None
    soft_cap: float | None

    @property
    def compute_dtype(self) -> Any:
        wide = self.query_dtype == jnp.float32 or self.kv_dtype == jnp.float32
        return jnp.dtype(jnp.float32 if wide else jnp.bfloat16)

    @property
    def precision(self) -> lax.Precision:
        return lax.Precision.HIGHEST if self.compute_dtype == jnp.float32 else lax.Precision.DEFAULT

    @property
    def decode_tile(self) -> int:
        return min(self.chunk, DECODE_TILE)

    @property
    def window_rows(self) -> int:
        """Tokens that one insertion touches: a tile of registers."""
        return min(self.unit, SUBLANES * self.write_rows)

    @property
    def write_rows(self) -> int:
        """Tokens that share 32-bit words: the least that a DMA can write."""
        return 4 // self.kv_dtype.itemsize

    @property
    def values(self) -> slice:
        """Lanes of the V operand: all, where K and V share a register."""
        return slice(0, self.L) if self.Lv == self.L else slice(self.L - self.Lv, self.L)


def unsupported(
    queries: jax.Array,
    kv_pool: jax.Array | QuantizedPool,
    metadata: AttentionMetadata,
) -> str | None:
    """Why this kernel cannot do it, or None."""
    pool = kv_pool.values if isinstance(kv_pool, QuantizedPool) else kv_pool
    if pool.ndim != 4:
        return f"the pool has shape {pool.shape}; it must be [N, K, B, 2 · lanes] (pallas_tpu.pool_shape)"
    _, K, B, L = pool.shape
    H, D = queries.shape[1:]
    S, M = metadata.block_tables.shape
    if queries.dtype.name not in ("bfloat16", "float32"):
        return f"queries are {queries.dtype.name}, not bfloat16 or float32"
    if pool.dtype.name not in POOL_DTYPES:
        return f"the pool is {pool.dtype.name}, not one of {', '.join(POOL_DTYPES)}"
    if (pool.dtype.itemsize == 1) != isinstance(kv_pool, QuantizedPool):
        return f"a pool of {pool.dtype.name} {'needs' if pool.dtype.itemsize == 1 else 'takes no'} scales"
    if 2 * half_lanes(D) != L:
        return f"rows of the pool have {L} lanes; head_dim {D} takes {2 * half_lanes(D)}"
    if D > 2 * LANES:
        return f"head_dim {D} exceeds {2 * LANES}"
    if H % K:
        return f"{H} query heads are no multiple of {K} kv heads"
    if K > 16:
        return f"{K} kv heads exceed 16 (split them over chips)"
    if B not in (16, 32, 64, 128, 256):
        return f"block_size {B} is not one of 16, 32, 64, 128, 256"
    if table_bytes(S, M) > SMEM_TABLE_BYTES:
        return (
            f"block tables [{S}, {M}] take {table_bytes(S, M):,} B of scalar memory, more than {SMEM_TABLE_BYTES:,}: "
            "use larger blocks or fewer sequences"
        )
    return None


def make_plan(
    queries: jax.Array,
    kv_pool: jax.Array | QuantizedPool,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    decode_only: bool = False,
    num_cores: int = 1,
) -> Plan:
    """Tile sizes for these shapes; docs/kernels.md says why these."""
    quantized = isinstance(kv_pool, QuantizedPool)
    pool = kv_pool.values if isinstance(kv_pool, QuantizedPool) else kv_pool
    T, H, D = queries.shape
    _, K, B, L = pool.shape
    S, M = metadata.block_tables.shape
    num_instances = num_cores if K % num_cores == 0 else 1
    K //= num_instances
    G = H // (K * num_instances)
    half = half_lanes(D)
    packed = half < LANES
    row_bytes = K * L * pool.dtype.itemsize
    chunk = min(MAX_CHUNK, _floor_power_of_two(CHUNK_BYTES // row_bytes), _ceil_power_of_two(M * B))
    unit = min(B, chunk, LANES) if quantized else min(B, chunk)
    if quantized and unit < LANES:
        chunk = unit  # scales of several units side by side must fill whole registers
    query_tile = max(16, min(128, _floor_power_of_two(512 // G), _ceil_power_of_two(T)))
    head_group = max(h for h in range(1, K + 1) if K % h == 0 and (h == 1 or h * G * query_tile <= 1024))
    return Plan(
        T=T,
        S=S,
        M=M,
        B=B,
        K=K,
        G=G,
        Gp=-(-G // SUBLANES) * SUBLANES,
        L=L,
        Lk=L if packed else half,
        Lv=L if packed else half,
        num_instances=num_instances,
        num_singles=min(T, S),
        num_tiles=-(-T // query_tile),
        chunk=chunk,
        unit=unit,
        new_rows=max(SUBLANES, min(unit, LANES, _floor_power_of_two((512 << 10) // (K * L * 4)))),
        Q=query_tile,
        head_group=head_group,
        lead=LANES,
        kv_dtype=pool.dtype,
        query_dtype=queries.dtype,
        with_prefill=not decode_only,
        quantized=quantized,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
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
    rows = [_pad_lanes(x.astype(p.kv_dtype).astype(jnp.float32), p.L // 2) for x in (keys, values)]
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
    step = _Step(plan, SimpleNamespace(**dict(zip(names, refs, strict=True))), pl.program_id(0) * plan.K)
    if plan.with_prefill:
        step.write_prefill_rows()
        if plan.quantized:
            step.write_prefill_scales()
    step.attend_single_tokens()
    if plan.with_prefill:
        step.attend_tiles()


class _Step:
    """One instance's work: its kv heads begin at `first_head`."""

    def __init__(self, plan: Plan, refs: SimpleNamespace, first_head: jax.Array) -> None:
        self.plan = plan
        self.refs = refs
        self.heads = pl.ds(first_head, plan.K)
        self.first_head = first_head
        self.num_singles = refs.counts[0]
        self.num_rows = refs.counts[1]

    # -- scalars ------------------------------------------------------------------------------------------------

    def seq_len(self, row: jax.Array) -> jax.Array:
        return self.refs.seq_lens[
            jnp.minimum(row, self.plan.S - 1)
        ]  # a pipeline looks one row beyond the last

    def first_token(self, row: jax.Array) -> jax.Array:
        return self.refs.query_start_loc[jnp.minimum(row, self.plan.S)]

    def first_position(self, row: jax.Array) -> jax.Array:
        """Of the row's tokens in this step."""
        return self.seq_len(row) - (self.first_token(row + 1) - self.first_token(row))

    def context_start(self, position: jax.Array) -> jax.Array:
        """First position that a token at `position` sees, rounded down to a unit."""
        if self.plan.sliding_window is None:
            return jnp.int32(0)
        oldest = jnp.maximum(position - (self.plan.sliding_window - 1), 0)
        return _align(oldest, self.plan.unit)

    def block_of(self, row: jax.Array, position: jax.Array) -> jax.Array:
        index = jnp.minimum(row, self.plan.S - 1) * self.plan.M + _div(position, self.plan.B)
        return self.refs.block_tables[index]

    def offset_in_block(self, position: jax.Array, size: int) -> jax.Array | int:
        """Of a unit of `size` tokens that begins at `position`."""
        if size == self.plan.B:
            return 0
        return pl.multiple_of(_mod(position, self.plan.B), size)

    def scale_lanes(self, position: jax.Array) -> Any:
        """Where in its block the scales of a unit are that begins at `position`."""
        if self.plan.B <= LANES:
            return pl.ds(0, LANES)
        return pl.ds(pl.multiple_of(_mod(position, self.plan.B), LANES), LANES)

    # -- reading the pool ---------------------------------------------------------------------------------------

    def start_chunk(
        self, heads: Any, row: jax.Array, start: jax.Array, stop: jax.Array, slot: jax.Array
    ) -> None:
        self._for_each_piece(lambda copy: copy.start(), heads, row, start, stop, slot)

    def wait_chunk(
        self, heads: Any, row: jax.Array, start: jax.Array, stop: jax.Array, slot: jax.Array
    ) -> None:
        self._for_each_piece(_wait, heads, row, start, stop, slot)

    def _for_each_piece(
        self,
        act: Callable[[Any], None],
        heads: Any,
        row: jax.Array,
        start: jax.Array,
        stop: jax.Array,
        slot: jax.Array,
    ) -> None:
        """`act` on each DMA that brings positions start … min(stop, start + chunk) into kv[slot]: whole units, and
        the rest in pieces of powers of two, so that hardly more is read than is needed."""
        p, r = self.plan, self.refs
        sem = r.kv_sem.at[slot]
        needed = jnp.clip(stop - start, 0, p.chunk)
        full = _div(needed, p.unit)

        def piece(unit: jax.Array, offset: jax.Array | int, size: int) -> None:
            position = start + unit * p.unit
            source = self.offset_in_block(position, p.unit) + offset
            target = pl.multiple_of(unit * p.unit + offset, size)
            source = source if isinstance(source, int) else pl.multiple_of(source, size)
            act(
                pltpu.make_async_copy(
                    r.pool.at[self.block_of(row, position), heads, pl.ds(source, size)],
                    r.kv.at[slot, pl.ds(0, heads.size), pl.ds(target, size)],
                    sem,
                )
            )

        def whole_unit(unit: jax.Array, _: None) -> None:
            piece(unit, 0, p.unit)

        lax.fori_loop(0, full, whole_unit, None)
        rest = _align(needed - full * p.unit + (READ_ROWS - 1), READ_ROWS)
        size = p.unit
        while size >= READ_ROWS:

            @pl.when((rest & size) != 0)
            def _(size: int = size) -> None:
                piece(full, 0 if size == p.unit else rest & ~(2 * size - 1), size)

            size //= 2
        if p.quantized:

            def scales(unit: jax.Array, _: None) -> None:
                position = start + unit * p.unit
                act(
                    pltpu.make_async_copy(
                        r.scales.at[self.block_of(row, position), heads, :, self.scale_lanes(position)],
                        r.kv_scales.at[slot, unit, pl.ds(0, heads.size)],
                        sem,
                    )
                )

            lax.fori_loop(0, _div(needed + p.unit - 1, p.unit), scales, None)

    def clear_from(self, slot: jax.Array, num_heads: int, first: jax.Array, stop: int | jax.Array) -> None:
        """Zero kv[slot] from token `first` to `stop`, a multiple of a window: nothing that was not written may reach
        a product, for 0 · NaN is NaN."""
        rows = self.plan.window_rows
        zeros = jnp.zeros((num_heads, rows, self.plan.L), self.plan.kv_dtype)
        window = _div(first, rows)

        @pl.when(_mod(first, rows) != 0)
        def _() -> None:
            span = pl.ds(pl.multiple_of(window * rows, rows), rows)
            old = self.refs.kv[slot, pl.ds(0, num_heads), span]
            keep = window * rows + _iota(old.shape, 1) < first
            self.refs.kv[slot, pl.ds(0, num_heads), span] = _select(keep, old, zeros)

        def clear(window: jax.Array, _: None) -> None:
            span = pl.ds(pl.multiple_of(window * rows, rows), rows)
            self.refs.kv[slot, pl.ds(0, num_heads), span] = zeros

        lax.fori_loop(_div(first + rows - 1, rows), _div(stop, rows), clear, None)

    def scale_rows(
        self, slot: jax.Array, first_unit: Any, num_units: int, heads: Any
    ) -> tuple[jax.Array, ...]:
        """Scales of K and of V, [heads, 1, tokens] each."""
        unit = self.plan.unit
        units = [self.refs.kv_scales[slot, first_unit + i, heads][..., :unit] for i in range(num_units)]
        scales = units[0] if num_units == 1 else jnp.concatenate(units, axis=-1)
        return scales[:, :1], scales[:, 1:]

    # -- rows of one token --------------------------------------------------------------------------------------

    def attend_single_tokens(self) -> None:
        p, r = self.plan, self.refs

        def chunks(row: jax.Array) -> tuple[jax.Array, jax.Array]:
            """(first position, number of chunks)"""
            first = self.context_start(self.seq_len(row) - 1)
            return first, _div(self.seq_len(row) - first + p.chunk - 1, p.chunk)

        def advance(item: Item) -> Item:
            row, chunk = item
            more = chunk + 1 < chunks(row)[1]
            return jnp.where(more, row, row + 1), jnp.where(more, chunk + 1, 0)

        def copies(item: Item) -> tuple[Any, list[Any]]:
            """(is it the row's last chunk, DMAs of its new K and V)"""
            row, chunk = item
            slot = row & 1
            new = [(r.new.at[self.heads, pl.ds(row + p.lead, 1)], r.new_row.at[slot, :, pl.ds(0, 1)])]
            if p.quantized:
                window = pl.ds(pl.multiple_of(_align(row + p.lead, LANES), LANES), LANES)
                new.append((r.new_scales.at[self.heads, :, window], r.new_scale.at[slot]))
            last = chunk + 1 == chunks(row)[1]
            return last, [functools.partial(pltpu.make_async_copy, s, d, r.new_sem.at[slot]) for s, d in new]

        def query_copy(row: jax.Array) -> Any:
            return pltpu.make_async_copy(r.q_single.at[row, self.heads], r.q.at[row & 1], r.q_sem.at[row & 1])

        def prefetch(item: Item, slot: jax.Array) -> None:
            row, chunk = item
            start = chunks(row)[0] + chunk * p.chunk
            self.start_chunk(self.heads, row, start, self.seq_len(row) - 1, slot)
            pl.when(chunk == 0)(lambda: query_copy(row).start())
            last, new = copies(item)

            @pl.when(last)
            def _() -> None:
                for copy in new:
                    copy().start()

        def consume(item: Item, slot: jax.Array) -> None:
            row, chunk = item
            start = chunks(row)[0] + chunk * p.chunk
            self.wait_chunk(self.heads, row, start, self.seq_len(row) - 1, slot)

            @pl.when(chunk == 0)
            def _() -> None:
                query_copy(row).wait()
                r.peak[...] = jnp.full(r.peak.shape, MASKED, jnp.float32)
                r.total[...] = jnp.zeros(r.total.shape, jnp.float32)
                r.acc[...] = jnp.zeros(r.acc.shape, jnp.float32)

            last, new = copies(item)

            @pl.when(last)
            def _() -> None:
                for copy in new:
                    copy().wait()
                self._insert(row, start, slot)

            self._update_single(row, start, slot)
            pl.when(last)(lambda: self._finish_single(row))

        _pipeline(
            (jnp.int32(0), jnp.int32(0)), lambda item: item[0] < self.num_singles, advance, prefetch, consume
        )
        for back in (2, 1):
            row = self.num_singles - back

            @pl.when(row >= 0)
            def _(row: jax.Array = row) -> None:
                self._wait_written(row & 1)
                self._out_copy(row).wait()

    def _insert(self, row: jax.Array, start: jax.Array, slot: jax.Array) -> None:
        """Put the row's new K and V into its last chunk, clear what follows, and write them to the pool."""
        p, r = self.plan, self.refs
        parity = row & 1
        position = self.seq_len(row) - 1
        local = position - start
        rows = p.window_rows
        window = pl.multiple_of(_align(local, rows), rows)
        old = r.kv[slot, :, pl.ds(window, rows)]
        new = r.new_row[parity, :, :1]
        at = window + _iota(old.shape, 1)
        fresh = _from_float32(
            jnp.where(at == local, new, jnp.where(at < local, _to_float32(old), 0.0)), p.kv_dtype
        )
        r.kv[slot, :, pl.ds(window, rows)] = fresh
        tile_end = _align(local, p.decode_tile) + p.decode_tile
        self.clear_from(slot, p.K, window + rows, tile_end)
        pl.when(row >= 2)(lambda: self._wait_written(parity))
        r.stage[parity] = fresh
        if p.quantized:
            self._insert_scales(row, local, slot)
        for copy in self._write_copies(
            parity, self.block_of(row, position), _mod(position, p.B), _mod(local, rows)
        ):
            copy.start()

    def _insert_scales(self, row: jax.Array, local: jax.Array, slot: jax.Array) -> None:
        p, r = self.plan, self.refs
        unit, at = _div(local, p.unit), _mod(local, p.unit)
        lane = _mod(row + p.lead, LANES)
        shifted = pltpu.roll(r.new_scale[row & 1], _mod(at - lane, LANES), 2)
        old = r.kv_scales[slot, unit]
        lanes = _iota(old.shape, 2)
        scales = jnp.where(lanes == at, shifted, jnp.where(lanes < at, old, 0.0))
        r.kv_scales[slot, unit] = scales
        r.stage_scales[row & 1] = scales

    def _write_copies(self, parity: jax.Array, block: Any, offset: Any, staged: Any) -> list[Any]:
        """DMAs of the words that hold one token: from row `staged` of the stage to `offset` in the block."""
        p, r = self.plan, self.refs
        rows = p.write_rows
        copies = [
            pltpu.make_async_copy(
                r.stage.at[parity, :, pl.ds(pl.multiple_of(_align(staged, rows), rows), rows)],
                r.pool.at[block, self.heads, pl.ds(pl.multiple_of(_align(offset, rows), rows), rows)],
                r.write_sem.at[parity],
            )
        ]
        if p.quantized:
            span = self.scale_lanes(_align(offset, p.unit))
            copies.append(
                pltpu.make_async_copy(
                    r.stage_scales.at[parity],
                    r.scales.at[block, self.heads, :, span],
                    r.write_sem.at[parity],
                )
            )
        return copies

    def _wait_written(self, parity: jax.Array) -> None:
        zero = jnp.int32(0)  # a wait needs the size only
        for copy in self._write_copies(parity, zero, zero, zero):
            copy.wait()

    def _update_single(self, row: jax.Array, start: jax.Array, slot: jax.Array) -> None:
        """One softmax update per decode tile of the chunk, all heads at once."""
        p, r = self.plan, self.refs
        seq_len = self.seq_len(row)
        queries = r.q[row & 1].astype(p.compute_dtype)

        def update(tile: jax.Array, _: None) -> None:
            span = pl.ds(pl.multiple_of(tile * p.decode_tile, p.decode_tile), p.decode_tile)
            keys = _convert(r.kv[slot, :, span, pl.ds(0, p.Lk)], p.compute_dtype)
            scores = _batched_dot(queries, keys, 2, p.precision)
            units = p.decode_tile // p.unit if p.quantized else 0
            scales = self.scale_rows(slot, tile * units, units, pl.ds(0, p.K)) if p.quantized else None
            kv_positions = start + tile * p.decode_tile + _iota((1, 1, p.decode_tile), 2)
            visible = _visible(kv_positions, seq_len - 1, p.sliding_window)
            values = _convert(r.kv[slot, :, span, p.values], p.compute_dtype)
            state = (r.peak[...], r.total[...], r.acc[...])
            product = functools.partial(_batched_dot, axis=1, precision=p.precision)
            r.peak[...], r.total[...], r.acc[...] = _softmax_update(
                p, scores, visible, values, scales, state, product
            )

        in_chunk = jnp.minimum(seq_len - start, p.chunk)
        lax.fori_loop(0, _div(in_chunk + p.decode_tile - 1, p.decode_tile), update, None)

    def _finish_single(self, row: jax.Array) -> None:
        r = self.refs
        pl.when(row >= 2)(lambda: self._out_copy(row).wait())
        r.out[row & 1] = _normalize(r.acc[...], r.total[..., :1]).astype(self.plan.query_dtype)
        self._out_copy(row).start()

    def _out_copy(self, row: jax.Array) -> Any:
        r = self.refs
        return pltpu.make_async_copy(
            r.out.at[row & 1], r.out_single.at[row, self.heads], r.out_sem.at[row & 1]
        )

    # -- rows of several tokens: writing ------------------------------------------------------------------------

    def _for_each_window(
        self,
        size: int,
        new_copy: Callable[[Item, jax.Array], Any],
        old_copy: Callable[[Item, jax.Array], Any],
        out_copy: Callable[[Item, jax.Array], Any],
        combine: Callable[[Item, jax.Array], None],
    ) -> None:
        """Double-buffered read, combine and write of every window of `size` positions that gets new tokens. What is
        there already is read only if there is something to keep. Items are (row, window, ordinal)."""

        def span(row: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _div(self.first_position(row), size), _div(self.seq_len(row) - 1, size)

        def advance(item: Item) -> Item:
            row, window, ordinal = item
            more = window < span(row)[1]
            return jnp.where(more, row, row + 1), jnp.where(more, window + 1, span(row + 1)[0]), ordinal + 1

        def keeps(item: Item) -> jax.Array:
            return item[1] * size < self.first_position(item[0])

        def prefetch(item: Item, slot: jax.Array) -> None:
            pl.when(item[2] >= 2)(lambda: out_copy(item, slot).wait())  # the slot's last write
            new_copy(item, slot).start()
            pl.when(keeps(item))(lambda: old_copy(item, slot).start())

        def consume(item: Item, slot: jax.Array) -> None:
            new_copy(item, slot).wait()
            pl.when(keeps(item))(lambda: old_copy(item, slot).wait())
            combine(item, slot)
            out_copy(item, slot).start()

        first = (self.num_singles, span(self.num_singles)[0], jnp.int32(0))
        end = _pipeline(first, lambda item: item[0] < self.num_rows, advance, prefetch, consume)
        for back in (2, 1):
            ordinal = end[2] - back

            @pl.when(ordinal >= 0)
            def _(ordinal: jax.Array = ordinal) -> None:
                out_copy((self.num_singles, jnp.int32(0), ordinal), ordinal & 1).wait()

    def _window_place(self, item: Item, size: int) -> tuple[jax.Array, Any]:
        """(block, span in the block) of a window."""
        row, window, _ = item
        base = window * size
        return self.block_of(row, base), pl.ds(self.offset_in_block(base, size), size)

    def write_prefill_rows(self) -> None:
        p, r = self.plan, self.refs
        size = p.new_rows

        def first_new(row: jax.Array, base: jax.Array) -> jax.Array:
            """Where the new rows begin that belong to positions from `base` on."""
            return self.first_token(row) + base - self.first_position(row) + p.lead

        def new_copy(item: Item, slot: jax.Array) -> Any:
            base = item[1] * size
            first = pl.multiple_of(_align(first_new(item[0], base), SUBLANES), SUBLANES)
            source = r.new.at[self.heads, pl.ds(first, size + SUBLANES)]
            return pltpu.make_async_copy(source, r.fresh.at[slot], r.kv_sem.at[slot])

        def old_copy(item: Item, slot: jax.Array) -> Any:
            block, span = self._window_place(item, size)
            target = r.kv.at[slot, :, pl.ds(0, size)]
            return pltpu.make_async_copy(r.pool.at[block, self.heads, span], target, r.kv_sem.at[slot])

        def out_copy(item: Item, slot: jax.Array) -> Any:
            block, span = self._window_place(item, size)
            source = r.kv.at[slot, :, pl.ds(0, size)]
            return pltpu.make_async_copy(source, r.pool.at[block, self.heads, span], r.write_sem.at[slot])

        def combine(item: Item, slot: jax.Array) -> None:
            row, window, _ = item
            old = _to_float32(r.kv[slot, :, pl.ds(0, size)])
            at = window * size + _iota(old.shape, 1)
            back = size + SUBLANES - _mod(first_new(row, window * size), SUBLANES)  # a whole turn is none
            fresh = pltpu.roll(r.fresh[slot], back, 1)[:, :size]
            new = jnp.where(at < self.seq_len(row), fresh, 0.0)
            merged = jnp.where(at < self.first_position(row), old, new)
            r.kv[slot, :, pl.ds(0, size)] = _from_float32(merged, p.kv_dtype)

        self._for_each_window(size, new_copy, old_copy, out_copy, combine)

    def write_prefill_scales(self) -> None:
        p, r = self.plan, self.refs

        def first_lane(item: Item) -> jax.Array:
            row, window, _ = item
            return self.first_token(row) + window * p.unit - self.first_position(row) + p.lead

        def place(item: Item) -> tuple[Any, ...]:
            base = item[1] * p.unit
            return self.block_of(item[0], base), self.heads, slice(None), self.scale_lanes(base)

        def new_copy(item: Item, slot: jax.Array) -> Any:
            lanes = pl.ds(pl.multiple_of(_align(first_lane(item), LANES), LANES), 2 * LANES)
            source = r.new_scales.at[self.heads, :, lanes]
            return pltpu.make_async_copy(source, r.fresh_scales.at[slot], r.kv_sem.at[slot])

        def old_copy(item: Item, slot: jax.Array) -> Any:
            source = r.scales.at[place(item)]
            return pltpu.make_async_copy(source, r.stage_scales.at[slot], r.kv_sem.at[slot])

        def out_copy(item: Item, slot: jax.Array) -> Any:
            target = r.scales.at[place(item)]
            return pltpu.make_async_copy(r.stage_scales.at[slot], target, r.write_sem.at[slot])

        def combine(item: Item, slot: jax.Array) -> None:
            row, window, _ = item
            back = _mod(-_mod(first_lane(item), LANES), 2 * LANES)
            shifted = pltpu.roll(r.fresh_scales[slot], back, 2)[..., :LANES]
            old = r.stage_scales[slot]
            at = window * p.unit + _iota(old.shape, 2)
            new = jnp.where(at < self.seq_len(row), shifted, 0.0)
            r.stage_scales[slot] = jnp.where(at < self.first_position(row), old, new)

        self._for_each_window(p.unit, new_copy, old_copy, out_copy, combine)

    # -- rows of several tokens: attention ----------------------------------------------------------------------

    def attend_tiles(self) -> None:
        """Items are (head group, row, tile, chunk, ordinal of the tile)."""
        p, r = self.plan, self.refs
        num_groups = p.K // p.head_group

        def heads(group: jax.Array) -> Any:
            return pl.ds(self.first_head + group * p.head_group, p.head_group)

        def part(row: jax.Array, tile: jax.Array) -> tuple[jax.Array, ...]:
            """(first position that is seen, position behind the last, chunks) of a row's tokens in a tile."""
            to_position = self.seq_len(row) - self.first_token(row + 1)
            first = jnp.maximum(self.first_token(row), tile * p.Q) + to_position
            stop = jnp.minimum(self.first_token(row + 1), (tile + 1) * p.Q) + to_position
            start = self.context_start(first)
            return start, stop, _div(stop - start + p.chunk - 1, p.chunk)

        def opens(item: Item) -> jax.Array:
            """Is it the first item of its tile?"""
            _, row, tile, chunk, _ = item
            return (chunk == 0) & ((row == self.num_singles) | (self.first_token(row) <= tile * p.Q))

        def closes(item: Item) -> jax.Array:
            _, row, tile, chunk, _ = item
            end = (self.first_token(row + 1) >= (tile + 1) * p.Q) | (row + 1 == self.num_rows)
            return (chunk + 1 == part(row, tile)[2]) & end

        first_row = self.num_singles
        first_tile = _div(self.first_token(first_row), p.Q)

        def advance(item: Item) -> Item:
            group, row, tile, chunk, ordinal = item
            more_chunks = chunk + 1 < part(row, tile)[2]
            more_tiles = tile < _div(self.first_token(row + 1) - 1, p.Q)
            more_rows = row + 1 < self.num_rows
            next_row = jnp.where(more_tiles, row, jnp.where(more_rows, row + 1, first_row))
            row_tile = jnp.where(more_rows, _div(self.first_token(row + 1), p.Q), first_tile)
            next_tile = jnp.where(more_tiles, tile + 1, row_tile)
            next_group = jnp.where(more_tiles | more_rows, group, group + 1)
            new_tile = (next_tile != tile) | (next_group != group)
            return (
                jnp.where(more_chunks, group, next_group),
                jnp.where(more_chunks, row, next_row),
                jnp.where(more_chunks, tile, next_tile),
                jnp.where(more_chunks, chunk + 1, 0),
                jnp.where(more_chunks | ~new_tile, ordinal, ordinal + 1),
            )

        def query_copy(item: Item) -> Any:
            group, _, tile, _, ordinal = item
            slot = ordinal & 1
            return pltpu.make_async_copy(
                r.q_tiled.at[tile, heads(group)], r.tile_q.at[slot], r.q_sem.at[slot]
            )

        def out_copy(group: jax.Array, tile: jax.Array, ordinal: jax.Array) -> Any:
            slot = ordinal & 1
            return pltpu.make_async_copy(
                r.tile_out.at[slot], r.out_tiled.at[tile, heads(group)], r.out_sem.at[slot]
            )

        def chunk_of(item: Item) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
            group, row, tile, chunk, _ = item
            start, stop, _ = part(row, tile)
            return heads(group), row, start + chunk * p.chunk, stop

        def prefetch(item: Item, slot: jax.Array) -> None:
            self.start_chunk(*chunk_of(item), slot)
            pl.when(opens(item))(lambda: query_copy(item).start())

        def consume(item: Item, slot: jax.Array) -> None:
            group, row, tile, ordinal = item[0], item[1], item[2], item[4]
            start, stop = chunk_of(item)[2:]
            self.wait_chunk(*chunk_of(item), slot)

            @pl.when(opens(item))
            def _() -> None:
                query_copy(item).wait()
                r.tile_peak[...] = jnp.full(r.tile_peak.shape, MASKED, jnp.float32)
                r.tile_total[...] = jnp.zeros(r.tile_total.shape, jnp.float32)
                r.tile_acc[...] = jnp.zeros(r.tile_acc.shape, jnp.float32)

            pl.when(start + p.chunk > stop)(
                lambda: self.clear_from(slot, p.head_group, stop - start, p.chunk)
            )
            self._update_tile(row, tile, ordinal & 1, start, slot)

            @pl.when(closes(item))
            def _() -> None:
                pl.when(ordinal >= 2)(lambda: out_copy(group, tile, ordinal).wait())

                def finish(head: jax.Array, _: None) -> None:
                    out = _normalize(r.tile_acc[head], r.tile_total[head, :, :1])
                    r.tile_out[ordinal & 1, head] = out.astype(p.query_dtype)

                lax.fori_loop(0, p.head_group, finish, None)
                out_copy(group, tile, ordinal).start()

        zero = jnp.int32(0)
        first_group = jnp.where(self.num_singles < self.num_rows, 0, num_groups).astype(jnp.int32)
        first = (first_group, first_row, first_tile, zero, zero)
        end = _pipeline(first, lambda item: item[0] < num_groups, advance, prefetch, consume)
        for back in (2, 1):
            ordinal = end[4] - back

            @pl.when(ordinal >= 0)
            def _(ordinal: jax.Array = ordinal) -> None:
                out_copy(zero, zero, ordinal).wait()

    def _update_tile(
        self, row: jax.Array, tile: jax.Array, parity: jax.Array, start: jax.Array, slot: jax.Array
    ) -> None:
        """One softmax update of a query tile with one chunk, head by head."""
        p, r = self.plan, self.refs
        token = tile * p.Q + (_iota((p.G * p.Q, 1), 0) & (p.Q - 1))
        own = (token >= self.first_token(row)) & (token < self.first_token(row + 1))
        q_positions = token + (self.seq_len(row) - self.first_token(row + 1))
        kv_positions = start + _iota((1, p.chunk), 1)
        visible = own & _visible(kv_positions, q_positions, p.sliding_window)

        def update(head: jax.Array, _: None) -> None:
            queries = r.tile_q[parity, head].astype(p.compute_dtype)
            keys = _convert(r.kv[slot, head, :, pl.ds(0, p.Lk)], p.compute_dtype)
            scores = _dot(queries, keys, 1, p.precision)
            units = p.chunk // p.unit
            scales = None
            if p.quantized:
                scales = tuple(x[0] for x in self.scale_rows(slot, 0, units, pl.ds(head, 1)))
            values = _convert(r.kv[slot, head, :, p.values], p.compute_dtype)
            state = (r.tile_peak[head], r.tile_total[head], r.tile_acc[head])
            product = functools.partial(_dot, axis=0, precision=p.precision)
            r.tile_peak[head], r.tile_total[head], r.tile_acc[head] = _softmax_update(
                p, scores, visible, values, scales, state, product
            )

        lax.fori_loop(0, p.head_group, update, None)


# -- arithmetic -------------------------------------------------------------------------------------------------


def _softmax_update(
    plan: Plan,
    scores: jax.Array,
    visible: jax.Array,
    values: jax.Array,
    scales: tuple[jax.Array, ...] | None,
    state: tuple[jax.Array, jax.Array, jax.Array],
    product: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """FlashAttention's update of (peak, total, accumulator) with one tile of scores [..., queries, tokens]."""
    peak, total, acc = state
    scores = scores * plan.scale
    if scales is not None:
        scores = scores * scales[0]
    if plan.soft_cap is not None:
        scores = plan.soft_cap * jnp.tanh(scores / plan.soft_cap)
    scores = jnp.where(visible, scores, MASKED)
    new_peak = jnp.maximum(peak[..., :1], jnp.max(scores, axis=-1, keepdims=True))
    rescale = jnp.exp(peak[..., :1] - new_peak)
    weights = jnp.where(visible, jnp.exp(scores - new_peak), 0.0)
    new_total = total[..., :1] * rescale + jnp.sum(weights, axis=-1, keepdims=True)
    if scales is not None:
        weights = jnp.where(visible, weights * scales[1], 0.0)
    acc = acc * rescale + product(weights.astype(values.dtype), values)
    return jnp.broadcast_to(new_peak, peak.shape), jnp.broadcast_to(new_total, total.shape), acc


def _visible(kv_positions: jax.Array, q_positions: jax.Array, sliding_window: int | None) -> jax.Array:
    visible = kv_positions <= q_positions
    if sliding_window is not None:
        visible &= kv_positions > q_positions - sliding_window
    return visible


def _normalize(acc: jax.Array, total: jax.Array) -> jax.Array:
    return acc / jnp.where(total > 0, total, 1.0)


def _dot(a: jax.Array, b: jax.Array, axis: int, precision: lax.Precision) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision, preferred_element_type=jnp.float32)


def _batched_dot(a: jax.Array, b: jax.Array, axis: int, precision: lax.Precision) -> jax.Array:
    return lax.dot_general(
        a, b, (((2,), (axis,)), ((0,), (0,))), precision, preferred_element_type=jnp.float32
    )


def _to_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int32).astype(jnp.float32) if x.dtype == jnp.int8 else x.astype(jnp.float32)


def _from_float32(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(jnp.int32).astype(jnp.int8) if dtype == jnp.int8 else x.astype(dtype)


def _convert(x: jax.Array, dtype: Any) -> jax.Array:
    """What is stored in a pool as an operand of the matrix unit."""
    return x if x.dtype == dtype else _to_float32(x).astype(dtype)


def _select(mask: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """In 32 bits: masks of packed dtypes do not exist on every chip."""
    return _from_float32(jnp.where(mask, _to_float32(a), _to_float32(b)), a.dtype)


# -- small things -----------------------------------------------------------------------------------------------


def _pipeline(
    first: Item,
    alive: Callable[[Item], jax.Array],
    advance: Callable[[Item], Item],
    prefetch: Callable[[Item, jax.Array], None],
    consume: Callable[[Item, jax.Array], None],
) -> Item:
    """Work through items with two buffers: while one is used, the next is on its way. Returns the item that is no
    longer alive."""
    pl.when(alive(first))(lambda: prefetch(first, jnp.int32(0)))

    def body(carry: tuple[Item, jax.Array]) -> tuple[Item, jax.Array]:
        item, slot = carry
        following = advance(item)
        pl.when(alive(following))(lambda: prefetch(following, 1 - slot))
        consume(item, slot)
        return following, 1 - slot

    return lax.while_loop(lambda carry: alive(carry[0]), body, (first, jnp.int32(0)))[0]


def _wait(copy: Any) -> None:
    copy.wait()


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _pad_lanes(x: jax.Array, lanes: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lanes - x.shape[-1])])


# Sizes are powers of two: shifts and masks, where a division would be a dozen scalar instructions.


def _div(x: Any, n: int) -> Any:
    return (
        lax.shift_right_arithmetic(x, jnp.int32(n.bit_length() - 1)) if isinstance(x, jax.Array) else x // n
    )


def _mod(x: jax.Array, n: int) -> jax.Array:
    return x & (n - 1)


def _align(x: jax.Array, n: int) -> jax.Array:
    return x & ~(n - 1)


def _floor_power_of_two(x: int) -> int:
    return 1 << (max(x, 1).bit_length() - 1)


def _ceil_power_of_two(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()
