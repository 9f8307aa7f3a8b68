"""Jobs in a killable worker: limits that hold whatever a job does, and a server that does not notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from jaxserve import killable_worker
from jaxserve.errors import JobError, QueueFullError
from jaxserve.killable_worker import KillableWorker
from tests.misbehaving_worker import LIMITS

pytestmark = pytest.mark.timing

MODULE = "tests.misbehaving_worker"


@pytest.fixture
def worker() -> Iterator[KillableWorker]:
    worker = KillableWorker(MODULE, LIMITS)
    yield worker
    worker.close()


async def reason(worker: KillableWorker, job: bytes) -> str:
    with pytest.raises(JobError) as caught:
        await worker.run(job)
    return caught.value.reason


async def test_a_jobs_answer_comes_back_whatever_its_size(worker: KillableWorker) -> None:
    for size in (0, 1, 65536, 1 << 20):
        text = bytes(range(256)) * (size // 256)
        assert await worker.run(b"echo " + text) == text


@pytest.mark.parametrize(
    ("job", "why"),
    [
        (b"spin", "time"),
        (b"sleep 60", "time"),
        (b"eat 300000000", "memory"),
        (b"talk 1048577", "output"),
        (b"die 9", "crash"),
        (b"die 11", "crash"),
        (b"raise", "crash"),
    ],
)
async def test_a_job_over_a_limit_fails_alone(worker: KillableWorker, job: bytes, why: str) -> None:
    assert await worker.run(b"echo before") == b"before"
    started = time.monotonic()
    failing = asyncio.ensure_future(reason(worker, job))
    assert await worker.run(b"echo beside") == b"beside"
    assert await failing == why
    assert time.monotonic() - started < LIMITS.seconds + 1
    assert await worker.run(b"echo behind") == b"behind"


async def test_a_job_within_the_limits_is_let_be(worker: KillableWorker) -> None:
    assert await worker.run(b"eat 100000000") == b"100000000"
    assert await worker.run(b"talk 1048576") == bytes(1 << 20)
    assert await worker.run(b"sleep 0.3") == b"done"


async def test_no_job_sees_what_another_left_behind(worker: KillableWorker) -> None:
    assert json.loads(await worker.run(b"remember a")) == ["a"]
    assert json.loads(await worker.run(b"remember b")) == ["b"]


async def test_jobs_run_beside_each_other_and_none_waits_for_a_slow_one(worker: KillableWorker) -> None:
    started = time.monotonic()
    slow = [asyncio.ensure_future(reason(worker, b"sleep 60")) for _ in range(10)]
    assert await worker.run(b"echo quick") == b"quick"
    assert not any(job.done() for job in slow)
    assert await asyncio.gather(*slow) == ["time"] * 10
    assert time.monotonic() - started < 2 * LIMITS.seconds + 1


async def test_a_job_that_cannot_start_in_time_is_refused(
    worker: KillableWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(killable_worker, "MAX_QUEUE_S", 0.1)
    running = [asyncio.ensure_future(worker.run(b"sleep 0.4")) for _ in range(killable_worker.MAX_RUNNING)]
    await asyncio.sleep(0)  # they are ahead
    with pytest.raises(QueueFullError, match="try again"):
        await worker.run(b"echo late")
    assert await asyncio.gather(*running) == [b"done"] * len(running)
    assert await worker.run(b"echo again") == b"again"


async def test_waiting_for_a_turn_takes_nothing_off_the_time_limit(
    worker: KillableWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_running", asyncio.Semaphore(1))
    assert await asyncio.gather(*(worker.run(b"sleep 0.3") for _ in range(3))) == [b"done"] * 3


async def test_a_worker_that_dies_is_replaced(worker: KillableWorker) -> None:
    await worker.run(b"echo first")
    assert worker.pid is not None
    first = worker.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: not alive(first))
    assert await worker.run(b"echo second") == b"second"
    assert worker.pid != first


async def test_a_job_whose_client_has_gone_frees_its_place(
    worker: KillableWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_running", asyncio.Semaphore(1))
    await worker.run(b"echo started")
    job = asyncio.ensure_future(worker.run(b"sleep 60"))
    await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert await worker.run(b"echo next") == b"next"


async def test_no_secret_reaches_a_worker(worker: KillableWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEY", "secret")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    environment = json.loads(await worker.run(b"environment"))
    assert "secret" not in environment.values()
    assert environment["TZ"] == "Asia/Tokyo"  # templates tell the time


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such policy")
async def test_only_jobs_that_take_long_are_slowed_down(worker: KillableWorker) -> None:
    assert await worker.run(b"idle 0") == b"False"
    long, short = worker.run(b"idle 0.3"), worker.run(b"idle 0")
    assert await asyncio.gather(long, short) == [b"True", b"False"]


async def test_jobs_are_nicer_than_the_server(worker: KillableWorker) -> None:
    assert int(await worker.run(b"nice")) > os.nice(0)


async def test_closing_ends_worker_and_jobs(worker: KillableWorker) -> None:
    child, parent = (int(pid) for pid in (await worker.run(b"pids")).split())
    assert parent == worker.pid
    await until(lambda: not psutil.pid_exists(child))
    job = asyncio.ensure_future(worker.run(b"sleep 60"))
    (running,) = await until(lambda: psutil.Process(parent).children())
    worker.close()
    assert worker.pid is None
    with pytest.raises(JobError):
        await job
    await until(lambda: not alive(parent) and not alive(running.pid))


async def test_a_server_that_is_killed_leaves_no_worker_behind() -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(module=MODULE)], stdout=subprocess.PIPE, text=True
    )
    with server:
        try:
            assert server.stdout is not None
            worker = int(server.stdout.readline())
            running = (await until(lambda: psutil.Process(worker).children()))[-1]  # jobs follow one another
        finally:
            server.kill()
    await until(lambda: not alive(worker) and not alive(running.pid))


SERVER = """
import asyncio
from jaxserve.errors import JobError
from jaxserve.killable_worker import KillableWorker
from tests.misbehaving_worker import LIMITS

async def main():
    worker = KillableWorker("{module}", LIMITS)
    await worker.run(b"echo")
    print(worker.pid, flush=True)
    while True:
        try:
            await worker.run(b"sleep 60")
        except JobError:  # its time was up
            pass

asyncio.run(main())
"""


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


async def until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(10):
        while not (result := condition()):
            await asyncio.sleep(0.01)
    return result
