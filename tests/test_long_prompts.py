"""Long prompts beside streams: one at a time, the most urgent first, and nobody waits for one that cannot start."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.long_prompts import MAX_PASSED_OVER
from jaxserve.sequence import Sequence, SequenceStatus
from tests.scheduling import make_scheduler, make_sequence, names, rows_of, run_step

PACED: dict[str, Any] = {
    "num_blocks": 60,
    "budget": 8,
    "max_model_len": 100,
    "long_prefill_token_threshold": 4,
}


def test_beside_streams_a_long_prompt_takes_few_tokens_a_step() -> None:
    scheduler = make_scheduler(**PACED)
    scheduler.add(make_sequence("stream", [2, 2], max_tokens=20))
    run_step(scheduler)
    scheduler.add(make_sequence("long", [1] * 18))
    lengths = [[row.num_tokens for row in run_step(scheduler).rows] for _ in range(6)]
    assert lengths == [[1, 4], [1, 4], [1, 4], [1, 4], [1, 2], [1, 1]]


def test_a_long_prompt_alone_takes_the_whole_budget() -> None:
    scheduler = make_scheduler(**PACED)
    scheduler.add(make_sequence("long", [1] * 20))
    assert [run_step(scheduler).num_tokens for _ in range(3)] == [8, 8, 4]


def test_short_prompts_are_computed_beside_a_long_one_and_the_next_long_one_holds_up_nobody() -> None:
    scheduler = make_scheduler(**PACED, max_num_seqs=5)
    scheduler.add(make_sequence("stream", [2, 2], max_tokens=20))
    run_step(scheduler)
    for name, length in (("long", 20), ("short", 2), ("other", 20), ("behind", 1)):
        scheduler.add(make_sequence(name, [1] * length))
    assert rows_of(run_step(scheduler)) == [("stream", 1), ("behind", 1), ("long", 4), ("short", 2)]
    assert names(scheduler.running) == ["stream", "long", "short", "behind"]
    assert names(scheduler.waiting) == ["other"]


@pytest.mark.parametrize("num_layers", [0, 10], ids=["by tokens", "by layers"])
def test_of_long_prompts_that_are_alike_beside_a_stream_the_first_alone_is_computed(num_layers: int) -> None:
    scheduler = make_scheduler(**PACED, num_layers=num_layers)
    scheduler.add(make_sequence("stream", [2, 2], max_tokens=90, max_model_len=100))
    run_step(scheduler)
    alike = [make_sequence(f"alike {i}", [1, 3] * 10, max_tokens=1) for i in range(3)]
    for sequence in alike:
        scheduler.add(sequence)
    while any(sequence.status is not SequenceStatus.FINISHED for sequence in alike):
        run_step(scheduler)
        scheduler.check_integrity()
    first, *others = [sequence.num_cached_tokens for sequence in alike]
    assert first == 0
    assert min(others) >= 12  # with so much in the cache the rest is no longer long


def test_an_urgent_short_prompt_gets_the_seat_that_an_urgent_long_one_would_not_take() -> None:
    scheduler = make_scheduler(**PACED, max_num_seqs=3)
    for name in ("stream", "other stream"):
        scheduler.add(make_sequence(name, [2, 2], max_tokens=60, max_model_len=100, priority=1))
    run_step(scheduler)
    scheduler.add(make_sequence("long", [1] * 20))
    run_step(scheduler)
    for name, length in (("another", 20), ("short", 2)):
        scheduler.add(make_sequence(name, [3] * length))
    assert ("short", 2) in rows_of(run_step(scheduler))
    assert names(scheduler.waiting) == ["another", "other stream"]


def test_nobody_is_preempted_for_a_long_prompt_that_is_held_back() -> None:
    scheduler = make_scheduler(**PACED, max_num_seqs=3)
    scheduler.add(make_sequence("stream", [2, 2], max_tokens=60, max_model_len=100, priority=1))
    scheduler.add(make_sequence("other stream", [2, 2], max_tokens=60, max_model_len=100, priority=1))
    run_step(scheduler)
    scheduler.add(make_sequence("long", [1] * 20))
    run_step(scheduler)
    scheduler.add(make_sequence("another", [3] * 20))
    for _ in range(3):
        assert len(run_step(scheduler).rows) == 3
    assert names(scheduler.running) == ["long", "stream", "other stream"]
    assert scheduler.num_preemptions == 0
    for _ in range(3):  # the first is done
        run_step(scheduler)
    assert "another" in names(scheduler.running)


@pytest.mark.parametrize("num_layers", [0, 3], ids=["by tokens", "by layers"])
def test_an_urgent_long_prompt_takes_over_at_the_next_chunk(num_layers: int) -> None:
    scheduler = make_scheduler(**PACED, num_layers=num_layers)
    scheduler.add(make_sequence("stream", [2, 2], max_tokens=60, max_model_len=100))
    run_step(scheduler)
    patient = make_sequence("patient", [1] * 60, max_tokens=1, max_model_len=100, priority=1)
    scheduler.add(patient)
    run_step(scheduler)
    urgent = make_sequence("urgent", [3] * 60, max_tokens=1, max_model_len=100)
    scheduler.add(urgent)
    done = patient.num_computed_tokens
    while urgent.status is not SequenceStatus.FINISHED:
        run_step(scheduler)
        scheduler.check_integrity()
    assert patient.status is SequenceStatus.RUNNING
    assert patient.num_computed_tokens <= done + 8  # the chunk that was under way, and what the last one left
    assert scheduler.num_preemptions == 0
    while patient.status is not SequenceStatus.FINISHED:
        run_step(scheduler)


def test_nobody_is_preempted_for_an_urgent_long_prompt_while_a_chunk_is_computed() -> None:
    scheduler = make_scheduler(**PACED, num_layers=12, max_num_seqs=3)
    for name, length, priority in (("stream", 2, 0), ("patient stream", 6, 2), ("patient", 60, 1)):
        prompt = make_sequence(name, [5] * length, max_tokens=40, max_model_len=100, priority=priority)
        scheduler.add(prompt)
        run_step(scheduler)
    scheduler.add(make_sequence("urgent", [3] * 60, max_tokens=1, max_model_len=100))
    while "urgent" not in names(scheduler.running):
        assert scheduler.num_preemptions == 0
        run_step(scheduler)
    assert names(scheduler.running) == ["stream", "urgent", "patient"]


@pytest.mark.parametrize("num_layers", [0, 6], ids=["by tokens", "by layers"])
def test_short_prompts_do_not_keep_an_urgent_long_one_from_taking_over(num_layers: int) -> None:
    scheduler = make_scheduler(**PACED | {"num_blocks": 400}, num_layers=num_layers, max_num_seqs=16)
    scheduler.add(make_sequence("stream", [2, 2], max_tokens=90, max_model_len=100))
    run_step(scheduler)
    patient = make_sequence("patient", [1] * 95, max_tokens=5, max_model_len=100, priority=2)
    scheduler.add(patient)
    run_step(scheduler)
    urgent = make_sequence("urgent", [3] * 40, max_tokens=1, max_model_len=100, priority=1)
    scheduler.add(urgent)
    for i in range(16):  # a chunk by layers takes twelve steps
        scheduler.add(make_sequence(f"short {i}", [i + 4, 7, 9], max_tokens=2))
        run_step(scheduler)
    assert urgent.status is not SequenceStatus.WAITING
    # by tokens it goes on once the other one is done, after ten steps
    assert patient.num_computed_tokens <= 36


def test_a_long_prompt_goes_on_where_a_more_urgent_one_cannot_start() -> None:
    """By layers it takes nothing of a step's budget, which the streams use up."""
    scheduler = make_scheduler(**PACED | {"budget": 4}, num_layers=2, max_num_seqs=8)
    for i in range(3):
        scheduler.add(make_sequence(f"stream {i}", [2], max_tokens=90, max_model_len=100))
    run_step(scheduler)
    patient = make_sequence("patient", [1] * 40, max_tokens=1, max_model_len=100, priority=2)
    scheduler.add(patient)
    while patient.status is SequenceStatus.WAITING:
        run_step(scheduler)
    scheduler.add(make_sequence("stream 3", [2], max_tokens=90, max_model_len=100))
    run_step(scheduler)
    scheduler.add(make_sequence("urgent", [3] * 40, max_tokens=1, max_model_len=100, priority=1))
    before = patient.num_computed_tokens
    for _ in range(20):
        run_step(scheduler)
    assert patient.num_computed_tokens >= before + 8


def test_prompts_that_wait_are_hashed_no_further_than_the_cache_goes() -> None:
    scheduler = make_scheduler(**PACED | {"num_blocks": 1000, "max_model_len": 1000})
    scheduler.add(make_sequence("before", [9] * 10, max_tokens=1))
    while scheduler.has_work:
        run_step(scheduler)
    scheduler.add(make_sequence("stream", [2, 2], max_tokens=60, max_model_len=100))
    run_step(scheduler)
    scheduler.add(make_sequence("long", [1] * 400, max_model_len=1000))
    held_back = [make_sequence(f"held back {i}", [9] * 8 + [i] * 400, max_model_len=1000) for i in range(3)]
    for sequence in held_back:
        scheduler.add(sequence)
    for _ in range(3):
        run_step(scheduler)
    assert [len(sequence.block_hashes) for sequence in held_back] == [3] * 3


def test_a_long_prompt_that_is_as_urgent_as_the_one_under_way_waits_for_its_end() -> None:
    scheduler = make_scheduler(**PACED)
    scheduler.add(make_sequence("stream", [2, 2], max_tokens=60, max_model_len=100))
    run_step(scheduler)
    for name in ("first", "second"):
        scheduler.add(make_sequence(name, [len(name)] * 20, max_tokens=1, max_model_len=100))
    assert [rows_of(run_step(scheduler))[1:] for _ in range(4)] == [[("first", 4)]] * 4


def test_with_all_seats_taken_an_urgent_prompt_that_is_mostly_cached_gets_one_beside_a_long_one() -> None:
    scheduler = make_scheduler(**PACED, max_num_seqs=3)
    scheduler.add(make_sequence("before", [3] * 21, max_tokens=1))
    while scheduler.has_work:
        run_step(scheduler)
    for name in ("stream", "other stream"):
        scheduler.add(make_sequence(name, [2, 2], max_tokens=60, max_model_len=100, priority=1))
    run_step(scheduler)
    scheduler.add(make_sequence("long", [1] * 30))
    run_step(scheduler)
    scheduler.add(make_sequence("cached", [3] * 21))
    assert rows_of(run_step(scheduler)) == [("stream", 1), ("cached", 1), ("long", 4)]
    assert names(scheduler.waiting) == ["other stream"]


def test_a_short_prompt_passes_many_long_ones_which_are_not_looked_up_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make_scheduler(**PACED | {"num_blocks": 1000})
    scheduler.add(make_sequence("stream", [2, 2], max_tokens=60, max_model_len=100))
    run_step(scheduler)
    for i in range(MAX_PASSED_OVER):
        scheduler.add(make_sequence(f"long {i}", [i + 3] * 20))
    scheduler.add(make_sequence("short", [1, 1]))
    looked_up: list[str] = []
    manager = scheduler.block_manager
    take_cached_prefix = manager.take_cached_prefix

    def count(sequence: Sequence) -> int:
        looked_up.append(sequence.request_id)
        return take_cached_prefix(sequence)

    monkeypatch.setattr(manager, "take_cached_prefix", count)
    assert rows_of(run_step(scheduler)) == [("stream", 1), ("long 0", 4), ("short", 2)]
    assert rows_of(run_step(scheduler)) == [("stream", 1), ("short", 1), ("long 0", 4)]
    assert looked_up == ["long 0", "short"]


def test_what_is_cached_does_not_make_a_prompt_long() -> None:
    """Nor is it short any more once it has been preempted and its blocks are gone."""
    scheduler = make_scheduler(**PACED)
    scheduler.add(make_sequence("before", [1] * 13, max_tokens=1))
    for _ in range(2):
        run_step(scheduler)
    scheduler.add(make_sequence("stream", [2, 2], max_tokens=40))
    run_step(scheduler)
    prompt = make_sequence("prompt", [1] * 12 + [2] * 6)
    scheduler.add(prompt)
    assert [row.num_tokens for row in run_step(scheduler).rows] == [1, 6]
    scheduler._preempt(prompt)
    manager = scheduler.block_manager
    for block in [manager._take_free_block() for _ in range(manager.num_free_blocks)]:
        manager._release(block)
    assert [row.num_tokens for row in run_step(scheduler).rows] == [1, 4]
    assert prompt.num_cached_tokens == 12
