"""The public operation: write this step's K and V into the pool, then attend over it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels import blocked_attention, lanes, pallas_tpu_layout, reference
from jaxserve.kernels.blocked_attention import kv_dtype, reinterpret, storage_dtype
from jaxserve.kernels.metadata import AttentionMetadata
from jaxserve.kernels.reference import QuantizedPool


class Request(NamedTuple):
    """What is asked for: everything that a backend may refuse."""

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    kv_pool: jax.Array | QuantizedPool
    metadata: AttentionMetadata
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    decode_only: bool

    @property
    def pool_values(self) -> jax.Array:
        return self.kv_pool.values if isinstance(self.kv_pool, QuantizedPool) else self.kv_pool


class PoolShape(NamedTuple):
    """A pool, however a backend lays it out.

    Attributes:
        dtype: of K and V; one of 8 bits makes it a QuantizedPool.
    """

    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: jnp.dtype


class ServingShape(NamedTuple):
    """What the largest serving step asks for: everything that matters for the choice of a backend."""

    num_tokens: int
    num_seqs: int
    blocks_per_seq: int
    num_heads: int
    dtype: jnp.dtype
    pool: PoolShape
    sliding_window: int | None = None
    soft_cap: float | None = None


def _all_blocks(pool: jax.ShapeDtypeStruct) -> int:
    return int(pool.shape[0])


class Backend(NamedTuple):
    """One implementation.

    Attributes:
        platforms: where `auto` takes it; empty: only where it is named.
        unsupported: why it cannot do a request, or None.
        run: does it.
        pool: its layout of a pool on a platform, as jax.ShapeDtypeStruct.
        reachable_blocks: how many of a pool's blocks it reaches, given its K and V, [N, …].
        rows_meet: whether a row sees what rows before it write, in the same step, into blocks of both.
    """

    platforms: tuple[str, ...]
    unsupported: Callable[[Request, str], str | None]
    run: Callable[[Request], tuple[jax.Array, jax.Array | QuantizedPool]]
    pool: Callable[[PoolShape, str], jax.Array | QuantizedPool]
    reachable_blocks: Callable[[jax.ShapeDtypeStruct], int] = _all_blocks
    rows_meet: bool = True


def _struct(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _plain_pool(shape: PoolShape, platform: str) -> jax.Array | QuantizedPool:
    """[N, 2, K, B, D]; scales [N, 2, K, B]."""
    return _pool_of(
        (shape.num_blocks, 2, shape.num_kv_heads, shape.block_size, shape.head_dim), shape, platform
    )


def _blocked_pool(shape: PoolShape, platform: str) -> jax.Array | QuantizedPool:
    """[N, 2, K, B · D]; scales and dtype as in `_plain_pool`."""
    return _pool_of(blocked_attention.pool_shape(*shape[:4]), shape, platform)


def _pool_of(layout: tuple[int, ...], shape: PoolShape, platform: str) -> jax.Array | QuantizedPool:
    # on CPU small floats are kept as their bits: blocked_attention says why
    values = _struct(layout, storage_dtype(shape.dtype) if platform == "cpu" else shape.dtype)
    if values.dtype.itemsize == 1:
        return QuantizedPool(values, _struct((*layout[:3], shape.block_size), jnp.float32))
    return values


def _pallas_tpu_pool(shape: PoolShape, _: str) -> jax.Array | QuantizedPool:
    N, K, B, D, dtype = shape
    values = _struct(pallas_tpu_layout.pool_shape(N, K, B, D), dtype)
    if dtype.itemsize == 1:
        return QuantizedPool(values, _struct(pallas_tpu_layout.scales_shape(N, K, B), jnp.float32))
    return values


def _unsupported_by_pallas_tpu(request: Request, platform: str) -> str | None:
    if platform != "tpu":
        return f"it runs on TPU, this is {platform}"
    return pallas_tpu_layout.unsupported(request.queries, request.kv_pool, request.metadata)


def _run_kernel(
    attend: Callable[..., tuple[jax.Array, jax.Array | QuantizedPool]], r: Request
) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    return attend(
        r.queries,
        r.keys,
        r.values,
        r.kv_pool,
        r.metadata,
        scale=r.scale,
        sliding_window=r.sliding_window,
        soft_cap=r.soft_cap,
        decode_only=r.decode_only,
    )


def _run_pallas_tpu(r: Request) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    from jaxserve.kernels import pallas_tpu  # where it runs: importing Pallas takes a while

    return _run_kernel(pallas_tpu.paged_attention, r)


def _unsupported_by_pallas_triton(request: Request, platform: str) -> str | None:
    if platform != "gpu":
        return f"it runs on GPU, this is {platform}"
    from jaxserve.kernels import pallas_triton

    return pallas_triton.unsupported(request.queries, request.kv_pool)


def _reachable_by_pallas_triton(pool: jax.ShapeDtypeStruct) -> int:
    from jaxserve.kernels import pallas_triton

    return pallas_triton.reachable_blocks(pool)


def _run_pallas_triton(r: Request) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    from jaxserve.kernels import pallas_triton

    return _run_kernel(pallas_triton.paged_attention, r)


def _unsupported_by_mosaic_gpu(request: Request, platform: str) -> str | None:
    if platform != "gpu":
        return f"it runs on GPU, this is {platform}"
    if (capability := _compute_capability()) is not None and not capability.startswith("9."):
        return f"it runs on Hopper, whose compute capability is 9.0; here it is {capability}"
    from jaxserve.kernels import pallas_mosaic_gpu

    return pallas_mosaic_gpu.unsupported(request.queries, request.kv_pool)


def _compute_capability() -> str | None:
    """Of the GPU at hand; None: what is compiled for is not at hand."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return None
    return getattr(jax.devices()[0], "compute_capability", None)


def _run_mosaic_gpu(r: Request) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    from jaxserve.kernels import pallas_mosaic_gpu

    return _run_kernel(pallas_mosaic_gpu.paged_attention, r)


def _unsupported_by_blocked(request: Request, _: str) -> str | None:
    if request.soft_cap is not None:
        return "it has no soft cap"
    T, group = request.queries.shape[0], lanes.TOKEN_GROUP
    if group < T and T % group:
        return f"{T} tokens are neither at most {group} nor a multiple of it"
    pool = request.pool_values
    K, D = request.keys.shape[1:]
    if pool.ndim != 4 or pool.shape[1:3] != (2, K) or pool.shape[3] % D:
        return f"the pool has shape {pool.shape}; it must be [N, 2, {K}, B · {D}]"
    return _wrong_scales(request)


def _wrong_scales(request: Request) -> str | None:
    dtype = kv_dtype(request.pool_values.dtype)
    if (dtype.itemsize == 1) != isinstance(request.kv_pool, QuantizedPool):
        return f"a pool of {dtype.name} {'needs' if dtype.itemsize == 1 else 'takes no'} scales"
    return None


def _run_blocked(r: Request) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    num_tokens = r.metadata.query_start_loc[-1]
    pool = blocked_attention.write_kv(r.kv_pool, r.keys, r.values, r.metadata.slot_mapping, num_tokens)
    out = blocked_attention.paged_attention(
        r.queries, pool, r.metadata, scale=r.scale, sliding_window=r.sliding_window
    )
    return out, pool


def _unsupported_by_reference(request: Request, _: str) -> str | None:
    pool = request.pool_values
    K, D = request.keys.shape[1:]
    if pool.ndim != 5 or pool.shape[1:3] != (2, K) or pool.shape[4] != D:
        return f"the pool has shape {pool.shape}; it must be [N, 2, {K}, B, {D}]"
    return _wrong_scales(request)


def _run_reference(r: Request) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    floats: Any = jax.tree.map(lambda x: reinterpret(x, kv_dtype(x.dtype)), r.kv_pool)
    pool = reference.write_kv(floats, r.keys, r.values, r.metadata.slot_mapping)
    out = reference.paged_attention(
        r.queries, pool, r.metadata, scale=r.scale, sliding_window=r.sliding_window, soft_cap=r.soft_cap
    )
    return out, jax.tree.map(lambda x, stored: reinterpret(x, stored.dtype), pool, r.kv_pool)


BACKENDS = {  # in order of preference
    "pallas_tpu": Backend(
        ("tpu",), _unsupported_by_pallas_tpu, _run_pallas_tpu, _pallas_tpu_pool, rows_meet=False
    ),
    "pallas_triton": Backend(
        ("gpu",),
        _unsupported_by_pallas_triton,
        _run_pallas_triton,
        _plain_pool,
        _reachable_by_pallas_triton,
    ),
    # nobody has timed it
    "mosaic_gpu": Backend((), _unsupported_by_mosaic_gpu, _run_mosaic_gpu, _plain_pool),
    "blocked": Backend(("cpu", "gpu", "tpu"), _unsupported_by_blocked, _run_blocked, _blocked_pool),
    # gathers every token's whole context: memory for tests, not for serving
    "reference": Backend((), _unsupported_by_reference, _run_reference, _plain_pool),
}


@functools.partial(  # traced once for all layers
    jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "decode_only", "backend")
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
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    """Causal grouped-query attention over a paged KV cache (PagedAttention, Kwon et al. 2023).

    Args:
        queries: [T, H, D].
        keys, values: [T, K, D], of this step's tokens.
        kv_pool: as `pool_struct(…)` of the backend; quantized, if it is a QuantizedPool. Donate it, so that it is
            updated in place.
        metadata: the ragged batch.
        scale: factor of the scores, usually D ** −0.5.
        sliding_window: tokens that a token sees, itself included; None: all before it.
        soft_cap: scores become soft_cap · tanh(score / soft_cap); None: they stay.
        decode_only: a promise that every row has one token; a backend may then leave out the rest.
        backend: one of BACKENDS, or auto: the first that this platform prefers and that can do it.

    Returns:
        (out [T, H, D] in the queries' dtype, kv_pool).

    Raises:
        ValueError: no backend can do it; the message says why for each.
    """
    request = Request(queries, keys, values, kv_pool, metadata, scale, sliding_window, soft_cap, decode_only)
    return BACKENDS[choose_backend(request, backend, current_platform())].run(request)


def choose_backend(request: Request, backend: str, platform: str) -> str:
    """Name of the implementation for a request.

    Raises:
        ValueError: none fits.
    """
    return _choose(lambda _: request, backend, platform)


def backend_for(shape: ServingShape, backend: str, platform: str) -> str:
    """Name of the implementation that serves a model: each is asked about a pool in its own layout.

    Raises:
        ValueError: none fits.
    """

    return _choose(_serving_request(shape, platform), backend, platform)


def passed_over(shape: ServingShape, backend: str, platform: str) -> dict[str, str]:
    """Backends that `auto` would rather have than this one on this platform → why they do not fit."""
    request, reasons = _serving_request(shape, platform), {}
    for name, candidate in BACKENDS.items():
        if name == backend:
            break
        if platform in candidate.platforms and (reason := candidate.unsupported(request(name), platform)):
            reasons[name] = reason
    return reasons


def _serving_request(shape: ServingShape, platform: str) -> Callable[[str], Request]:
    """Name of a backend → what it is asked when it is to serve a model."""

    def request(name: str) -> Request:
        _, K, _, D, _ = shape.pool
        T, S, M, ints = shape.num_tokens, shape.num_seqs, shape.blocks_per_seq, jnp.int32
        queries, kv = _struct((T, shape.num_heads, D), shape.dtype), _struct((T, K, D), shape.dtype)
        metadata = AttentionMetadata(
            block_tables=_struct((S, M), ints),
            seq_lens=_struct((S,), ints),
            query_start_loc=_struct((S + 1,), ints),
            positions=_struct((T,), ints),
            token_rows=_struct((T,), ints),
            slot_mapping=_struct((T,), ints),
            num_single_tokens=_struct((), ints),
            tiles=_struct((0, 2), ints),
            num_tiles=_struct((), ints),
        )
        pool = pool_struct(name, shape.pool, platform)
        return Request(
            queries, kv, kv, pool, metadata, D**-0.5, shape.sliding_window, shape.soft_cap, decode_only=False
        )

    return request


def pool_struct(backend: str, shape: PoolShape, platform: str) -> jax.Array | QuantizedPool:
    """Shape and dtype of one layer's pool as a backend wants it: jax.ShapeDtypeStruct, alone or in a QuantizedPool."""
    return BACKENDS[backend].pool(shape, platform)


def _choose(request: Callable[[str], Request], backend: str, platform: str) -> str:
    """`request`: name of a backend → what it is asked."""
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"There is no attention backend {backend!r}: use auto or {', '.join(BACKENDS)}.")
        if reason := BACKENDS[backend].unsupported(request(backend), platform):
            raise ValueError(f"Attention backend {backend} does not fit: {reason}.")
        return backend
    reasons = {}
    for name, candidate in BACKENDS.items():
        reason = candidate.unsupported(request(name), platform)
        if reason is None and platform in candidate.platforms:
            return name
        reasons[name] = reason or "it is taken only where it is asked for"
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"No attention backend fits on {platform}. {listed}.")


def current_platform() -> str:
    """What is compiled for: the chip that `jax.sharding.use_abstract_mesh` names, else the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name
