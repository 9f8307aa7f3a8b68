"""The KV pool: shape, bytes, and how many blocks the device has room for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxserve.errors import ConfigError
from jaxserve.kernels.paged_attention import BACKENDS, PoolShape, pool_struct
from jaxserve.kernels.reference import QuantizedPool
from jaxserve.models.config import ModelConfig

# in the environment: JAX's share of each GPU's memory; the second name is deprecated
_GPU_MEMORY_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
CPU_DEFAULT_POOL_BYTES = 1 << 30  # a CPU shares its memory with everything else on the machine


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """The KV pool but for its number of blocks.

    Attributes:
        dtype: of K and V.
        backend, platform: which attention lays it out (kernels/paged_attention.py).
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: jnp.dtype
    backend: str
    platform: str

    @classmethod
    def of(
        cls, config: ModelConfig, block_size: int, dtype: jnp.dtype, platform: str, backend: str
    ) -> KVCacheSpec:
        return cls(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            dtype=dtype,
            backend=backend,
            platform=platform,
        )

    @property
    def bytes_per_block(self) -> int:
        """Of all layers together."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.abstract(1)))

    def abstract(self, num_blocks: int) -> jax.Array | QuantizedPool:
        """jax.ShapeDtypeStruct of what `allocate` makes."""
        shape = PoolShape(num_blocks, self.num_kv_heads, self.block_size, self.head_dim, self.dtype)
        layer = pool_struct(self.backend, shape, self.platform)
        pool: jax.Array | QuantizedPool = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.num_layers, *x.shape), x.dtype), layer
        )
        return pool

    def reachable(self, num_blocks: int) -> int:
        """So many blocks, or as many of them as attention reaches, whose kernels see all layers' as one array."""
        pool = self.abstract(num_blocks)
        L, N, *rest = (pool.values if isinstance(pool, QuantizedPool) else pool).shape
        values = jax.ShapeDtypeStruct((N, L, *rest), self.dtype)
        return BACKENDS[self.backend].reachable_blocks(values)


def num_blocks_for(spec: KVCacheSpec, *, pool_bytes: int, max_useful_tokens: int) -> int:
    """Blocks in a pool of `pool_bytes`, the null block included; not more than attention reaches or than all sequences
    at their longest (`max_useful_tokens`) could use.

    Raises:
        ConfigError: there is no room at all.
    """
    useful = -(-max_useful_tokens // spec.block_size) + 1
    num_blocks = min(pool_bytes // spec.bytes_per_block, useful)
    if num_blocks < 2:
        raise ConfigError(
            f"No memory for a KV cache: {max(pool_bytes, 0) / 2**20:,.0f} MiB are left and one block of "
            f"{spec.block_size} tokens takes {spec.bytes_per_block / 2**20:,.1f} MiB. Raise "
            "--gpu-memory-utilization or --kv-cache-memory-bytes, or use a device with more memory."
        )
    return spec.reachable(num_blocks)


def claim_device_memory(memory_utilization: float) -> None:
    """Let JAX have that share of each GPU's memory: by itself it takes three quarters. What the user has set stays.

    To be called before JAX computes anything in this process: it asks for its share once.
    """
    if not any(os.environ.get(name) for name in _GPU_MEMORY_SHARES):
        os.environ[_GPU_MEMORY_SHARES[0]] = str(memory_utilization)


def free_device_bytes(devices: Sequence[jax.Device], memory_utilization: float) -> int:
    """What jaxserve may take of each device's memory, as things are now. CPU devices share the host's.

    Raises:
        ConfigError: the device does not tell.
    """
    if devices[0].platform == "cpu":
        return int(memory_utilization * _available_host_bytes()) // len(devices)
    free = []
    for device in devices:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            raise ConfigError(f"{device.device_kind} does not tell its memory: give --kv-cache-memory-bytes.")
        limit = int(stats["bytes_limit"])  # JAX's share on a GPU, elsewhere all there is
        share = _gpu_memory_share() if device.platform == "gpu" else 1.0
        free.append(min(int(memory_utilization * limit / share), limit) - int(stats["bytes_in_use"]))
    return min(free)


def _gpu_memory_share() -> float:
    """Of each GPU's memory, what JAX has."""
    return next((float(share) for name in _GPU_MEMORY_SHARES if (share := os.environ.get(name))), 0.75)


def _available_host_bytes() -> int:
    """MemAvailable, or what the control group leaves if that is less."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return available
