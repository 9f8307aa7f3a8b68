"""What a limit of the scheduler changes: python scripts/bench_limits.py MODEL --against '{"token_buckets": []}'.

Two engines on one model and its programs, one under the usual limits and one with some of them replaced (fields of
`SchedulerConfig`), serve the same load in turn, in-process: as many requests at once as `--concurrency`, each of
`--prompt-tokens` and `--max-tokens`; whoever ends is followed by the next. Prints output tokens a second of both,
median time to the first token and per token after it (of a request), and the ratio of each turn with its neighbour.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.messages import AddRequest
from jaxserve.model_runner import ModelRunner
from jaxserve.sampling_params import SamplingParams


class Turn(NamedTuple):
    """Medians over requests, in milliseconds."""

    tokens_per_s: float
    first_token: float
    per_token: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--against", type=json.loads, required=True, help="limits to replace, a JSON object")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[128, 128], help="least and most")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="requests of each seat in a turn")
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()
    runner = ModelRunner(EngineConfig(model=args.model, max_model_len=2048))
    rng = np.random.default_rng(0)
    print("concurrency  tok/s: usual, against  ratio (spread)        first token, ms  per token, ms")
    for concurrency in args.concurrency:
        limits = replace(runner.limits, enable_prefix_caching=False)
        both = limits, replace(limits, **{k: _as_tuple(v) for k, v in args.against.items()})
        turns: tuple[list[Turn], list[Turn]] = [], []
        for turn in range(args.turns):
            lengths = rng.integers(
                args.prompt_tokens[0], args.prompt_tokens[1] + 1, max(4, args.rounds * concurrency)
            )
            prompts = [rng.integers(1000, 40_000, n).tolist() for n in lengths]
            for i in (0, 1) if turn % 2 else (1, 0):
                turns[i].append(_turn(Engine(runner, both[i]), prompts, concurrency, args.max_tokens))
        usual, against = ([statistics.median(column) for column in zip(*own, strict=True)] for own in turns)
        ratios = sorted(a.tokens_per_s / b.tokens_per_s for a, b in zip(*turns, strict=True))
        spread = f"({ratios[0]:.3f} - {ratios[-1]:.3f})"
        print(
            f"{concurrency:11d}  {usual[0]:12.1f}, {against[0]:7.1f}  {statistics.median(ratios):5.3f} {spread}"
            f"  {usual[1]:7.0f}, {against[1]:6.0f}  {usual[2]:6.1f}, {against[2]:.1f}",
            flush=True,
        )


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _turn(engine: Engine, prompts: list[list[int]], concurrency: int, max_tokens: int) -> Turn:
    arrived: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    waiting = list(enumerate(prompts))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)

    def admit() -> None:
        while waiting and len(times) - sum(len(own) == max_tokens for own in times.values()) < concurrency:
            i, prompt = waiting.pop(0)
            arrived[str(i)], times[str(i)] = time.perf_counter(), []
            engine.add_request(AddRequest(request_id=str(i), prompt_token_ids=prompt, params=params))

    started = time.perf_counter()
    admit()
    while engine.has_work:
        outputs = engine.step().outputs
        now = time.perf_counter()
        for output in outputs:
            times[output.request_id] += [now] * len(output.token_ids)
        admit()
    seconds = time.perf_counter() - started
    return Turn(
        len(prompts) * max_tokens / seconds,
        1000 * statistics.median(own[0] - arrived[i] for i, own in times.items()),
        1000 * statistics.median((own[-1] - own[0]) / (len(own) - 1) for own in times.values()),
    )


if __name__ == "__main__":
    main()
