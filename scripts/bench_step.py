"""What a decode step costs, by feature: python scripts/bench_step.py MODEL [--batch 16] [--steps 60].

In-process, no server. Each variant is measured in turn, several times around, and reported as the median of its steps
and as a ratio to plain greedy decoding (with --only: to the first variant named) in the same rounds.
With --against, greedy decoding and prefill are compared between two engines instead, in turn:

    python scripts/bench_step.py MODEL --against '{"quantization": "int8"}'
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import LLM, SamplingParams, sampler, step
from jaxserve.constraints.constraint import CompiledConstraint, Constraint
from jaxserve.messages import AbortRequest, AddRequest
from jaxserve.sampler import SampleOutputs, SamplingInputs
from jaxserve.sharding import VocabShard

SCHEMA = {"type": "array", "items": {"type": "string"}, "minItems": 400}


class Variant(NamedTuple):
    """`params` for sequence i; `every`: only each every-th sequence is constrained."""

    params: Callable[[int], dict[str, Any]]
    every: int = 0


def _mixed(i: int) -> dict[str, Any]:
    features: list[dict[str, Any]] = [
        {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.02},
        {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 1.0, "logit_bias": tuple((j, 0.5) for j in range(300))},
        {"temperature": 0.0, "bad_words_token_ids": ((5, 6), (7,)), "min_tokens": 800, "logprobs": 5},
    ]
    return features[i % len(features)]


GREEDY_ONLY = "greedy, a program that can do nothing else"
VARIANTS: dict[str, Variant] = {
    "greedy": Variant(lambda _: {"temperature": 0.0}),
    "temperature": Variant(lambda _: {"temperature": 1.0}),
    "top_p 0.9, top_k 50, min_p": Variant(lambda _: _mixed(0)),
    "penalties": Variant(lambda _: _mixed(1)),
    "logit_bias, 300 entries": Variant(lambda _: _mixed(2)),
    "logprobs 5": Variant(lambda _: {"temperature": 0.0, "logprobs": 5}),
    "all features in one batch": Variant(_mixed),
    "half constrained": Variant(lambda _: {"temperature": 0.0}, every=2),
    "all constrained": Variant(lambda _: {"temperature": 0.0}, every=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", action="append", help="measure steps of this variant and no sequences; repeatable"
    )
    parser.add_argument("--against", type=json.loads, help="settings of a second engine, a JSON object")
    args = parser.parse_args()
    if args.against is not None:
        _compare(args)
        return
    llm = LLM(args.model, max_model_len=1024)
    greedy_only = _greedy_only(args.model) if not args.only or GREEDY_ONLY in args.only else llm
    schema = Constraint(kind="json_schema", text=json.dumps(SCHEMA))
    constraint = llm.engine.text_constraints.compiler(llm.eos_token_ids).compile(schema)
    names = args.only or [GREEDY_ONLY, *VARIANTS]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            if name == GREEDY_ONLY:
                times[name].append(_decode(greedy_only, VARIANTS["greedy"], constraint, args, args.batch))
            else:
                times[name].append(_decode(llm, VARIANTS[name], constraint, args, args.batch))
    base = statistics.median(times[names[0]] if args.only else times["greedy"])
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.1f} - {max(values):.1f}"
        print(f"{name:42s} {median:7.1f} ms ({spread})  {median / base:.3f} x")
    if args.only:
        return
    beams, plain = _sequences(llm, args, beams=True), _sequences(llm, args, beams=False)
    print(
        f"beam search of width 4, 64 tokens: {beams:.2f} s; 4 greedy sequences: {plain:.2f} s; {beams / plain:.2f} x"
    )
    rated, unrated = _prefill(llm, args, 1), _prefill(llm, args, None)
    print(
        f"prompt of 512 tokens: {unrated:.2f} s, with prompt_logprobs {rated:.2f} s; {rated / unrated:.2f} x"
    )


def _greedy_only(model: str) -> LLM:
    """Its programs hold none of the sampler but the argmax."""

    def sample(
        logits: jax.Array,
        _: Any,
        read: Callable[[], SamplingInputs],
        vocab: VocabShard,
        *,
        max_logprobs: int,
        **__: Any,
    ) -> SampleOutputs:
        S, V = read().temperature.shape[0], vocab.size
        logprobs = jnp.zeros((S, 2 + 2 * max_logprobs), jnp.int32)
        candidates = jnp.zeros((S, 3 * min(sampler.NUM_BEAM_CANDIDATES, V)), jnp.int32)
        return SampleOutputs(vocab.argmax(logits[:S]), logprobs, candidates)

    def prompt_logprobs(*_: Any) -> jax.Array:
        return jnp.zeros((0, 2), jnp.int32)

    with (
        mock.patch.object(step, "sample", sample),
        mock.patch.object(step, "_prompt_logprobs", prompt_logprobs),
    ):
        # whose traces would be taken for those of the whole step
        return LLM(model, max_model_len=1024, compilation_cache=False)


def _prompt(args: argparse.Namespace, length: int | None = None) -> list[int]:
    rng = np.random.default_rng()
    return [int(i) for i in rng.integers(100, 40000, length or args.context)]


def _compare(args: argparse.Namespace) -> None:
    """Two engines in turn: decode steps of several batch sizes, and prefill."""
    engines = [LLM(args.model, max_model_len=1024, **settings) for settings in ({}, args.against)]
    measures: dict[str, Callable[[LLM], float]] = {
        f"decode, {batch} at {args.context} tokens": partial(_decode_greedily, args, batch)
        for batch in (1, 8, 16, 64)
    }
    measures["prompt of 512 tokens"] = lambda llm: 1000 * _prefill(llm, args, None)
    for name, measure in measures.items():
        rounds = [[measure(llm) for llm in engines] for _ in range(args.rounds)]
        first, second = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = sorted(a / b for a, b in rounds)
        print(
            f"{name:32s} {first:7.1f} ms, against {second:7.1f} ms; {first / second:.2f} x "
            f"({ratios[0]:.2f} - {ratios[-1]:.2f})",
            flush=True,
        )


def _decode_greedily(args: argparse.Namespace, batch: int, llm: LLM) -> float:
    return _decode(llm, VARIANTS["greedy"], None, args, batch)


def _decode(
    llm: LLM, variant: Variant, constraint: CompiledConstraint | None, args: argparse.Namespace, batch: int
) -> float:
    """Median milliseconds of a step in which all sequences decode."""
    engine = llm.engine
    for i in range(batch):
        engine.add_request(
            AddRequest(
                request_id=str(i),
                prompt_token_ids=_prompt(args),
                params=SamplingParams(max_tokens=800, ignore_eos=True, seed=i, **variant.params(i)),
                eos_token_ids=llm.eos_token_ids,
                constraint=constraint if variant.every and i % variant.every == 0 else None,
            )
        )
    taken = []
    while len(taken) < args.steps:
        started = time.perf_counter()
        outputs = engine.step()
        if outputs.stats.num_tokens == batch:
            taken.append((time.perf_counter() - started) * 1000)
    for i in range(batch):
        engine.abort_request(AbortRequest(request_id=str(i)))
    return statistics.median(taken)


def _sequences(llm: LLM, args: argparse.Namespace, *, beams: bool) -> float:
    """Seconds for one beam search of width 4, or for four greedy sequences, median of three."""
    seconds = []
    for _ in range(3):
        params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 64, "ignore_eos": True, "n": 4}
        started = time.perf_counter()
        llm.generate([_prompt(args)], SamplingParams(use_beam_search=beams, **params))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _prefill(llm: LLM, args: argparse.Namespace, prompt_logprobs: int | None) -> float:
    seconds = []
    for _ in range(3):
        params = SamplingParams(max_tokens=1, prompt_logprobs=prompt_logprobs)
        started = time.perf_counter()
        llm.generate([_prompt(args, 512)], params)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
