"""Steps that are begun before the tokens of the last one are known: the same results, and no waiting for the host."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.messages import AbortRequest, AddRequest, SequenceOutput
from jaxserve.model_runner import ModelRunner, StepResult
from jaxserve.sampling_params import SamplingParams
from jaxserve.step_plan import StepPlan
from tests.tiny_llama import BASE

V = BASE["vocab_size"]
BAD_WORDS = tuple(
    (i, j) for i in range(0, V, 11) for j in (3, 4, 5)
)  # of two tokens: the host must see the first
FEATURES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    {"temperature": 0.0, "min_tokens": 9, "logit_bias": ((0, 50.0), (7, -3.0))},
    {"temperature": 1.5, "stop_token_ids": tuple(range(0, V, 9))},
    {"temperature": 1.0, "n": 3, "logprobs": 3},
    {"temperature": 1.0, "n": 2, "best_of": 4},
    {"temperature": 0.7, "bad_words_token_ids": BAD_WORDS},
    {"temperature": 0.0, "use_beam_search": True, "n": 2, "best_of": 3, "logprobs": 1},
    {"temperature": 1.0, "prompt_logprobs": 2},
    {"prompt_logprobs": 0, "max_tokens": 0},
]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    directory: Path = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(BASE))
    config = EngineConfig(
        model=str(directory),
        load_format="dummy",
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        block_size=8,
        kv_cache_memory_bytes=4 << 20,
        compilation_cache=False,
    )
    return ModelRunner(config)


def make_engine(runner: ModelRunner, **limits: Any) -> Engine:
    return Engine(runner, replace(runner.limits, **limits))


def request(name: str, **params: Any) -> AddRequest:
    sampling = SamplingParams(**({"max_tokens": 20, "temperature": 0.0, "ignore_eos": True} | params))
    return AddRequest(request_id=name, prompt_token_ids=[5, 6, 7], params=sampling)


def requests_of_all_kinds(count: int) -> list[AddRequest]:
    rng = random.Random(2)
    shared = [rng.randrange(V) for _ in range(40)]
    requests = []
    for i in range(count):
        prompt = shared[: rng.randrange(41)] + [rng.randrange(V) for _ in range(rng.randrange(1, 30))]
        params = SamplingParams(
            **({"max_tokens": rng.randrange(10, 25), "seed": i} | FEATURES[i % len(FEATURES)])
        )
        requests.append(
            AddRequest(request_id=str(i), prompt_token_ids=prompt, params=params, eos_token_ids=(0, 1))
        )
    return requests


@dataclass
class Brought:
    """What a sequence brought, but for times and what was cached. Other batches round otherwise: numbers are apart."""

    tokens: list[int] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)
    ranked: list[list[int]] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)


def outputs_of(engine: Engine, requests: list[AddRequest]) -> dict[tuple[str, int], Brought]:
    """Run requests that arrive in between."""
    rng = random.Random(3)
    waiting = requests[::-1]
    found: dict[tuple[str, int], Brought] = defaultdict(Brought)
    while waiting or engine.has_work:
        for _ in range(min(rng.randrange(4), len(waiting))):
            engine.add_request(waiting.pop())
        if not engine.has_work:
            continue
        for o in engine.step().outputs:
            brought = found[o.request_id, o.index]
            brought.tokens += o.token_ids
            brought.ends += [(o.finish_reason, o.stop_reason, o.error)] if o.finish_reason else []
            for entry in (*(o.logprobs or ()), *(o.prompt_logprobs or ())):
                brought.ranked.append(entry.top_ids)
                brought.numbers += [entry.logprob, *entry.top_logprobs]
        engine.scheduler.check_integrity()
    assert engine.block_manager.usage == 0.0
    return found


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"num_blocks": 18},
        {"max_num_batched_tokens": 7, "max_num_seqs": 5},
        {"enable_prefix_caching": False},
        {"async_scheduling": False, "num_blocks": 18, "max_num_seqs": 6},
    ],
    ids=str,
)
def test_results_are_the_same_whether_or_not_steps_run_ahead(
    runner: ModelRunner, limits: dict[str, Any]
) -> None:
    requests = requests_of_all_kinds(44)
    waits = outputs_of(make_engine(runner, async_scheduling=False), requests)
    engine = make_engine(runner, **limits)
    ahead = outputs_of(engine, requests)
    assert ahead.keys() == waits.keys()
    for key, brought in ahead.items():
        numbers, brought.numbers = brought.numbers, waits[key].numbers
        assert brought == waits[key], key
        assert numbers == pytest.approx(brought.numbers, abs=1e-4)
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in limits)


class Recorder:
    """A model runner that notes when steps are begun and when their results are asked for."""

    def __init__(self, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        self.plans: list[StepPlan] = []
        run, read = runner.run, StepResult.token_ids.func
        results: list[StepResult] = []

        def recorded_run(plan: StepPlan) -> StepResult:
            self.events.append(("begin", len(results)))
            self.plans.append(plan)
            results.append(run(plan))
            return results[-1]

        def recorded_read(result: StepResult) -> list[int]:
            self.events.append(("read", results.index(result)))
            return read(result)

        monkeypatch.setattr(runner, "run", recorded_run)
        monkeypatch.setattr(StepResult, "token_ids", property(recorded_read))

    def rows_of(self, name: str) -> list[int]:
        """Steps that `name` was in."""
        return [
            i for i, plan in enumerate(self.plans) if any(r.sequence.request_id == name for r in plan.rows)
        ]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_step_is_begun_before_the_results_of_the_last_one_are_read(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    recorder = Recorder(runner, monkeypatch)
    engine = make_engine(runner, async_scheduling=ahead)
    engine.add_request(request("a", max_tokens=4))
    while engine.has_work:
        engine.step()
    begun, read = (
        [i for i, event in enumerate(recorder.events) if event[0] == kind] for kind in ("begin", "read")
    )
    assert len(begun) == len(read) == 4  # the end by length is known ahead: nothing is computed in vain
    assert all((later < earlier) == ahead for later, earlier in zip(begun[1:], read, strict=False))


def test_all_sequences_are_in_all_steps(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(runner, monkeypatch)
    engine = make_engine(runner)
    for name in "abcdef":
        engine.add_request(request(name))
    while engine.has_work:
        engine.step()
    assert [len(plan.rows) for plan in recorder.plans] == [6] * 20


def test_one_that_needs_the_host_sits_out_every_other_step_beside_many(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(runner, monkeypatch)
    engine = make_engine(runner)
    for name in "abcdef":
        engine.add_request(request(name))
    engine.add_request(request("needs", bad_words_token_ids=BAD_WORDS, max_tokens=8))
    while engine.has_work:
        engine.step()
    assert recorder.rows_of("a") == list(range(20))
    assert recorder.rows_of("needs") == list(range(0, 16, 2))


def test_where_many_need_the_host_nobody_runs_ahead(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(runner, monkeypatch)
    engine = make_engine(runner)
    for name in "ab":
        engine.add_request(request(name))
        engine.add_request(request(f"needs/{name}", bad_words_token_ids=BAD_WORDS))
    while engine.has_work:
        engine.step()
    assert [len(plan.rows) for plan in recorder.plans] == [4] * 20


def test_aborts_and_ends_between_steps_leave_the_others_as_they_are(runner: ModelRunner) -> None:
    """Blocks of a sequence that ends are used again while a step still writes into them."""
    few = 1 + 128 // runner.limits.block_size
    names = [f"{kind}/{i}" for i in range(6) for kind in ("stops", "aborted", "stays")]

    def add(engine: Engine, name: str) -> None:
        stops = {"stop_token_ids": tuple(range(0, V, 3))} if name.startswith("stops") else {}
        engine.add_request(
            request(name, temperature=1.0, seed=len(name) + int(name[-1]), max_tokens=30, **stops)
        )

    alone: dict[str, list[int]] = {}
    for name in names:
        engine = make_engine(runner, async_scheduling=False, enable_prefix_caching=False)
        add(engine, name)
        alone[name] = [t for o in _run(engine) for t in o.token_ids]
    engine = make_engine(runner, num_blocks=few)
    together: dict[str, list[int]] = {name: [] for name in names}
    for name in names:
        add(engine, name)
    rng = random.Random(1)
    aborted = [name for name in names if name.startswith("aborted")]
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.request_id not in aborted or output.finish_reason is None or output.token_ids
            together[output.request_id] += output.token_ids
        if rng.random() < 0.2 and aborted:
            engine.abort_request(AbortRequest(request_id=aborted.pop()))
        engine.scheduler.check_integrity()
    for name in names:
        assert together[name] == alone[name][: len(together[name])]
        assert name.startswith("aborted") or together[name] == alone[name]


def test_an_engine_whose_requests_were_aborted_has_no_work_and_serves_the_next(runner: ModelRunner) -> None:
    engine = make_engine(runner)
    expected = [o.token_ids for o in _run(_with(engine, request("a")))]
    _with(engine, request("b")).step()
    engine.abort_request(AbortRequest(request_id="b"))
    assert not engine.has_work
    assert engine.block_manager.usage == 0.0
    assert [o.token_ids for o in _run(_with(engine, request("b")))] == expected


def test_what_was_generated_is_found_by_the_next_turn(runner: ModelRunner) -> None:
    engine = make_engine(runner)
    said = [t for o in _run(_with(engine, request("a"))) for t in o.token_ids]
    params = SamplingParams(max_tokens=1)
    turn = AddRequest(request_id="b", prompt_token_ids=[5, 6, 7, *said, 9], params=params)
    (output,) = _run(_with(engine, turn))
    assert output.num_cached_tokens == 16  # 22 of the 23 tokens have KV: two full blocks of 8


def _with(engine: Engine, added: AddRequest) -> Engine:
    engine.add_request(added)
    return engine


def _run(engine: Engine) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    while engine.has_work:
        outputs += [o for o in engine.step().outputs if o.token_ids]
    return outputs
