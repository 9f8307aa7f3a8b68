"""Compile programs for chips that this machine does not have, and check what the compiler says about memory.

It shows that a program lowers and compiles for a chip, what memory it takes, that its donated pool is updated in place
and that its weights are read where they are. It shows neither numbers nor speed. Run it as `scripts/aot_check`, which
brings the compilers.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import jax
from aot_chips import CHIPS, abstract_mesh, devices, is_hopper, max_devices, memory, platform
from aot_programs import (
    Kernel,
    Program,
    Step,
    all_kernels,
    all_steps,
    hopper_kernels,
    hopper_steps,
    num_bytes,
    quick_kernels,
    quick_split_step,
    quick_steps,
)
from jax.sharding import SingleDeviceSharding

MAX_TEMP_SHARE = 0.05  # of the pool
LARGE_BYTES = 1 << 20
# instructions of HLO whose result may be a copy of their operand
MAKES = re.compile(r"= (.*?) (?:copy|copy-done|transpose|convert|reshape|slice|dynamic-slice|fusion)\(")
ARRAY = re.compile(r"(\w+)\[([\d,]+)\](\{[^}]*\})?")
FUSION = re.compile(r" fusion\(.*?, calls=%([\w.-]+)")
PRODUCT = re.compile(r"= \w+\[([\d,]+)\][^ ]* (?:convolution|dot)\(")
HLO_DTYPES = {"int8": "s8", "bfloat16": "bf16", "float32": "f32"}


Job = tuple[Kernel | Step, str]
"""(what, the chip)"""


class Result(NamedTuple):
    """What the compiler says; bytes. `code` is 0 where it does not say (GPU).

    Attributes:
        wrong: what there is to complain about, or None.
    """

    seconds: float
    argument: int
    alias: int
    temp: int
    code: int
    wrong: str | None


def compile_for(case: Kernel | Step, chip: str) -> Result:
    """Lower and compile for one chip, or for as many as share the program."""
    chips = devices(chip, case.num_devices)
    program = case.program(platform(chip), chips, memory(chip))
    start = time.perf_counter()
    arguments, context = program.arguments, contextlib.nullcontext()
    if program.num_devices == 1:
        sharding = SingleDeviceSharding(chips[0])
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if x.sharding is None else x,
            arguments,
        )
        context = jax.sharding.use_abstract_mesh(abstract_mesh(chip))
    with context:
        compiled = jax.jit(program.function, donate_argnums=program.donated).lower(*arguments).compile()
    seconds, says = time.perf_counter() - start, compiled.memory_analysis()
    return Result(
        seconds,
        says.argument_size_in_bytes,
        says.alias_size_in_bytes,
        says.temp_size_in_bytes,
        says.generated_code_size_in_bytes,
        complaint(program, says, compiled.as_text(), memory(chip)),
    )


def complaint(program: Program, says: jax.stages.CompiledMemoryStats, hlo: str, memory: int) -> str | None:
    """What is wrong with a program that did compile."""
    pool = num_bytes(program.arguments[program.donated]) // program.num_devices
    if says.alias_size_in_bytes < pool:
        return f"the pool of {pool:,} B is copied: only {says.alias_size_in_bytes:,} B are updated in place"
    if says.temp_size_in_bytes > MAX_TEMP_SHARE * pool:
        return f"{says.temp_size_in_bytes:,} B of temporaries are more than {MAX_TEMP_SHARE:.0%} of the pool"
    needed = sum(
        (
            program.other_bytes,
            says.argument_size_in_bytes,
            says.output_size_in_bytes - says.alias_size_in_bytes,
            says.temp_size_in_bytes,
            says.generated_code_size_in_bytes,
        )
    )
    if needed > memory:
        return f"it needs {needed:,} B and the device has {memory:,} B"
    if copied := copied_weight(program, hlo):
        return f"a weight of shape {copied} is copied"
    return None


def copied_weight(program: Program, hlo: str) -> str | None:
    """Shape of a weight of which the compiled program makes another array of the same or the transposed shape in its
    main memory, whether by a copy, by a conversion or within a fusion: it does not like the weight as it is. (To
    bring one into vector memory, S(1), is to use it; and a product of another dtype may happen to have a weight's
    shape.)"""
    if program.weights is None:
        return None
    shapes, dtypes = set(), set()
    for leaf in jax.tree.leaves(program.arguments[program.weights]):
        if num_bytes(leaf) // program.num_devices >= LARGE_BYTES:
            rows, *rest = leaf.shape
            shape = (rows // program.num_devices, *rest)  # chips' shares lie end to end
            shapes |= {shape, shape[::-1]}
            dtypes.add(HLO_DTYPES.get(leaf.dtype.name))
    fused = set(FUSION.findall(hlo))
    named = (
        (name[1], computation)
        for computation in re.split(r"\n(?=%|ENTRY )", hlo)
        if (name := re.match(r"(?:ENTRY )?%([\w.-]+) \(", computation))
    )
    computations = dict(named)
    for name, computation in computations.items():
        if name in fused:
            continue  # what is made within a fusion goes no further; what the fusion gives is seen where it is called
        for line in computation.splitlines():
            made, fusion = MAKES.search(line), FUSION.search(line)
            products = set(PRODUCT.findall(computations.get(fusion[1], ""))) if fusion else set()
            for dtype, dims, layout in ARRAY.findall(made[1]) if made else ():
                copied = dtype in dtypes or dims not in products
                if copied and tuple(map(int, dims.split(","))) in shapes and "S(" not in layout:
                    return f"[{dims}]"
    return None


def cases_for(chip: str, *, quick: bool, num_layers: int | None) -> Iterator[Kernel | Step]:
    if is_hopper(chip):
        yield from hopper_kernels(quick=quick)
    if quick:
        yield from quick_kernels(platform(chip))
        yield from quick_steps(memory(chip))
        if is_hopper(chip):  # one of those whose compiler is quick
            yield quick_split_step()
    else:
        yield from all_kernels(platform(chip))
        yield from all_steps(memory(chip), max_devices(chip), num_layers)
        if is_hopper(chip):
            yield from hopper_steps(num_layers)


def main() -> int:
    parser = argparse.ArgumentParser(prog="aot_check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every chip, but only the most telling programs")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="only this one; may be repeated")
    parser.add_argument("--match", default="", metavar="TEXT", help="only programs with TEXT in their name")
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="without --quick: cut models to N layers, which others repeat; pools stay as large as if they were whole",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="at once; default: one a processor",
    )
    args = parser.parse_args()
    jobs = [
        (case, chip)
        for chip in args.chip or CHIPS
        for case in dict.fromkeys(cases_for(chip, quick=args.quick, num_layers=args.layers))
        if args.match in case.name
    ]
    if not jobs:
        parser.error(f"no program's name contains {args.match!r}")
    started = time.perf_counter()
    print(
        f"jax {jax.__version__}\n{'program':<84} chip {'s':>6}", *(f"{f:>15}" for f in Result._fields[1:-1])
    )
    wrong = [job for job, result in compiled(jobs, args.processes) if not report(*job, result)]
    print(f"{len(wrong)} of {len(jobs)} failed, {time.perf_counter() - started:.0f} s")
    for case, chip in wrong:
        print(f"FAILED: {case.name} on {chip}")
    return int(bool(wrong))


def compiled(jobs: list[Job], num_processes: int) -> Iterator[tuple[Job, Future[Result]]]:
    """Each job with its result, in order. If a compiler ends its process, and with it the pool, the first job that is
    left without a result has a pool of its own, to tell it from those beside it."""
    # processes, because tracing holds Python's lock; not forked, because jax has threads
    spawn = multiprocessing.get_context("spawn")
    while jobs:
        with ProcessPoolExecutor(num_processes, mp_context=spawn) as pool:
            for number, result in enumerate([pool.submit(compile_for, *job) for job in jobs]):
                if isinstance(result.exception(), BrokenProcessPool):
                    break
                yield jobs[number], result
            else:
                return
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            yield jobs[number], pool.submit(compile_for, *jobs[number])
        jobs = jobs[number + 1 :]


def report(case: Kernel | Step, chip: str, future: Future[Result]) -> bool:
    """One row of the table; False if there is something to complain about."""
    label = f"{case.name:<84} {chip:<4}"
    try:
        result = future.result()
    except (
        jax.errors.JaxRuntimeError, NotImplementedError, ValueError, AssertionError, BrokenProcessPool
    ) as error:  # fmt: skip
        print(f"{label} FAILED {type(error).__name__}: {error}", flush=True)
        return False
    print(
        f"{label} {result.seconds:6.1f}",
        *(f"{value:15,}" for value in result[1:-1]),
        f"WRONG: {result.wrong}" if result.wrong else "",
        flush=True,
    )
    return result.wrong is None


if __name__ == "__main__":
    sys.exit(main())
