"""Compile programs for chips that this machine does not have, and check what the compiler says about memory.

It shows that a program lowers and compiles for a chip, what memory it takes, and that its donated pool is updated in
place. It shows neither numbers nor speed. Run it as `scripts/aot_check`, which brings the compilers.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, SingleDeviceSharding

try:
    from jax.sharding import AbstractDevice
except ImportError:  # not public in every version
    from jax._src.mesh import AbstractDevice

from jaxserve.kernels import pallas_tpu
from jaxserve.kernels.metadata import AttentionMetadata
from jaxserve.kernels.paged_attention import paged_attention
from jaxserve.kernels.reference import QuantizedPool

CHIPS = {  # name → topology of the smallest slice
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
POOL_BYTES = 4 << 30  # what a kernel's pool has; only shapes, nothing is allocated
MAX_TEMP_SHARE = 0.05  # of the pool


class Program(NamedTuple):
    """Something to compile.

    Attributes:
        name: as the table shows it.
        function: takes the arguments.
        arguments: pytrees of jax.ShapeDtypeStruct.
        donated: which argument is the pool, to be updated in place.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: int


class Result(NamedTuple):
    """What the compiler says; bytes."""

    seconds: float
    argument: int
    alias: int
    temp: int
    code: int


def compile_for(program: Program, chip: str) -> Result:
    """Lower and compile for one chip."""
    start = time.perf_counter()
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), program.arguments
    )
    # Pallas asks which chip it lowers for, and would see the CPU; a v4 or v5p is one device of two cores
    abstract = AbstractDevice(device.device_kind, device.num_cores, "tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        compiled = jax.jit(program.function, donate_argnums=program.donated).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return Result(
        time.perf_counter() - start,
        memory.argument_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )


def complaint(program: Program, result: Result) -> str | None:
    """What is wrong with a program that did compile."""
    pool = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.arguments[program.donated]))
    if result.alias < pool:
        return f"the pool of {pool:,} B is copied: only {result.alias:,} B are updated in place"
    if result.temp > MAX_TEMP_SHARE * pool:
        return f"{result.temp:,} B of temporaries are more than {MAX_TEMP_SHARE:.0%} of the pool"
    return None


def kernel_program(
    T: int,
    H: int,
    K: int,
    D: int,
    *,
    S: int = 64,
    block_size: int = 128,
    max_model_len: int = 8192,
    dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    decode_only: bool = False,
) -> Program:
    """Paged attention on one layer's pool of POOL_BYTES."""
    storage = jnp.dtype(kv_dtype)
    _, _, B, L = pallas_tpu.pool_shape(1, K, block_size, D)
    num_blocks = POOL_BYTES // (K * B * L * storage.itemsize)
    pool: Any = jax.ShapeDtypeStruct((num_blocks, K, B, L), storage)
    if storage.itemsize == 1:
        scales = pallas_tpu.scales_shape(num_blocks, K, B)
        pool = QuantizedPool(pool, jax.ShapeDtypeStruct(scales, jnp.float32))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    M = -(-max_model_len // B)
    metadata = AttentionMetadata(
        block_tables=ints((S, M)),
        seq_lens=ints((S,)),
        query_start_loc=ints((S + 1,)),
        positions=ints((T,)),
        token_rows=ints((T,)),
        slot_mapping=ints((T,)),
        num_single_tokens=ints(()),
        tiles=ints((0, 2)),
        num_tiles=ints(()),
    )
    parts = ["decode" if decode_only else "mixed", f"T{T} H{H} K{K} D{D} B{B}", f"{dtype}/{kv_dtype}"]
    parts += [f"window {sliding_window}"] * (sliding_window is not None)
    parts += [f"cap {soft_cap:g}"] if soft_cap is not None else []
    attend = functools.partial(
        paged_attention,
        scale=D**-0.5,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        decode_only=decode_only,
        backend="pallas_tpu",
    )
    q = jax.ShapeDtypeStruct((T, H, D), jnp.dtype(dtype))
    kv = jax.ShapeDtypeStruct((T, K, D), jnp.dtype(dtype))
    return Program(f"attention {' '.join(parts)}", attend, (q, kv, kv, pool, metadata), donated=3)


def quick_kernels() -> Iterator[Program]:
    """Llama-3.1-8B, SmolLM2, and the corners of what the kernel promises."""
    yield kernel_program(64, 32, 8, 128, decode_only=True)
    yield kernel_program(512, 32, 8, 128)
    yield kernel_program(16, 9, 3, 64, decode_only=True)
    yield kernel_program(512, 9, 3, 64, block_size=16)
    yield kernel_program(256, 32, 8, 128, kv_dtype="int8")
    yield kernel_program(256, 32, 8, 128, kv_dtype="float8_e4m3fn")
    yield kernel_program(
        64,
        16,
        16,
        256,
        dtype="float32",
        kv_dtype="float32",
        block_size=256,
        sliding_window=4096,
        soft_cap=50.0,
    )


def all_kernels() -> Iterator[Program]:
    """Every head_dim with every pair of dtypes, every block size and every number of kv heads."""
    yield from quick_kernels()
    for head_dim in (64, 80, 96, 128, 256):
        for dtype in ("bfloat16", "float32"):
            for kv_dtype in pallas_tpu.POOL_DTYPES:
                yield kernel_program(
                    64, 8, 2, head_dim, dtype=dtype, kv_dtype=kv_dtype, sliding_window=1024, soft_cap=30.0
                )
    for block_size in (16, 32, 64, 256):
        for kv_dtype in ("bfloat16", "int8"):
            yield kernel_program(256, 8, 2, 64, kv_dtype=kv_dtype, block_size=block_size, max_model_len=4096)
    for H, K in ((1, 1), (8, 1), (28, 4), (64, 8), (16, 16), (128, 16)):
        yield kernel_program(64, H, K, 128, decode_only=True)
        yield kernel_program(2048, H, K, 128, S=256)


def main() -> int:
    parser = argparse.ArgumentParser(prog="aot_check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every chip, but only the most telling programs")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="only this one; may be repeated")
    parser.add_argument("--match", default="", metavar="TEXT", help="only programs with TEXT in their name")
    args = parser.parse_args()
    programs = [p for p in (quick_kernels() if args.quick else all_kernels()) if args.match in p.name]
    if not programs:
        parser.error(f"no program's name contains {args.match!r}")
    print(f"jax {jax.__version__}\n{'program':<76} chip {'s':>6}", *(f"{f:>15}" for f in Result._fields[1:]))
    failures = 0
    for program in programs:
        for chip in args.chip or CHIPS:
            failures += not report(program, chip)
    print(f"{failures} of {len(programs) * len(args.chip or CHIPS)} failed")
    return int(failures > 0)


def report(program: Program, chip: str) -> bool:
    """One row of the table; False if there is something to complain about."""
    label = f"{program.name:<76} {chip:<4}"
    try:
        result = compile_for(program, chip)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        print(f"{label} FAILED {type(error).__name__}: {error}", flush=True)
        return False
    wrong = complaint(program, result)
    print(
        f"{label} {result.seconds:6.1f}",
        *(f"{value:15,}" for value in result[1:]),
        f"WRONG: {wrong}" if wrong else "",
        flush=True,
    )
    return wrong is None


if __name__ == "__main__":
    sys.exit(main())
