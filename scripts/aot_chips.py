"""The chips that scripts/aot_check.py compiles for, as their compilers want them described."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from jax.experimental import topologies
from jax.sharding import AbstractMesh

try:
    from jax.sharding import AbstractDevice
except ImportError:  # not public in every version
    from jax._src.mesh import AbstractDevice


def gib(number: float) -> int:
    """Bytes."""
    return int(number * 2**30)


class TPU(NamedTuple):
    """`memory`: what the compiler lets a program of one device use, as it says when it is too little.
    `slices`: names of a small slice and, where larger ones are compiled for, of that; with the number of devices.
    `configuration`: how a chip's cores are used; JAX takes both of a v4 for one device, the compiler only if told."""

    memory: int
    slices: dict[int, str]
    configuration: str = "default"


TPUS = {
    "v4": TPU(gib(30.75), {4: "v4:2x2x1"}, "megacore"),
    "v5e": TPU(gib(15.75), {4: "v5e:2x2", 8: "v5e:2x4"}),
    "v5p": TPU(gib(95.74), {4: "v5p:2x2x1"}),
    "v6e": TPU(gib(31.25), {4: "v6e:2x2", 8: "v6e:2x4"}),
    "v7x": TPU(gib(94.75), {4: "tpu7x:2x2x1"}),
}
GPUS_IN_A_HOST = 4


class GPU(NamedTuple):
    """What XLA must know of a GPU; bytes, bytes/s and GHz."""

    description: str
    compute_capability: tuple[int, int]
    cores: int
    threads_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2: int
    memory: int
    bandwidth: int
    clock: float


GPUS = {
    "a100": GPU(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 2048, 167936, 166912, 40 << 20, 84_974_239_744, 2039 * 10**9, 1.41
    ),
    "l4": GPU("NVIDIA L4", (8, 9), 58, 1536, 102400, 101376, 48 << 20, 23_609_475_072, 300 * 10**9, 2.04),
    "h100": GPU(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 2048, 233472, 232448, 50 << 20, 84_942_979_072, 3352 * 10**9, 1.98
    ),
    "b200": GPU(
        "NVIDIA B200", (10, 0), 148, 2048, 233472, 232448, 132_644_864, 191_514_476_544, 8000 * 10**9, 1.965
    ),
}  # fmt: skip
CHIPS = (*TPUS, *GPUS)


def platform(chip: str) -> str:
    """As `kernels.paged_attention` calls it."""
    return "tpu" if chip in TPUS else "gpu"


def is_hopper(chip: str) -> bool:
    return chip in GPUS and GPUS[chip].compute_capability == (9, 0)


def memory(chip: str) -> int:
    """Bytes of a device."""
    return TPUS[chip].memory if chip in TPUS else GPUS[chip].memory


def max_devices(chip: str) -> int:
    """How many of them a program can be split among here."""
    return max(TPUS[chip].slices) if chip in TPUS else GPUS_IN_A_HOST


@functools.cache
def devices(chip: str, count: int = 1) -> list[Any]:
    """Chips as devices that one can compile for and not run on: of a slice of TPUs, or of a host with GPUs."""
    if chip in TPUS:
        size = min(size for size in TPUS[chip].slices if size >= count)
        slice_ = topologies.get_topology_desc(
            platform="tpu",
            topology_name=TPUS[chip].slices[size],
            chip_config_name=TPUS[chip].configuration,
        )
        return list(slice_.devices)[:count]
    host = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x1x{count}",
        target_config=_target_config(GPUS[chip]),
    )
    return list(host.devices)


def abstract_mesh(chip: str) -> AbstractMesh:
    """For `jax.sharding.use_abstract_mesh`: Pallas asks which chip it lowers for, and would see the CPU."""
    # a v4 or v5p is one device of two cores
    device = devices(chip)[0]
    cores = device.num_cores if chip in TPUS else None
    abstract = AbstractDevice(device.device_kind, cores, "tpu" if chip in TPUS else "cuda")
    return AbstractMesh((), (), abstract_device=abstract)


def _target_config(gpu: GPU) -> str:
    """XLA's GpuTargetConfigProto as text."""
    major, minor = gpu.compute_capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory_per_core}
  threads_per_core_limit: {gpu.threads_per_core}
  core_count: {gpu.cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
  }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{
  major: 9
  minor: 8
}}
device_description_str: "{gpu.description}"
"""
