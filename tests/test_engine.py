"""What the engine promises: a result never depends on the batch, the budget, preemption or the cache."""

from __future__ import annotations

import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from jaxserve import model_runner
from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.errors import RequestError
from jaxserve.messages import AbortRequest, AddRequest, SequenceOutput
from jaxserve.model_runner import PROGRAM_BYTES_GUESS, ModelRunner, StepResult
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import logits_sizes
from jaxserve.step_shapes import StepShape, step_programs, step_shapes, token_buckets
from tests.argmax_sampler import argmax_alone

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "dtype": "float32",
}
Tokens = dict[tuple[str, int], list[int]]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A tiny float32 model with random weights, compiled once for all tests of this file."""
    directory: Path = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(TINY))
    config = EngineConfig(
        model=str(directory),
        load_format="dummy",
        max_num_seqs=16,
        max_num_batched_tokens=128,
        block_size=8,
        kv_cache_memory_bytes=4 << 20,
        compilation_cache=False,
    )
    return ModelRunner(config)


def make_engine(runner: ModelRunner, **limits: Any) -> Engine:
    return Engine(runner, replace(runner.limits, **limits))


def run_all(engine: Engine, requests: list[AddRequest], *, check: bool = True) -> Tokens:
    """Generate for all of them at once; verifies every invariant after every step."""
    for request in requests:
        engine.add_request(request)
    tokens: Tokens = {}
    while engine.has_work:
        for output in engine.step().outputs:
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        if check:
            engine.scheduler.check_integrity()
    assert engine.block_manager.usage == 0.0
    assert engine.stats().xla_compilations == 0
    return tokens


def mixed_requests(count: int, seed: int = 0) -> list[AddRequest]:
    """Greedy and sampled, short and long, with shared prefixes and several sequences."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(300) for _ in range(40)] for _ in range(3)]
    requests = []
    for i in range(count):
        prompt = rng.choice(prefixes)[: rng.randrange(41)] + [
            rng.randrange(300) for _ in range(rng.randrange(1, 30))
        ]
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 3]),
            temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.5]),
            top_k=rng.choice([-1, -1, 5, 40]),
            min_p=rng.choice([0.0, 0.0, 0.1]),
            seed=rng.randrange(-(2**63), 2**63),
            max_tokens=rng.randrange(1, 20),
        )
        requests.append(
            AddRequest(request_id=str(i), prompt_token_ids=prompt, params=params, eos_token_ids=(0,))
        )
    return requests


@pytest.fixture(scope="module")
def alone(runner: ModelRunner) -> Tokens:
    """Each of 200 requests on its own, in an engine that remembers nothing."""
    tokens: Tokens = {}
    for request in mixed_requests(200):
        engine = make_engine(runner, enable_prefix_caching=False, async_scheduling=False)
        tokens |= run_all(engine, [request], check=False)
    return tokens


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 17},
        {"enable_prefix_caching": False},
        {"num_blocks": 18},
        {"num_blocks": 18, "max_num_batched_tokens": 5, "enable_prefix_caching": False},
        {"enable_chunked_prefill": False},
        {"async_scheduling": False},
        {"async_scheduling": False, "num_blocks": 18},
    ],
    ids=str,
)
def test_two_hundred_requests_give_the_same_tokens_alone_and_together(
    runner: ModelRunner, alone: Tokens, limits: dict[str, Any]
) -> None:
    engine = make_engine(runner, **limits)
    assert run_all(engine, mixed_requests(200)) == alone
    if "num_blocks" in limits:
        assert engine.scheduler.num_preemptions > 0
    assert (engine.block_manager.num_hit_tokens > 0) == limits.get("enable_prefix_caching", True)


@pytest.mark.parametrize("budget", range(1, 21))
def test_every_chunk_size_gives_the_same_tokens(runner: ModelRunner, alone: Tokens, budget: int) -> None:
    requests = mixed_requests(200)[:20]
    expected = {key: tokens for key, tokens in alone.items() if int(key[0]) < 20}
    assert run_all(make_engine(runner, max_num_batched_tokens=budget), requests) == expected


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"scheduling_policy": "priority", "max_num_seqs": 3},
        {"scheduling_policy": "priority", "num_blocks": 18, "max_num_batched_tokens": 9},
    ],
    ids=str,
)
def test_requests_that_arrive_in_between_change_nothing(
    runner: ModelRunner, alone: Tokens, limits: dict[str, Any]
) -> None:
    engine = make_engine(runner, **limits)
    rng = random.Random(1)
    waiting = mixed_requests(200)[::-1]
    tokens: Tokens = {}
    while waiting or engine.has_work:
        for _ in range(min(rng.randrange(3), len(waiting))):
            priority = rng.randrange(-2, 3) if "scheduling_policy" in limits else 0
            engine.add_request(msgspec.structs.replace(waiting.pop(), priority=priority))
        if engine.has_work:
            for output in engine.step().outputs:
                tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    assert tokens == alone
    assert ("scheduling_policy" in limits) == (engine.scheduler.num_preemptions > 0)


def test_a_choice_is_the_same_whatever_n_is(runner: ModelRunner) -> None:
    def choices(n: int) -> list[list[int]]:
        params = SamplingParams(n=n, seed=7, max_tokens=12)
        request = AddRequest(request_id="r", prompt_token_ids=[1, 2, 3], params=params)
        tokens = run_all(make_engine(runner), [request])
        return [tokens["r", i] for i in range(n)]

    five = choices(5)
    assert choices(3) == five[:3]
    assert len({tuple(tokens) for tokens in five}) == 5


def test_siblings_compute_a_shared_prompt_once(runner: ModelRunner) -> None:
    engine = make_engine(runner, enable_prefix_caching=False)
    params = SamplingParams(n=8, seed=1, max_tokens=2)
    engine.add_request(AddRequest(request_id="r", prompt_token_ids=list(range(60)), params=params))
    assert [engine.step().stats.num_tokens for _ in range(3)] == [59, 8, 8]


def test_without_a_seed_each_request_draws_its_own(runner: ModelRunner) -> None:
    def twice(engine: Engine) -> list[list[int]]:
        results = []
        for name in ("a", "b"):
            params = SamplingParams(max_tokens=12)
            request = AddRequest(request_id=name, prompt_token_ids=[5], params=params)
            results.append(run_all(engine, [request])[name, 0])
        return results

    first, second = twice(make_engine(runner))
    assert first != second
    assert twice(make_engine(runner)) == [first, second]  # the engine's own seed makes a run repeatable


def test_aborting_frees_the_blocks_at_once_wherever_the_request_is(runner: ModelRunner) -> None:
    engine = make_engine(runner, max_num_seqs=2)
    params = SamplingParams(max_tokens=50, temperature=0.0)
    for name, length in (("decoding", 3), ("prefilling", 100), ("queued", 3)):
        engine.add_request(AddRequest(request_id=name, prompt_token_ids=[1] * length, params=params))
    engine.step()
    for name, left in (("queued", 2), ("prefilling", 1), ("decoding", 0)):
        engine.abort_request(AbortRequest(request_id=name))
        engine.scheduler.check_integrity()
        assert len(engine.scheduler.running) + len(engine.scheduler.waiting) == left
    assert engine.block_manager.usage == 0.0
    assert not engine.has_work
    engine.abort_request(AbortRequest(request_id="never heard of"))


def test_aborting_one_choice_leaves_the_others(runner: ModelRunner) -> None:
    params = SamplingParams(n=3, seed=3, max_tokens=10)
    request = AddRequest(request_id="r", prompt_token_ids=[4, 5, 6], params=params)
    expected = run_all(make_engine(runner), [request])
    for aborted in range(3):
        engine = make_engine(runner)
        engine.add_request(request)
        for _ in range(4):
            engine.step()
        engine.abort_request(AbortRequest(request_id="r", indices=[aborted]))
        outputs: list[SequenceOutput] = []
        while engine.has_work:
            outputs += engine.step().outputs
        ended = {o.index: o for o in outputs if o.finish_reason}
        assert set(ended) == {0, 1, 2} - {aborted}
        for index, tokens in ((i, expected["r", i]) for i in ended):
            assert tokens[-len([o for o in outputs if o.index == index]) :] == [
                t for o in outputs if o.index == index for t in o.token_ids
            ]
        assert engine.block_manager.usage == 0.0


@pytest.mark.timing
def test_ten_thousand_waiting_requests_cost_a_step_nothing_and_leave_at_once(runner: ModelRunner) -> None:
    def median_step_s(num_waiting: int) -> tuple[float, Engine]:
        engine = make_engine(runner, max_num_seqs=2, scheduling_policy="priority")
        params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
        for i in range(2 + num_waiting):
            name, priority = str(i), (i * 7919) % 5 if i >= 2 else 0
            engine.add_request(
                AddRequest(request_id=name, prompt_token_ids=[1, 2], params=params, priority=priority)
            )
        times = []
        for _ in range(40):
            started = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - started)
        assert engine.stats().num_waiting == num_waiting
        return statistics.median(times), engine

    alone = min(median_step_s(0)[0] for _ in range(2))
    (one, engine), (other, _) = median_step_s(10_000), median_step_s(10_000)
    assert min(one, other) < 1.5 * alone + 0.0002
    started = time.perf_counter()
    for i in range(2, 10_002):
        engine.abort_request(AbortRequest(request_id=str(i)))
    assert time.perf_counter() - started < 0.5
    assert engine.stats().num_waiting == 0


def test_a_first_output_says_when_a_sequence_was_scheduled_and_what_was_cached(runner: ModelRunner) -> None:
    engine = make_engine(runner)
    prompt = list(range(20))
    params = SamplingParams(max_tokens=1, temperature=0.0)
    run_all(engine, [AddRequest(request_id="a", prompt_token_ids=prompt, params=params)])
    engine.add_request(AddRequest(request_id="b", prompt_token_ids=prompt, params=params))
    first, second = engine.step().outputs
    assert first.scheduled_at is not None
    assert first.token_ids == []
    assert second.num_cached_tokens == 16
    assert second.finish_reason == "length"


def test_logprobs_come_with_every_token_of_rows_that_asked(runner: ModelRunner) -> None:
    engine = make_engine(runner)
    asks = AddRequest(
        request_id="a", prompt_token_ids=[1, 2], params=SamplingParams(max_tokens=3, logprobs=2, seed=1)
    )
    plain = AddRequest(request_id="b", prompt_token_ids=[1, 2], params=SamplingParams(max_tokens=3, seed=1))
    engine.add_request(asks)
    engine.add_request(plain)
    outputs = []
    while engine.has_work:
        outputs += [o for o in engine.step().outputs if o.token_ids]
    for output in outputs:
        if output.request_id == "b":
            assert output.logprobs is None
            continue
        assert output.logprobs is not None
        (entry,) = output.logprobs
        assert len(entry.top_ids) == len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0] >= entry.top_logprobs[1]
        assert entry.logprob <= 0.0
        assert (entry.rank == 1) == (output.token_ids[0] == entry.top_ids[0])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt_token_ids": []}, "prompt"),
        ({"prompt_token_ids": [300]}, "prompt"),
        ({"prompt_token_ids": [-1]}, "prompt"),
        ({"prompt_token_ids": [1] * 128}, "prompt"),
        ({"request_id": "taken"}, "request_id"),
        ({"params": SamplingParams(logprobs=21)}, "logprobs"),
        ({"priority": 1}, "priority"),
    ],
    ids=str,
)
def test_a_request_that_slips_through_is_refused_and_harms_nobody(
    runner: ModelRunner, change: dict[str, Any], param: str
) -> None:
    engine = make_engine(runner)
    fields: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": [1],
        "params": SamplingParams(max_tokens=2),
    }
    engine.add_request(
        AddRequest(request_id="taken", prompt_token_ids=[1], params=SamplingParams(max_tokens=2))
    )
    with pytest.raises(RequestError) as refusal:
        engine.add_request(AddRequest(**(fields | change)))
    assert refusal.value.param == param
    assert len(run_all(engine, [])["taken", 0]) == 2


def test_buckets_are_at_most_eight_and_reach_the_budget() -> None:
    assert token_buckets(512, (1, 8)) == [1, 8, 16, 32, 64, 128, 256, 512]
    assert token_buckets(1, (1, 8)) == [1, 8, 16]
    assert token_buckets(100, (16,)) == [16, 32, 64, 112]
    for budget in (1, 7, 8, 9, 2048, 8192, 131072):
        buckets = token_buckets(budget, (1, 8))
        assert len(buckets) <= 8
        assert buckets == sorted(buckets)
        assert buckets[-1] >= budget


def test_accelerators_decode_with_programs_of_their_own() -> None:
    shapes = step_shapes(token_buckets(2048, (16,)), 256, max_num_seqs=256, blocks_per_row=4)
    sizes = [(shape.num_tokens, shape.decode_only) for shape in shapes]
    decode = [(16, True), (32, True), (64, True), (128, True), (256, True)]
    assert sizes == [*decode, (256, False), (1024, False), (2048, False)]
    assert [shape.prompt_logprobs for shape in shapes] == [False] * 7 + [True]
    few = step_shapes(token_buckets(100, (16,)), 256, max_num_seqs=24, blocks_per_row=4)
    assert [(s.num_tokens, s.num_rows, s.decode_only) for s in few] == [
        (16, 16, True), (32, 24, True), (112, 24, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "max_num_seqs", "together"),
    [
        (256, 64, [[1], [8, 16, 32, 64, 128, 256]]),
        (256, 8, [[1], [8, 16, 32, 64, 128, 256]]),
        (8192, 64, [[1], [8, 16, 32, 64, 128], [4096, 8192]]),
        (1, 64, [[1], [8, 16]]),
    ],
)
def test_shapes_of_several_rows_share_programs_on_a_cpu(
    budget: int, max_num_seqs: int, together: list[list[int]]
) -> None:
    shapes = step_shapes(token_buckets(budget, (1, 8)), None, max_num_seqs=max_num_seqs, blocks_per_row=4)
    programs = step_programs(shapes, shared=True)
    assert [[shape.num_tokens for shape in program.shapes] for program in programs] == together
    for program in programs:
        for shape in program.shapes:
            for name, dims in shape.fields.items():
                assert all(a <= b for a, b in zip(dims, program.layout.fields[name], strict=True)), name
    assert [program.shapes for program in step_programs(shapes, shared=False)] == [(s,) for s in shapes]


def start_another(runner: ModelRunner) -> ModelRunner:
    """With few programs, and small ones; what is compiled for it, `runner` must not count."""
    try:
        with argmax_alone():
            return ModelRunner(replace(runner.config, max_num_batched_tokens=16))
    finally:
        runner.compilations.reset()


def test_every_shape_and_every_number_of_logits_has_run_before_ready(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: set[tuple[int, int, int]] = set()
    execute = ModelRunner._execute

    def recorded(self: ModelRunner, program: int, pools: Any, packed: Any, tables: Any) -> Any:
        inputs = self._programs[program].layout.unpack(packed)
        ran.add((program, int(inputs["shape_index"][0]), int(inputs["counts"][5])))
        return execute(self, program, pools, packed, tables)

    monkeypatch.setattr(ModelRunner, "_execute", recorded)
    programs = start_another(runner)._programs
    assert {run[:2] for run in ran} == {(i, j) for i, p in enumerate(programs) for j in range(len(p.shapes))}
    sizes = {(i, size) for i, p in enumerate(programs) for size in logits_sizes(p.layout.num_rows)}
    assert {(program, size) for program, _, size in ran} == sizes


def test_the_log_says_which_attention_serves_and_why_not_a_faster_one() -> None:
    runner: Any = SimpleNamespace(
        platform="gpu", attention_backend="blocked", _passed_over={"a": "it is odd"}
    )
    assert ModelRunner.describe_attention(runner) == "Attention: blocked; a does not fit: it is odd"
    runner.platform = "cpu"
    assert ModelRunner.describe_attention(runner) is None


@pytest.mark.heavy
@pytest.mark.parametrize("num_blocks", [40, pytest.param(80, marks=pytest.mark.sweep)])
def test_a_wrong_guess_of_the_number_of_blocks_is_corrected(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, num_blocks: int
) -> None:
    def count(self: ModelRunner, *, program_bytes: int) -> int:
        return 60 if program_bytes == PROGRAM_BYTES_GUESS else num_blocks

    monkeypatch.setattr(ModelRunner, "_num_blocks", count)
    corrected = start_another(runner)
    assert corrected.limits.num_blocks == num_blocks
    assert corrected._pools.tokens.shape[0] == num_blocks
    assert corrected._pools.kv.shape[1] == num_blocks  # type: ignore[union-attr]


def test_what_programs_need_is_not_asked_where_there_is_room_for_any(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a tenth of a second, for which first runs would wait."""

    def program_bytes(_: Any) -> int:
        raise AssertionError("it was asked")

    monkeypatch.setattr(model_runner, "_program_bytes", program_bytes)
    start_another(runner)  # with --kv-cache-memory-bytes
    monkeypatch.setattr(ModelRunner, "_num_blocks", lambda _, *, program_bytes: 2**40 // program_bytes)
    with pytest.raises(AssertionError, match="it was asked"):
        start_another(runner)


def test_two_first_runs_at_a_time_need_the_memory_for_it(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not runner._has_room_for_two(60)  # --kv-cache-memory-bytes is all that there may be
    both = 2 * (60 * runner._spec.bytes_per_block + runner._shared_bytes)
    enough = runner._weight_bytes + PROGRAM_BYTES_GUESS + both
    for free_bytes, room in ((enough - 1, False), (enough, True)):
        monkeypatch.setattr(runner, "_free_bytes", free_bytes)
        assert runner._has_room_for_two(60) == room


def test_a_first_run_that_fails_ends_the_start(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ModelRunner, "_execute", fail)
    with pytest.raises(RuntimeError, match="no such instruction"):
        start_another(runner)


def test_a_step_takes_the_first_shape_that_fits() -> None:
    decode, mixed = StepShape(8, 8, 4, decode_only=True), StepShape(8, 8, 4)
    assert decode.fits(2, 2, prompt_logprobs=False)
    assert not decode.fits(3, 2, prompt_logprobs=False)
    assert not decode.fits(9, 9, prompt_logprobs=False)
    assert mixed.fits(3, 2, prompt_logprobs=False)
    assert not mixed.fits(3, 2, prompt_logprobs=True)


def test_one_program_and_one_transfer_each_way_per_step(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    uploads: list[Any] = []
    programs = runner._compiled

    def counted(program: Any) -> Any:
        def call(leaves: Any, pools: Any, tables: Any, packed: Any) -> Any:
            calls.append(packed.shape)
            if all(tables.masks is not masks for masks in uploads):
                uploads.append(tables.masks)  # on the device already, but for steps that change them
            return program(leaves, pools, tables, packed)

        return call

    monkeypatch.setattr(runner, "_compiled", {i: counted(program) for i, program in programs.items()})
    engine = make_engine(runner)
    requests = mixed_requests(6)
    for request in requests:
        engine.add_request(request)
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    assert steps <= len(calls) <= steps + 1  # the last one may have been begun in vain
    assert all(len(shape) == 1 for shape in calls)  # one packed array
    assert len(uploads) == 1
    assert engine.stats().xla_compilations == 0


def test_a_step_that_samples_nothing_is_waited_for_like_any_other(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the time of a chunk would count as that of the step behind it."""
    ended: list[bool] = []
    wait = StepResult.wait

    def noting(result: StepResult) -> None:
        wait(result)
        ended.append(result._outputs.sampled.is_ready())

    monkeypatch.setattr(StepResult, "wait", noting)
    engine = make_engine(runner, max_num_batched_tokens=16)
    engine.add_request(
        AddRequest(request_id="r", prompt_token_ids=[1] * 60, params=SamplingParams(max_tokens=1))
    )
    for num_steps in (1, 2, 3):
        assert not any(output.token_ids for output in engine.step().outputs)
        assert ended == [True] * num_steps
    (output,) = engine.step().outputs
    assert output.finish_reason == "length"


def test_the_pool_is_updated_in_place(runner: ModelRunner) -> None:
    """No program holds a copy of it: aliased whole, and too little temporary memory for one layer's share."""
    num_blocks = 20_000
    pool_bytes = num_blocks * runner._spec.bytes_per_block
    assert max(len(program.shapes) for program in runner._programs) > 1
    for program in runner._programs:
        memory = runner._compile(program, num_blocks).memory_analysis()
        assert memory.alias_size_in_bytes >= pool_bytes
        assert memory.temp_size_in_bytes < pool_bytes / 20
