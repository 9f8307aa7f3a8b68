"""Long prompts beside sequences that decode: by layers, in steps that are no longer than theirs."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.layered_prefill import LayeredPrefill
from jaxserve.messages import AddRequest
from jaxserve.model_runner import ModelRunner, StepResult
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.sequence import Sequence
from jaxserve.step_plan import ALL_LAYERS, StepPlan
from tests.scheduling import make_scheduler, make_sequence, names, rows_of, run_step
from tests.tiny_llama import BASE

NUM_LAYERS = 10


def beside_a_stream(*prompts: Sequence, num_streams: int = 1, **limits: Any) -> Scheduler:
    """A scheduler in which streams decode already, one token in each step that takes a second."""
    scheduler = make_scheduler(
        **{"num_blocks": 100, "budget": 8, "max_model_len": 100, "num_layers": NUM_LAYERS} | limits
    )
    for i in range(num_streams):
        scheduler.add(make_sequence(f"stream {i}", [2, 2], max_tokens=40))
    for _ in range(2):
        scheduler.layered.settle(run_step(scheduler), 1.0)
    for prompt in prompts:
        scheduler.add(prompt)
    return scheduler


def run(scheduler: Scheduler, num_steps: int, *, layer_s: float) -> list[StepPlan]:
    """Steps in which a layer of the chunk takes so long."""
    plans = []
    for _ in range(num_steps):
        plan = run_step(scheduler)
        first, stop = plan.layers
        scheduler.layered.settle(plan, (stop - first) * layer_s if plan.is_layered else 1.0)
        scheduler.check_integrity()
        plans.append(plan)
    return plans


def test_steps_of_a_chunk_and_of_those_who_decode_alternate_and_take_no_longer() -> None:
    scheduler = beside_a_stream(make_sequence("long", [1] * 17))
    plans = run(scheduler, 14, layer_s=0.19)
    assert [plan.layers for plan in plans[1:9:2]] == [(0, 1), (1, 4), (4, 7), (7, 10)]
    assert all(rows_of(plan) == [("long", 8)] for plan in plans[1:9:2])
    assert all(rows_of(plan) == [("stream 0", 1)] and plan.layers == ALL_LAYERS for plan in plans[0:9:2])
    assert [plan.layers for plan in plans[9:]] == [(0, 3), ALL_LAYERS, (3, 6), ALL_LAYERS, (6, 9)]


def test_where_more_prompts_wait_than_sequences_decode_a_chunk_takes_as_many_times_longer() -> None:
    prompts = [make_sequence(f"long {i}", [3 + i] * 17) for i in range(4)]
    scheduler = beside_a_stream(*prompts, num_streams=2, max_num_seqs=5)
    assert [plan.layers for plan in run(scheduler, 8, layer_s=0.45)[1::2]] == [
        (0, 1),
        (1, 4),
        (4, 7),
        (7, 10),
    ]


def test_a_layer_that_takes_longer_than_a_decode_step_comes_alone() -> None:
    scheduler = beside_a_stream(make_sequence("long", [1] * 17))
    assert [plan.layers for plan in run(scheduler, 8, layer_s=2.5)[1::2]] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_the_token_that_is_sampled_from_is_computed_with_those_who_decode() -> None:
    scheduler = beside_a_stream(make_sequence("long", [1] * 12))
    plans = [plan for plan in run(scheduler, 6, layer_s=0.05) if not plan.is_layered or plan.layers[0] == 0]
    assert [rows_of(plan) for plan in plans] == [
        [("stream 0", 1)],
        [("long", 8)],
        [("stream 0", 1)],
        [("stream 0", 1)],
        [("long", 3)],
    ]
    last = run(scheduler, 2, layer_s=0.05)[-1]
    assert sorted(rows_of(last)) == [("long", 1), ("stream 0", 1)]
    assert all(row.samples for row in last.rows)


def test_short_prompts_run_beside_a_chunk_and_other_long_ones_after_it() -> None:
    prompts = [
        make_sequence(name, [3 + i] * n) for i, (name, n) in enumerate([("a", 10), ("b", 10), ("c", 3)])
    ]
    scheduler = beside_a_stream(*prompts)
    plans = run(scheduler, 1, layer_s=0.01)
    assert rows_of(plans[0]) == [("stream 0", 1), ("c", 3)]
    assert names(scheduler.waiting) == ["b"]
    plans = run(scheduler, 11, layer_s=0.01)
    layered = [rows_of(plan)[0] for plan in plans if plan.is_layered and plan.layers[1] == NUM_LAYERS]
    assert layered == [("a", 8), ("a", 1), ("b", 8), ("b", 1)]


def test_with_nobody_left_who_decodes_all_layers_come_at_once() -> None:
    scheduler = beside_a_stream(make_sequence("long", [1] * 17))
    run(scheduler, 2, layer_s=0.1)
    scheduler.abort(next(s for s in scheduler.running if s.request_id == "stream 0"))
    plans = run(scheduler, 2, layer_s=0.1)
    assert [plan.layers for plan in plans] == [(1, NUM_LAYERS), ALL_LAYERS]
    assert [rows_of(plan) for plan in plans] == [[("long", 8)], [("long", 8)]]


@pytest.mark.parametrize("limits", [{"num_layers": 0}, {"num_streams": 0}, {"budget": 20}], ids=str)
def test_else_prompts_are_not_cut_by_layers(limits: dict[str, Any]) -> None:
    """Not if nobody decodes, nor if one step takes the whole prompt."""
    scheduler = beside_a_stream(make_sequence("long", [1] * 17), **limits)
    plans = run(scheduler, 4, layer_s=0.1)
    assert all(plan.layers == ALL_LAYERS for plan in plans)


def test_what_is_known_of_a_chunk_counts_once_all_of_its_layers_are_there() -> None:
    prompt = [1, 2] * 9
    scheduler = beside_a_stream(make_sequence("long", prompt))
    run(scheduler, 2, layer_s=0.3)
    again = make_sequence("again", prompt)
    assert scheduler.block_manager.take_cached_prefix(again) == 0
    run(scheduler, 10, layer_s=0.3)
    assert scheduler.block_manager.take_cached_prefix(again) == 8
    scheduler.block_manager.free(again)


def test_a_chunk_whose_sequence_is_preempted_begins_again() -> None:
    long = make_sequence("long", [1] * 17)
    scheduler = beside_a_stream(long)
    run(scheduler, 2, layer_s=0.15)
    scheduler._preempt(long)
    assert not scheduler.layered.is_under_way
    assert [plan.layers for plan in run(scheduler, 2, layer_s=0.1)] == [ALL_LAYERS, (0, 4)]


def test_an_aborted_chunk_makes_room_for_the_next() -> None:
    long, other = make_sequence("long", [1] * 17), make_sequence("other", [3] * 17)
    scheduler = beside_a_stream(long, other)
    run(scheduler, 2, layer_s=0.1)
    scheduler.abort(long)
    assert [rows_of(plan)[0] for plan in run(scheduler, 2, layer_s=0.1)] == [("stream 0", 1), ("other", 8)]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    directory: Path = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(BASE | {"num_hidden_layers": 5}))
    config = EngineConfig(
        model=str(directory),
        load_format="dummy",
        max_num_seqs=8,
        max_num_batched_tokens=64,
        block_size=8,
        kv_cache_memory_bytes=4 << 20,
        compilation_cache=False,
    )
    return ModelRunner(config)


PROMPT = [(7 * i * i + 3 * i) % BASE["vocab_size"] for i in range(201)]


class Outcome(NamedTuple):
    """What the long prompt brings beside four streams: tokens by choice, and all logprobs; and the layers that steps
    computed of it where they did not compute all."""

    tokens: dict[int, list[int]]
    logprobs: list[float]
    layers: list[tuple[int, int]]


def run_beside_streams(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, params: SamplingParams, **limits: Any
) -> Outcome:
    engine = Engine(runner, replace(runner.limits, **limits))
    for i in range(4):
        stream = SamplingParams(max_tokens=100, ignore_eos=True, seed=i)
        engine.add_request(AddRequest(request_id=f"stream {i}", prompt_token_ids=[i + 1], params=stream))
    for _ in range(5):
        engine.step()
    engine.add_request(AddRequest(request_id="long", prompt_token_ids=PROMPT, params=params))
    outcome = Outcome(defaultdict(list), [], [])
    begin = runner.run

    def run(plan: StepPlan) -> StepResult:
        outcome.layers.extend([plan.layers] if plan.is_layered else [])
        return begin(plan)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", run)
        while engine.has_work:
            for output in engine.step().outputs:
                if output.request_id == "long":
                    outcome.tokens[output.index] += output.token_ids
                    entries = [*(output.logprobs or []), *(output.prompt_logprobs or [])]
                    outcome.logprobs.extend(
                        x for entry in entries for x in [entry.logprob, *entry.top_logprobs]
                    )
            engine.scheduler.check_integrity()
    assert engine.stats().xla_compilations == 0
    return outcome


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"n": 3, "temperature": 1.0, "seed": 5},
        {"logprobs": 2, "prompt_logprobs": 2},
        {"use_beam_search": True, "n": 2, "temperature": 0.0},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_layer_by_layer_a_prompt_brings_what_it_brings_at_once(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    monkeypatch.setattr(LayeredPrefill, "_count", lambda *_: 2)
    sampling = SamplingParams(**({"max_tokens": 6, "temperature": 0.0} | params))
    by_layers = run_beside_streams(runner, monkeypatch, sampling)
    assert by_layers.layers == [(0, 2), (2, 4), (4, 5)] * 4
    at_once = run_beside_streams(runner, monkeypatch, sampling, num_layers=0)
    assert at_once.layers == []
    assert by_layers.tokens == at_once.tokens
    assert by_layers.logprobs == pytest.approx(at_once.logprobs, abs=1e-4)
    assert bool(at_once.logprobs) == ("logprobs" in params)
