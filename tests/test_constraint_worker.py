"""Compilation in a killable worker: hostile constraints end in a refusal, and harm nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from jaxserve.constraints import worker as worker_module
from jaxserve.constraints.constraint import Constraint
from jaxserve.constraints.worker import ConstraintWorker
from jaxserve.errors import RequestError
from tests.hostile_constraints import HOSTILE, SLOW, schema
from tests.tiny_tokenizers import backend_of

pytestmark = pytest.mark.timing

CHOICE = Constraint(kind="choice", text='["positive", "negative"]')


@pytest.fixture
def make_worker(tmp_path: Path) -> Iterator[Callable[[str], ConstraintWorker]]:
    workers = []

    def make(family: str) -> ConstraintWorker:
        backend_of(family).save(str(tmp_path / "tokenizer.json"))
        size = backend_of(family).get_vocab_size(with_added_tokens=True)
        workers.append(ConstraintWorker(tmp_path, size + 3, [1]))
        return workers[-1]

    yield make
    for worker in workers:
        worker.process.close()


@pytest.fixture
async def worker(make_worker: Callable[[str], ConstraintWorker]) -> ConstraintWorker:
    worker = make_worker("byte level")
    await worker.compile(Constraint(kind="json_object"), param=None)  # it has started
    return worker


async def refusal(worker: ConstraintWorker, constraint: Constraint) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await worker.compile(constraint, param="guided_json")
    assert caught.value.param == "guided_json"
    assert len(str(caught.value)) < 600
    return caught.value


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_constraint_is_refused_within_three_seconds(
    worker: ConstraintWorker, name: str
) -> None:
    server = psutil.Process()
    before, started = server.memory_info().rss, time.monotonic()
    error = await refusal(worker, HOSTILE[name])
    assert time.monotonic() - started < 3
    assert error.code in ("invalid_constraint", "constraint_too_complex")
    assert server.memory_info().rss - before < 8 << 20
    assert (await worker.compile(CHOICE, param=None)).backend == "llguidance"


async def test_a_constraint_that_takes_too_long_holds_up_no_other(worker: ConstraintWorker) -> None:
    slow = [asyncio.ensure_future(refusal(worker, SLOW)) for _ in range(4)]
    for i in range(10):
        await worker.compile(Constraint(kind="regex", text=f"a{{{i}}}b"), param=None)
    assert not any(task.done() for task in slow)
    for task in slow:
        error = await task
        assert (error.code, str(error)) == (
            "constraint_too_complex",
            "The constraint takes longer than 2 s to compile.",
        )


async def test_what_is_compiled_is_kept(worker: ConstraintWorker) -> None:
    compiled = await worker.compile(CHOICE, param=None)
    pid = worker.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert await worker.compile(Constraint(kind="choice", text=CHOICE.text), param=None) == compiled
    os.kill(pid, signal.SIGCONT)


async def test_what_is_kept_is_bounded_in_bytes(
    worker: ConstraintWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "MAX_CACHE_BYTES", 5000)
    for i in range(20):
        await worker.compile(Constraint(kind="regex", text=f"x{i}"), param=None)
    kept = [constraint.text for constraint in worker._cache]
    assert kept == [f"x{i}" for i in range(20 - len(kept), 20)]
    assert 0 < len(kept) <= 5
    assert worker._cache_bytes <= 5000


async def test_a_refusal_is_not_kept_and_says_the_same_again(worker: ConstraintWorker) -> None:
    constraint = schema({"type": "array", "uniqueItems": True})
    first, second = await refusal(worker, constraint), await refusal(worker, constraint)
    assert str(first) == str(second)
    assert "uniqueItems" in str(first)


async def test_a_model_whose_tokens_have_no_bytes_refuses_every_constraint(
    make_worker: Callable[[str], ConstraintWorker],
) -> None:
    error = await refusal(make_worker("suffixed"), CHOICE)
    assert error.code == "invalid_constraint"
    assert "This model's text cannot be constrained" in str(error)
