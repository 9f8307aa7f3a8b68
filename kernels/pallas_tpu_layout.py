"""How the TPU kernel lays out the pool, what it can do, and its tile sizes: all that is known before the data is.

docs/kernels.md draws the layouts and gives the reasons. Nothing here needs Pallas, which takes a while to import.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels.metadata import AttentionMetadata
from jaxserve.kernels.reference import QuantizedPool

LANES = 128  # of a vector register
SUBLANES = 8
CHUNK_BYTES = (
    2 << 20
)  # of K and V in flight while another chunk is used: more than bandwidth × latency of any chip
MAX_CHUNK = 512  # tokens
DECODE_TILE = 256  # tokens of one softmax update of the decode path
SMEM_TABLE_BYTES = 768 << 10  # of 1 MiB scalar memory, for the block tables
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
    padded = pad_lanes(pool, half)
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
    chunk = min(MAX_CHUNK, floor_power_of_two(CHUNK_BYTES // row_bytes), ceil_power_of_two(M * B))
    unit = min(B, chunk, LANES) if quantized else min(B, chunk)
    if quantized and unit < LANES:
        chunk = unit  # scales of several units side by side must fill whole registers
    query_tile = max(16, min(128, floor_power_of_two(512 // G), ceil_power_of_two(T)))
    large = half > LANES and jnp.float32 in (queries.dtype, pool.dtype)
    most_rows = 512 if large else 1024  # 1,024 of 1 KiB leave v5e's compiler too little room to spill
    head_group = max(h for h in range(1, K + 1) if K % h == 0 and (h == 1 or h * G * query_tile <= most_rows))
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
        new_rows=max(SUBLANES, min(unit, LANES, floor_power_of_two((512 << 10) // (K * L * 4)))),
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


def pad_lanes(x: jax.Array, lanes: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lanes - x.shape[-1])])


def floor_power_of_two(x: int) -> int:
    return 1 << (max(x, 1).bit_length() - 1)


def ceil_power_of_two(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()
