"""Block manager and scheduler as a state machine: no block is lost, shared by accident, or kept when idle."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from jaxserve.block_manager import NULL_BLOCK
from jaxserve.config import SpeculativeConfig
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.sequence import Sequence, SequenceStatus
from jaxserve.speculation import DraftRow, Speculation
from jaxserve.step_plan import StepPlan
from jaxserve.step_shapes import StepShape
from jaxserve.waiting_queue import urgency
from tests.always_drafts import AlwaysDrafts
from tests.scheduling import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    arrivals,
    make_scheduler,
    make_sequence,
    names,
    run_step,
)


def always_drafting(scheduler: Scheduler) -> Speculation:
    """Drafts of up to three tokens in steps of up to eight rows."""
    config = SpeculativeConfig(
        method="ngram", num_speculative_tokens=3, prompt_lookup_max=2, prompt_lookup_min=1
    )
    shapes = [StepShape(8, 8, MAX_MODEL_LEN // BLOCK_SIZE)]
    speculation = Speculation(config, scheduler.config, scheduler.block_manager, shapes)
    speculation.payoff = AlwaysDrafts(shapes)
    return speculation


class UnderWay(NamedTuple):
    """A step that the device has done, of which the host knows nothing yet: what its rows sampled."""

    plan: StepPlan
    tokens: list[int]


class EngineStates(RuleBasedStateMachine):
    """Random arrivals, steps and aborts against a pool that is much too small for them. Steps are decided before
    and after the results of the one before are known, with guessed tokens among them. Long prompts are held back by
    tokens, or by layers."""

    requests: Bundle[Sequence] = Bundle("requests")

    @initialize(num_layers=st.sampled_from([0, 3]))
    def begin_empty(self, num_layers: int) -> None:
        self.scheduler = make_scheduler(
            num_layers=num_layers, long_prefill_token_threshold=3, token_buckets=(1, 2, 4, 8)
        )
        self.speculation = always_drafting(self.scheduler)
        self.count = 0
        self.written: dict[int, list[int | None]] = {}  # block → the token whose KV each slot holds
        self.under_way: deque[UnderWay] = deque()

    @rule(
        target=requests,
        tokens=st.lists(st.integers(1, 2), min_size=1, max_size=14),
        n=st.integers(1, 4),
        max_tokens=st.integers(1, 10),
        salt=st.sampled_from([None, "a"]),
        bad_words=st.sampled_from([(), ((3, 4),)]),
        priority=st.integers(0, 2),
    )
    def add(
        self,
        tokens: list[int],
        n: int,
        max_tokens: int,
        salt: str | None,
        bad_words: tuple[tuple[int, ...], ...],
        priority: int,
    ) -> Sequence:
        self.count += 1
        params = SamplingParams(max_tokens=max_tokens, n=n, bad_words_token_ids=bad_words)
        sequence = make_sequence(str(self.count), tokens, params=params, salt=salt, priority=priority)
        self.scheduler.add(sequence)
        return sequence

    @rule(token=st.integers(0, 2))
    def step(self, token: int) -> None:
        """Begin a step, and then take the results of the one before."""
        self.begin(token)
        if len(self.under_way) > 1 or not self.under_way[-1].plan.rows:
            self.take_results()

    @precondition(lambda self: self.under_way)
    @rule()
    def take_results(self) -> None:
        plan, tokens = self.under_way.popleft()
        for row, token in zip(plan.rows, tokens, strict=True):
            if row.sequence.status is SequenceStatus.FINISHED:
                continue
            if isinstance(row, DraftRow) and not row.accept():
                continue
            if row.samples:
                row.sequence.append_token(token)
            if row.sequence.status is SequenceStatus.FINISHED:
                self.scheduler.finish(row.sequence)
        self.speculation.settle(plan)
        self.speculation.count_time(1.0)
        self.scheduler.layered.settle(
            plan, 1.0
        )  # so that chunks take a layer a step, or two where they are short
        for s in {row.sequence for row in plan.rows if isinstance(row, DraftRow)}:
            assert len(s.block_table) == -(-s.num_computed_tokens // BLOCK_SIZE), "a draft keeps a block"

    def begin(self, token: int) -> None:
        """Also plays the device: follows every write and copy, and checks that each row reads its own tokens."""
        while self.under_way and self.under_way[-1].plan.num_drafts:
            self.take_results()
        ran, waited = list(self.scheduler.running), list(self.scheduler.waiting)
        has_chunk = self.scheduler.layered.is_under_way
        held_back = self.held_back(waited, has_chunk=has_chunk)
        plan = self.scheduler.schedule()
        # the step may have given away, or filled, what they find in the cache
        held_back |= self.held_back(waited, has_chunk=has_chunk)
        self.check_priorities(ran, waited, held_back)
        num_preemptions = self.scheduler.num_preemptions
        self.speculation.add_drafts(plan)
        assert self.scheduler.num_preemptions == num_preemptions, "somebody made room for drafts"
        before = self.under_way[-1].tokens if self.under_way else []
        assert plan.num_tokens <= self.scheduler.config.max_num_batched_tokens
        assert len({row.sequence for row in plan.rows}) == len(plan.rows) - plan.num_drafts
        lengths = [row.num_tokens for row in plan.rows]
        assert all(lengths)
        assert sorted(lengths, key=lambda n: n > 1) == lengths
        for row in plan.rows:
            for source, target in row.copies:
                self.written[target] = list(self.written.get(source, [None] * BLOCK_SIZE))
        writes: set[int] = set()
        for row in plan.rows:
            s = row.sequence
            for position in range(row.start, row.end):
                block = s.block_table[position // BLOCK_SIZE]
                assert block != NULL_BLOCK
                slot = block * BLOCK_SIZE + position % BLOCK_SIZE
                assert slot not in writes, "two rows write into one slot"
                writes.add(slot)
                known = self.written.setdefault(block, [None] * BLOCK_SIZE)
                (written,) = row.token_ids[position - row.start : position - row.start + 1]
                known[position % BLOCK_SIZE] = written if written >= 0 else before[-1 - written]
        for row in plan.rows:
            s = row.sequence
            assert row.end <= len(s) + 1 or (isinstance(row, DraftRow) and row.end <= s.max_len - 1)
            assert row.end <= len(s) or not s.needs_values, "a token was needed and not there"
            for position in range(min(row.end, len(s))):
                found = self.written[s.block_table[position // BLOCK_SIZE]][position % BLOCK_SIZE]
                assert found == s.token_ids[position], f"{s} reads somebody else's KV at {position}"
        # each row samples something of its own, most of them no end of sequence
        self.under_way.append(UnderWay(plan, [(token + index) % 3 for index in range(len(plan.rows))]))

    def held_back(self, waited: list[Sequence], *, has_chunk: bool) -> dict[Sequence, int]:
        """Long prompts, each with the lowest priority of a prompt that it waits for: of one that is as urgent, or,
        while a chunk is computed by layers, of any."""
        manager, limit = self.scheduler.block_manager, self.scheduler.config.max_num_batched_tokens
        cached = {s: BLOCK_SIZE * len(manager._cached_prefix(s)) for s in waited}
        long_ones = [
            s for s in waited if len(s) - (s.num_prefix_tokens if s.block_table else cached[s]) > limit
        ]
        return {s: 2 if has_chunk else s.order[0] for s in long_ones}

    def check_priorities(
        self, ran: list[Sequence], waited: list[Sequence], held_back: dict[Sequence, int]
    ) -> None:
        """Nobody lost its place to a request that is less urgent, nor was admitted before a more urgent one, but for
        long prompts that are held back by another."""
        running = self.scheduler.running
        preempted = [s for s in ran if s.status is SequenceStatus.WAITING]
        admitted = [s for s in waited if s.status is SequenceStatus.RUNNING]
        prompts = [s for s in running if s in admitted or s.num_computed_tokens <= s.num_prompt_tokens]
        left_waiting = [
            s
            for s in waited
            if s.status is SequenceStatus.WAITING
            and not (s in held_back and any(prompt.order[0] <= held_back[s] for prompt in prompts))
        ]
        for sequence in preempted:
            assert all(urgency(other) < urgency(sequence) for other in running)
        for sequence in admitted:
            assert all(urgency(sequence) < urgency(other) for other in left_waiting)

    @rule(sequence=consumes(requests))
    def abort(self, sequence: Sequence) -> None:
        if sequence.status is not SequenceStatus.FINISHED:
            self.scheduler.abort(sequence)

    @rule()
    def drain(self) -> None:
        """Everything ends, in a bounded number of steps: nobody starves."""
        steps = 0
        while self.scheduler.has_work:
            self.step(1)
            steps += 1
            assert steps < 3000, "no progress"
        while self.under_way:
            self.take_results()
        assert self.scheduler.block_manager.usage == 0.0

    @invariant()
    def consistent(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        self.drain()


# 200 × 50 = 10,000 operations
EngineStates.TestCase.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestEngineStates = EngineStates.TestCase


def test_equal_prefixes_share_blocks_and_salts_separate_them() -> None:
    scheduler = make_scheduler(budget=16)
    prompt = [1, 2, 1, 2, 2, 1, 2, 1, 1]
    first = make_sequence("first", prompt, max_tokens=1)
    scheduler.add(first)
    run_step(scheduler)
    again, salted = make_sequence("again", prompt, max_tokens=4), make_sequence("salted", prompt, salt="x")
    for sequence in (again, salted):
        scheduler.add(sequence)
    run_step(scheduler)
    assert again.num_cached_tokens == 8
    assert salted.num_cached_tokens == 0
    assert not set(again.block_table) & set(salted.block_table)
    assert scheduler.block_manager.num_hit_tokens == 8
    assert scheduler.block_manager.num_lookup_tokens == 27


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    scheduler = make_scheduler(budget=16)
    prompt = [1, 2, 1, 2, 2, 1, 2, 1]
    for name in ("first", "second"):
        sequence = make_sequence(name, prompt, max_tokens=1)
        scheduler.add(sequence)
        plan = run_step(scheduler)
    assert sequence.num_cached_tokens == 4
    assert plan.num_tokens == 4


def test_without_prefix_caching_nothing_is_shared() -> None:
    scheduler = make_scheduler(budget=16, caching=False)
    for name in ("first", "second"):
        sequence = make_sequence(name, [1] * 9, max_tokens=1)
        scheduler.add(sequence)
        assert run_step(scheduler).num_tokens == 9
    assert scheduler.block_manager.num_lookup_tokens == 0


def test_siblings_share_the_prompt_and_copy_only_the_block_they_write() -> None:
    scheduler = make_scheduler(budget=16)
    leader = make_sequence("r", [1, 2, 1, 2, 1, 2], n=3, max_tokens=4)
    siblings = list(leader.siblings)
    scheduler.add(leader)
    assert run_step(scheduler).num_tokens == 5  # all but the last prompt token, once
    plan = run_step(scheduler)
    assert plan.num_tokens == 3
    family = [leader, *siblings]
    assert len({s.block_table[0] for s in family}) == 1
    assert len({s.block_table[1] for s in family}) == 3
    assert sum(len(row.copies) for row in plan.rows) == 2  # the last owner writes in place


def test_blocks_of_the_least_recently_used_prefix_are_taken_first() -> None:
    scheduler = make_scheduler(num_blocks=7, budget=24)
    old, young = [1] * 9, [2] * 9
    for name, prompt in (("old", old), ("young", young)):
        scheduler.add(make_sequence(name, prompt, max_tokens=1))
        run_step(scheduler)
    scheduler.add(make_sequence("large", [1, 2] * 6, max_tokens=1))  # takes three blocks: two had no content
    run_step(scheduler)
    for name, prompt, cached in (("young again", young, 8), ("old again", old, 4)):
        sequence = make_sequence(name, prompt)
        assert scheduler.block_manager.take_cached_prefix(sequence) == cached, name
        scheduler.block_manager.free(sequence)


def test_rows_of_one_token_are_served_before_a_long_prompt() -> None:
    scheduler = make_scheduler(budget=6, num_blocks=20)
    long, short = make_sequence("long", [1] * 16), make_sequence("short", [2, 2])
    for sequence in (long, short):
        scheduler.add(sequence)
    run_step(scheduler)  # 6 of long
    run_step(scheduler)  # 6 of long
    plan = run_step(scheduler)  # 4 of long, 2 of short
    assert [row.num_tokens for row in plan.rows] == [4, 2]
    later = make_sequence("later", [1, 2] * 8)
    scheduler.add(later)
    plan = run_step(scheduler)
    assert [(row.sequence.request_id, row.num_tokens) for row in plan.rows] == [
        ("long", 1),
        ("short", 1),
        ("later", 4),
    ]


PADDED: dict[str, Any] = {
    "num_blocks": 800,
    "budget": 256,
    "max_num_seqs": 20,
    "max_model_len": 2000,
    "token_buckets": (1, 8, 16, 32, 64, 128, 256),
}


def lengths_beside(
    num_streams: int, *prompts: Sequence, num_steps: int = 3, **limits: Any
) -> list[list[int]]:
    """Tokens of each row of the prompts' first steps, beside streams of one token a step."""
    scheduler = make_scheduler(**PADDED | limits)
    for i in range(num_streams):
        scheduler.add(make_sequence(f"stream-{i}", [2, 2], max_tokens=20))
    if num_streams:
        run_step(scheduler)
    for prompt in prompts:
        scheduler.add(prompt)
    steps = [[row.num_tokens for row in run_step(scheduler).rows][num_streams:] for _ in range(num_steps)]
    scheduler.check_integrity()
    return steps


def prompt_of(name: str, num_tokens: int, **more: Any) -> Sequence:
    token = next(arrivals)  # nothing is shared
    return make_sequence(name, [token] * num_tokens, max_model_len=2000, **more)


def test_the_end_of_a_prompt_waits_for_the_next_step_where_this_one_would_be_mostly_padding() -> None:
    assert lengths_beside(16, prompt_of("a", 128)) == [[112], [16], [1]]
    assert lengths_beside(0, prompt_of("a", 129)) == [[128], [1], [1]]


def test_what_is_cut_is_cut_from_the_least_urgent() -> None:
    assert lengths_beside(0, prompt_of("a", 100), prompt_of("b", 50)) == [[100, 28], [1, 15], [1, 7]]
    assert lengths_beside(0, prompt_of("a", 128), prompt_of("b", 5)) == [[1, 127], [1, 4], [1, 1]]


@pytest.mark.parametrize(
    ("num_streams", "prompt_tokens", "limits"),
    [
        (0, 240, {}),  # the rest alone would cost as much as the padding
        (0, 17, {}),  # one more step costs more
        (16, 112, {}),  # there is no padding
        (16, 128, {"token_buckets": ()}),
        (0, 129, {"chunked": False, "budget": 2000}),
    ],
)
def test_no_prompt_is_cut_for_nothing(num_streams: int, prompt_tokens: int, limits: dict[str, Any]) -> None:
    assert lengths_beside(num_streams, prompt_of("a", prompt_tokens), **limits)[0] == [prompt_tokens]


def test_prompts_that_are_rated_are_not_cut() -> None:
    params = SamplingParams(max_tokens=8, prompt_logprobs=1)  # the largest program alone can do that
    assert lengths_beside(0, prompt_of("a", 129, params=params))[0] == [129]


def test_few_tokens_at_a_long_context_are_not_left_to_a_step_without_tiles() -> None:
    assert lengths_beside(0, prompt_of("a", 512 + 160))[2] == [128]
    assert lengths_beside(0, prompt_of("a", 1792 + 160), num_steps=8)[7] == [160]


def test_the_youngest_is_preempted_and_computed_again_first() -> None:
    scheduler = make_scheduler(num_blocks=7, budget=24, caching=False)
    old, young = (
        make_sequence("old", [1] * 11, max_tokens=13),
        make_sequence("young", [2] * 11, max_tokens=13),
    )
    for sequence in (old, young):
        scheduler.add(sequence)
    while scheduler.num_preemptions == 0:
        run_step(scheduler)
    assert scheduler.waiting[0] is young
    assert young.num_computed_tokens == 0
    assert not young.block_table
    scheduler.add(make_sequence("newcomer", [1], max_tokens=1))
    while young.status is not SequenceStatus.RUNNING:
        assert [s.request_id for s in scheduler.running] in (["old"], [])
        run_step(scheduler)
    assert old.status is SequenceStatus.FINISHED


def test_the_lowest_priority_comes_first_and_equal_ones_as_they_arrived() -> None:
    scheduler = make_scheduler(max_num_seqs=2, budget=4)
    for name, priority in (("b", 1), ("d", 2), ("a", -5), ("c", 1)):
        scheduler.add(make_sequence(name, [1, 1], priority=priority, max_tokens=1))
    run_step(scheduler)
    assert names(scheduler.waiting) == ["c", "d"]


def test_where_seats_run_out_the_urgent_takes_that_of_the_least_urgent_and_in_the_same_step() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name, priority in (("low", 5), ("lower, older", 7), ("lower", 7), ("equal", 1)):
        scheduler.add(make_sequence(name, [1, 2], priority=priority))
    run_step(scheduler)
    assert names(scheduler.running) == ["equal", "low"]
    scheduler.add(make_sequence("urgent", [2, 2], priority=1))
    run_step(scheduler)
    assert names(scheduler.running) == ["equal", "urgent"]
    assert names(scheduler.waiting) == ["low", "lower, older", "lower"]
    scheduler.add(make_sequence("as urgent", [2, 2], priority=1))
    run_step(scheduler)
    assert scheduler.num_preemptions == 1
    assert names(scheduler.waiting) == ["as urgent", "low", "lower, older", "lower"]


def test_where_blocks_run_out_the_urgent_takes_no_more_than_it_needs() -> None:
    scheduler = make_scheduler(num_blocks=7, budget=24, caching=False)
    for name, priority in (("a", 0), ("b", 1), ("c", 2)):
        scheduler.add(make_sequence(name, [1] * 6, priority=priority, max_tokens=3))  # two blocks each
    run_step(scheduler)
    scheduler.add(make_sequence("urgent", [2] * 7, priority=-1))
    run_step(scheduler)
    assert names(scheduler.running) == ["urgent", "a", "b"]
    assert names(scheduler.waiting) == ["c"]


def test_the_urgent_preempts_nobody_for_blocks_that_it_finds_in_the_cache() -> None:
    scheduler = make_scheduler(num_blocks=7, budget=24)
    low = make_sequence("low", [1, 2] * 8, priority=9)  # four blocks, and two are free
    scheduler.add(low)
    run_step(scheduler)
    scheduler.add(make_sequence("urgent", [1, 2] * 8 + [3], max_tokens=2))
    run_step(scheduler)
    assert names(scheduler.running) == ["urgent", "low"]


def test_what_is_preempted_for_the_urgent_generates_all_the_same() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    low = make_sequence("low", [1, 2], priority=9, max_tokens=6)
    scheduler.add(low)
    for _ in range(3):
        run_step(scheduler)
    scheduler.add(make_sequence("urgent", [2, 2], max_tokens=3))
    for _ in range(3):
        run_step(scheduler)
        assert low.num_output_tokens == 3
    while scheduler.has_work:
        run_step(scheduler)
    assert low.num_output_tokens == 6


def test_without_chunked_prefill_a_prompt_runs_whole_or_waits() -> None:
    scheduler = make_scheduler(budget=24, chunked=False, num_blocks=30)
    first, second = make_sequence("first", [1] * 16), make_sequence("second", [2] * 12)
    for sequence in (first, second):
        scheduler.add(sequence)
    assert [row.num_tokens for row in run_step(scheduler).rows] == [16]
    assert [row.num_tokens for row in run_step(scheduler).rows] == [1, 12]


def test_aborting_the_leader_lets_the_siblings_go_on() -> None:
    scheduler = make_scheduler()
    leader = make_sequence("r", [1, 2, 1], n=3, max_tokens=2)
    heir, other = leader.siblings
    scheduler.add(leader)
    scheduler.abort(leader)
    while scheduler.has_work:
        run_step(scheduler)
    assert heir.num_output_tokens == other.num_output_tokens == 2
    assert scheduler.block_manager.usage == 0.0


def test_a_sequence_ends_at_end_of_sequence_stop_token_or_length() -> None:
    def grow(params: SamplingParams, tokens: list[int]) -> Sequence:
        sequence = Sequence("r", 0, [5], params, seed=0, max_model_len=6, eos_token_ids=(0, 9))
        for token in tokens:
            assert sequence.finish_reason is None
            sequence.append_token(token)
        return sequence

    for params, tokens, reason, stop_reason in (
        (SamplingParams(max_tokens=9), [1, 9], "stop", None),
        (SamplingParams(max_tokens=9, stop_token_ids=(9, 3)), [1, 9], "stop", None),
        (SamplingParams(max_tokens=9, stop_token_ids=(3,)), [1, 3], "stop", 3),
        (SamplingParams(max_tokens=9, stop_token_ids=(9,), ignore_eos=True), [0, 9], "stop", 9),
        (SamplingParams(max_tokens=2), [1, 1], "length", None),
        (SamplingParams(max_tokens=9, ignore_eos=True), [0, 9, 1, 1, 1], "length", None),
    ):
        sequence = grow(params, tokens)
        assert (sequence.finish_reason, sequence.stop_reason) == (reason, stop_reason)
