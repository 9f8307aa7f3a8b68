"""Compile programs for chips that this machine does not have, and check what the compiler says about memory.

It shows that a program lowers and compiles for a chip, what memory it takes, and that its donated pool is updated in
place. It shows neither numbers nor speed. Run it as `scripts/aot_check`, which brings the compilers.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
from aot_chips import CHIPS, abstract_mesh, devices, memory, platform
from aot_programs import Program, all_kernels, all_steps, num_bytes, quick_kernels, quick_steps
from jax.sharding import SingleDeviceSharding

MAX_TEMP_SHARE = 0.05  # of the pool
COMPILE_THREADS = 2
LARGE_BYTES = 1 << 20
SHORT_NAMES = {"bfloat16": "bf16", "float32": "f32", "int8": "s8"}  # in HLO


class Result(NamedTuple):
    """What the compiler says; bytes. `code` is 0 where it does not say (GPU).

    Attributes:
        copied: argument that is no pool and that the program copies before it uses it, or None.
    """

    seconds: float
    argument: int
    alias: int
    temp: int
    code: int
    copied: str | None


def compile_for(program: Program, chip: str) -> Result:
    """Lower and compile for one chip."""
    start = time.perf_counter()
    arguments, context = program.arguments, contextlib.nullcontext()
    if program.num_devices == 1:
        sharding = SingleDeviceSharding(devices(chip)[0])
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if x.sharding is None else x,
            arguments,
        )
        context = jax.sharding.use_abstract_mesh(abstract_mesh(chip))
    with context:
        compiled = jax.jit(program.function, donate_argnums=program.donated).lower(*arguments).compile()
    says = compiled.memory_analysis()
    return Result(
        time.perf_counter() - start,
        says.argument_size_in_bytes,
        says.alias_size_in_bytes,
        says.temp_size_in_bytes,
        says.generated_code_size_in_bytes,
        copied_argument(program, compiled.as_text()),
    )


def copied_argument(program: Program, hlo: str) -> str | None:
    """Type of a large argument that the compiled program copies within its main memory: a weight in a layout that it
    does not like. (To bring one into vector memory, S(1), is to use it; so is a copy within a fusion, which goes no
    further than that.)"""
    large = {
        f"{SHORT_NAMES[x.dtype.name]}[{','.join(map(str, x.shape))}]"
        for x in jax.tree.leaves(program.arguments)
        if num_bytes(x) >= LARGE_BYTES and x.dtype.name in SHORT_NAMES
    }
    fusions = set(re.findall(r" fusion\(.*?, calls=%([\w.-]+)", hlo))
    for computation in re.split(r"\n(?=%|ENTRY )", hlo):
        name = re.match(r"(?:ENTRY )?%([\w.-]+) \(", computation)
        if name is None or name[1] in fusions:
            continue
        for shape, layout in re.findall(r"= (\w+\[[\d,]+\])(\S*) copy\(", computation):
            if shape in large and "S(" not in layout:
                return str(shape)
    return None


def complaint(program: Program, result: Result) -> str | None:
    """What is wrong with a program that did compile."""
    pool = num_bytes(program.arguments[program.donated]) // program.num_devices
    if result.alias < pool:
        return f"the pool of {pool:,} B is copied: only {result.alias:,} B are updated in place"
    if result.temp > MAX_TEMP_SHARE * pool:
        return f"{result.temp:,} B of temporaries are more than {MAX_TEMP_SHARE:.0%} of the pool"
    if result.copied:
        return f"an argument {result.copied} is copied"
    return None


def programs_for(chip: str, *, quick: bool) -> Iterator[Program]:
    kernels, steps = (quick_kernels, quick_steps) if quick else (all_kernels, all_steps)
    devices(chip)  # made before any thread asks
    yield from kernels(platform(chip))
    yield from steps(platform(chip), devices(chip), memory(chip))


def main() -> int:
    parser = argparse.ArgumentParser(prog="aot_check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every chip, but only the most telling programs")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="only this one; may be repeated")
    parser.add_argument("--match", default="", metavar="TEXT", help="only programs with TEXT in their name")
    args = parser.parse_args()
    jobs = [
        (program, chip)
        for chip in args.chip or CHIPS
        for program in programs_for(chip, quick=args.quick)
        if args.match in program.name
    ]
    if not jobs:
        parser.error(f"no program's name contains {args.match!r}")
    started = time.perf_counter()
    print(
        f"jax {jax.__version__}\n{'program':<84} chip {'s':>6}", *(f"{f:>15}" for f in Result._fields[1:-1])
    )
    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        results = [pool.submit(compile_for, *job) for job in jobs]
        failures = sum(not report(*job, result) for job, result in zip(jobs, results, strict=True))
    print(f"{failures} of {len(jobs)} failed, {time.perf_counter() - started:.0f} s")
    return int(failures > 0)


def report(program: Program, chip: str, future: Future[Result]) -> bool:
    """One row of the table; False if there is something to complain about."""
    label = f"{program.name:<84} {chip:<4}"
    try:
        result = future.result()
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        print(f"{label} FAILED {type(error).__name__}: {error}", flush=True)
        return False
    wrong = complaint(program, result)
    print(
        f"{label} {result.seconds:6.1f}",
        *(f"{value:15,}" for value in result[1:-1]),
        f"WRONG: {wrong}" if wrong else "",
        flush=True,
    )
    return wrong is None


if __name__ == "__main__":
    sys.exit(main())
