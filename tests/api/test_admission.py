"""Who may join the queue, and what those who may not are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.api.admission import Admission
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine_client import EngineLoad
from jaxserve.errors import QueueFullError
from tests.api.fake_engine import FakeEngineClient, fake_info
from tests.api.small_model import MODEL, make_app, make_tokenizer

MAX_NUM_SEQS = 8


def admission(
    load: EngineLoad, *, max_num_queued_reqs: int | None = None, max_num_queued_tokens: int | None = None
) -> tuple[Admission, list[str]]:
    """In front of an engine that is so busy, and the reasons of refusals."""
    engine = FakeEngineClient(info=fake_info(max_num_seqs=MAX_NUM_SEQS))
    engine.fixed_load = load
    config = ServerConfig(
        engine=EngineConfig(model="m"),
        max_num_queued_reqs=max_num_queued_reqs,
        max_num_queued_tokens=max_num_queued_tokens,
    )
    rejected: list[str] = []
    return Admission(engine, config, rejected.append), rejected


def queue(num_waiting: int, *, num_tokens: int = 0) -> EngineLoad:
    """The engine is full, and so many requests of one sequence wait."""
    return EngineLoad(num_waiting, num_tokens, MAX_NUM_SEQS + num_waiting)


@pytest.mark.parametrize(("limit", "most"), [(1, 0), (5, 4), (None, 4 * MAX_NUM_SEQS - 1)])
def test_as_many_may_wait_as_the_limit_says_and_four_rounds_by_default(limit: int | None, most: int) -> None:
    admission(queue(most), max_num_queued_reqs=limit)[0].admit(1)
    full, rejected = admission(queue(most + 1), max_num_queued_reqs=limit)
    with pytest.raises(QueueFullError, match=f"{most + 1} requests are waiting") as caught:
        full.admit(1)
    assert caught.value.retry_after_s >= 1
    assert (rejected, full.num_requests) == (["requests"], 0)


def test_a_burst_that_the_engine_has_room_for_does_not_count_as_waiting() -> None:
    """Requests are unscheduled until the next step, also those that it will take all."""
    admission(EngineLoad(MAX_NUM_SEQS, 100, MAX_NUM_SEQS), max_num_queued_reqs=1)[0].admit(1)


def test_of_a_burst_only_what_is_beyond_the_engines_room_counts() -> None:
    arriving = EngineLoad(
        num_waiting_requests=MAX_NUM_SEQS + 2, num_waiting_tokens=0, num_sequences=MAX_NUM_SEQS + 2
    )
    admission(arriving, max_num_queued_reqs=3)[0].admit(1)
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        admission(arriving, max_num_queued_reqs=2)[0].admit(1)


def test_a_request_of_many_sequences_that_waits_is_one_request() -> None:
    admission(EngineLoad(1, 0, 100), max_num_queued_reqs=2)[0].admit(1)


def test_prompt_tokens_that_wait_are_limited_where_a_flag_says_so() -> None:
    load = queue(2, num_tokens=90)
    admission(load, max_num_queued_tokens=100)[0].admit(10)
    full, rejected = admission(load, max_num_queued_tokens=100)
    with pytest.raises(QueueFullError, match="90 prompt tokens are waiting"):
        full.admit(11)
    assert (rejected, full.num_requests) == (["tokens"], 0)
    admission(load)[0].admit(10**6)  # off by default


def test_a_prompt_longer_than_the_token_limit_is_served_when_nobody_waits() -> None:
    """Otherwise it could never be."""
    admission(EngineLoad(3, 0, 3), max_num_queued_tokens=100)[0].admit(1000)


def test_requests_are_counted_until_they_are_released() -> None:
    gate, _ = admission(EngineLoad())
    releases = [gate.admit(1) for _ in range(3)]
    assert gate.num_requests == 3
    for release in releases:
        release()
    assert gate.num_requests == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_429_with_retry_after_before_a_stream_begins(
    tmp_path: Path, stream: bool
) -> None:
    engine = FakeEngineClient(info=fake_info(max_num_seqs=1))
    engine.fixed_load = EngineLoad(4, 0, 5)
    app = make_app(make_tokenizer(tmp_path), engine)
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        response = await app.test_client().post(path, json={"model": MODEL, "stream": stream, **body})
        error = (await response.get_json())["error"]
        assert (response.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
        assert int(response.headers["Retry-After"]) >= 1
        faulty = await app.test_client().post(path, json={"model": MODEL, "temperature": 3, **body})
        assert faulty.status_code == 400  # admission comes last
    assert engine.submitted == []
