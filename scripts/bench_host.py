"""What the host costs in a decode step: python scripts/bench_host.py [--sequences 1 16 64 256] [--model MODEL].

Without a model, one so small that the device takes little. With a model: how long its decode steps take.
Steps that run ahead and steps that do not are measured in turn, several times around: median step, smallest, largest,
and the processor time of the engine's thread (dispatch included, waiting not). Beside each, the same step's program
alone: run again and again from the same inputs, nobody waiting for a result before the last. What a step takes longer
than that is all that a program of several steps could gain. And the host alone: the same steps, whose program is not
run; scheduling, packing, update and the frame for the API process, without dispatch and without a device that takes
processor and caches from it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.messages import AbortRequest, AddRequest, encode_frame
from jaxserve.model_runner import ModelRunner
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import Pools, StepOutputs

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "dtype": "float32",
}
WARM_UP_STEPS = 20
GROUP = 10  # steps that are begun before anybody waits


class Times(NamedTuple):
    """Milliseconds of a step, of the engine's thread in it, of the step's program alone, and of the host alone."""

    wall: float
    thread: float
    program: float
    host: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="instead of the tiny one")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with _model(args.model) as model:
        config = EngineConfig(
            model=str(model),
            load_format="auto" if args.model else "dummy",
            max_model_len=1024,
            max_num_seqs=max(args.sequences),
            kv_cache_memory_bytes=None if args.model else 64 << 20,
        )
        runner = ModelRunner(config)
    gc.freeze()  # as the engine process does
    spread = f"{'spread':>17s}"
    print(
        f"sequences  runs ahead  ms a step  {spread}  thread's ms  program alone  {spread}  step / program  host alone"
    )
    for count in args.sequences:
        times: dict[bool, list[Times]] = {True: [], False: []}
        for _ in range(args.rounds):
            for ahead, taken in times.items():
                engine = Engine(runner, replace(runner.limits, async_scheduling=ahead))
                taken.append(_decode(engine, count, args))
        for ahead, taken in times.items():
            wall, thread, program, host = zip(*taken, strict=True)
            ratio = statistics.median(t.wall / t.program for t in taken)
            print(
                f"{count:9d}  {'yes' if ahead else 'no':>10s}  {_with_spread(wall)}  "
                f"{statistics.median(thread):11.3f}  {_with_spread(program)}      {ratio:14.3f}  "
                f"{statistics.median(host):10.3f}",
                flush=True,
            )


def _with_spread(milliseconds: Sequence[float]) -> str:
    spread = f"{min(milliseconds):.3f} - {max(milliseconds):.3f}"
    return f"{statistics.median(milliseconds):9.3f}  {spread:>17s}"


@contextmanager
def _model(path: str | None) -> Iterator[Path]:
    if path is not None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(TINY))
        yield Path(directory)


def _decode(engine: Engine, count: int, args: argparse.Namespace) -> Times:
    """Median milliseconds of a step in which `count` sequences decode, their frame included."""
    runner = engine.model_runner
    for i in range(count):
        prompt = [(i + j) % 16 for j in range(args.context)]
        params = SamplingParams(temperature=0.0, max_tokens=1024 - args.context, ignore_eos=True)
        engine.add_request(AddRequest(request_id=f"request-{i}", prompt_token_ids=prompt, params=params))
    last: list[Any] = []
    execute = runner._execute

    def noting(*step: Any) -> tuple[StepOutputs, Pools]:
        outputs, pools = execute(*step)
        last[:] = outputs, *step
        return outputs, pools

    with mock.patch.object(runner, "_execute", noting):
        wall, thread = _steps(engine, count, args.steps)
    outputs, *step = last
    program, runner._pools = _program_alone(runner, step, args.steps)
    with mock.patch.object(runner, "_execute", lambda _, pools, *__: (outputs, pools)):
        _, host = _steps(engine, count, args.steps)
    for i in range(count):
        engine.abort_request(AbortRequest(request_id=f"request-{i}"))
    return Times(wall, thread, program, host)


def _steps(engine: Engine, count: int, num_steps: int) -> tuple[float, float]:
    """Median milliseconds of a step of `count` sequences, and of the engine's thread in it."""
    taken: list[tuple[float, float]] = []
    while len(taken) < num_steps + WARM_UP_STEPS:
        started, thread_started = time.perf_counter(), time.thread_time()
        outputs = engine.step()
        encode_frame(outputs)
        if outputs.stats.num_tokens == count:
            thread = (time.thread_time() - thread_started) * 1000
            taken.append(((time.perf_counter() - started) * 1000, thread))
    wall, thread = map(statistics.median, zip(*taken[WARM_UP_STEPS:], strict=True))
    return wall, thread


def _program_alone(runner: ModelRunner, step: list[Any], count: int) -> tuple[float, Pools]:
    """Milliseconds of a step's program when the host does nothing beside it, median of groups; and the pools."""
    program, _, *inputs = step
    pools = runner._pools
    taken = []
    for _ in range(1 + count // GROUP):
        started = time.perf_counter()
        for _ in range(GROUP):
            outputs, pools = runner._execute(program, pools, *inputs)
        jax.block_until_ready(outputs.sampled)
        taken.append((time.perf_counter() - started) * 1000 / GROUP)
    return statistics.median(taken[1:]), pools


if __name__ == "__main__":
    main()
