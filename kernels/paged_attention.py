"""The public operation: write this step's K and V into the pool, then attend over it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.kernels import blocked_attention, reference
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


class Backend(NamedTuple):
    """One implementation.

    Attributes:
        platforms: where `auto` takes it; empty: only where it is named.
        unsupported: why it cannot do a request, or None.
        run: does it.
    """

    platforms: tuple[str, ...]
    unsupported: Callable[[Request, str], str | None]
    run: Callable[[Request], tuple[jax.Array, jax.Array | QuantizedPool]]


def _unsupported_by_pallas_tpu(request: Request, platform: str) -> str | None:
    if platform != "tpu":
        return f"it runs on TPU, this is {platform}"
    from jaxserve.kernels import pallas_tpu  # where it runs: importing Pallas takes a while

    return pallas_tpu.unsupported(request.queries, request.kv_pool, request.metadata)


def _run_pallas_tpu(r: Request) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    from jaxserve.kernels import pallas_tpu

    return pallas_tpu.paged_attention(
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


def _unsupported_by_plain_jax(request: Request) -> str | None:
    pool = request.pool_values
    _, K, D = request.keys.shape
    if pool.ndim != 5 or pool.shape[1:3] != (2, K) or pool.shape[4] != D:
        return f"the pool has shape {pool.shape}; it must be [N, 2, {K}, B, {D}]"
    if pool.dtype == jnp.uint16 and request.queries.dtype.itemsize != 2:
        return (
            f"a pool of uint16 holds the bits of 16-bit floats, but queries are {request.queries.dtype.name}"
        )
    return None


def _unsupported_by_blocked(request: Request, _: str) -> str | None:
    if isinstance(request.kv_pool, QuantizedPool):
        return "it has no quantized pools"
    if request.soft_cap is not None:
        return "it has no soft cap"
    T, group = request.queries.shape[0], blocked_attention.TOKEN_GROUP
    if group < T and T % group:
        return f"{T} tokens are neither at most {group} nor a multiple of it"
    return _unsupported_by_plain_jax(request)


def _run_blocked(r: Request) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    num_tokens = r.metadata.query_start_loc[-1]
    pool = blocked_attention.write_kv(r.pool_values, r.keys, r.values, r.metadata.slot_mapping, num_tokens)
    out = blocked_attention.paged_attention(
        r.queries, pool, r.metadata, scale=r.scale, sliding_window=r.sliding_window
    )
    return out, pool


def _unsupported_by_reference(request: Request, _: str) -> str | None:
    return _unsupported_by_plain_jax(request)


def _run_reference(r: Request) -> tuple[jax.Array, jax.Array | QuantizedPool]:
    attend = functools.partial(
        reference.paged_attention, scale=r.scale, sliding_window=r.sliding_window, soft_cap=r.soft_cap
    )
    if isinstance(r.kv_pool, QuantizedPool):
        quantized = reference.write_kv(r.kv_pool, r.keys, r.values, r.metadata.slot_mapping)
        return attend(r.queries, quantized, r.metadata), quantized
    holds_bits = r.kv_pool.dtype == jnp.uint16
    pool = lax.bitcast_convert_type(r.kv_pool, r.queries.dtype) if holds_bits else r.kv_pool
    pool = reference.write_kv(pool, r.keys, r.values, r.metadata.slot_mapping)
    out = attend(r.queries, pool, r.metadata)
    return out, lax.bitcast_convert_type(pool, jnp.uint16) if holds_bits else pool


BACKENDS = {  # in order of preference
    "pallas_tpu": Backend(("tpu",), _unsupported_by_pallas_tpu, _run_pallas_tpu),
    "blocked": Backend(("cpu", "cuda", "rocm", "gpu", "tpu"), _unsupported_by_blocked, _run_blocked),
    # gathers every token's whole context: memory for tests, not for serving
    "reference": Backend((), _unsupported_by_reference, _run_reference),
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
        kv_pool: [N, 2, K, B, D], or `pallas_tpu.pool_shape(…)` on TPU; quantized, if it is a QuantizedPool.
            Donate it, so that it is updated in place.
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
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"There is no attention backend {backend!r}: use auto or {', '.join(BACKENDS)}.")
        if reason := BACKENDS[backend].unsupported(request, platform):
            raise ValueError(f"Attention backend {backend} does not fit: {reason}.")
        return backend
    reasons = {}
    for name, candidate in BACKENDS.items():
        reason = candidate.unsupported(request, platform)
        if reason is None and platform in candidate.platforms:
            return name
        reasons[name] = reason or "it is taken only where it is asked for"
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"No attention backend fits on {platform}. {listed}.")


def current_platform() -> str:
    """What is compiled for: the chip that `jax.sharding.use_abstract_mesh` names, else the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
