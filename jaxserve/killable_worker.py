"""Untrusted work in processes that can be killed: limits on time, memory and output that nothing inside can lift.

A worker is one process that has everything imported and waits. For each job it forks: the child takes limits from
the operating system, works, answers and is gone, so a job that is killed costs nobody anything, the next one starts
within milliseconds, and no job sees what another left behind. The worker itself has one thread and runs nothing
that is untrusted.

    API process ── control socket: one end of a new socket pair per job ──> worker ── fork ──> child
                 <────────────── the pair's other end: job in, answer out, then its end ──────────┘
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import math
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import JobError, QueueFullError

logger = logging.getLogger("jaxserve.worker")
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
CHUNK_BYTES = 1 << 16
MAX_RUNNING = 16  # children at once, so that ten that use up their time do not make an eleventh wait
MAX_QUEUE_S = 1.5  # a job that cannot start by then is refused
GRACE_S = 1.5  # for the way there and back; and for the worker's own start, which the first job may meet
NICENESS = 10  # whatever a job computes, the model comes first
# A job that takes longer runs only where nobody else would: a nice process, too, keeps its core for some milliseconds
# each time, while the model's other threads wait for the one that should run there.
SHORT_S = 0.1
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "TZ", "LANG", "LC_ALL", "LC_TIME")
DONE, OUT_OF_MEMORY, TOO_MUCH_OUTPUT = b"\x00", b"\x01", b"\x02"  # how an answer begins


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """What one job may use.

    Attributes:
        seconds: of the clock and of the processor, from the moment at which the job starts.
        memory_bytes: address space of the job's process, the interpreter's own included.
        output_bytes: size of the answer.
    """

    seconds: float
    memory_bytes: int
    output_bytes: int


class KillableWorker:
    """Runs jobs in children of one worker process, which is started when first needed and again if it dies.

    Args:
        module: what `python -m` starts; its main calls `serve_jobs`.
        arguments: for that module.
        limits: of every job; the module must be told the same.
    """

    def __init__(self, module: str, limits: JobLimits, arguments: Sequence[str] = ()) -> None:
        self._command = (sys.executable, "-m", module, *arguments)
        self._limits = limits
        self._running = asyncio.Semaphore(MAX_RUNNING)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Of the worker process; None if there is none now."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the worker process, so that the first job need not wait for it. May be called from any thread."""
        with self._lock:
            self._ensure_started()

    async def run(self, job: bytes) -> bytes:
        """What the job's handler answers.

        Raises:
            JobError: it hit a limit, or its process died.
            QueueFullError: too many other jobs are running.
        """
        async with self._turn():
            try:
                async with asyncio.timeout(self._limits.seconds + GRACE_S):
                    return await self._exchange(job)
            except TimeoutError:
                raise JobError("time") from None

    def close(self) -> None:
        """End the worker and its children."""
        with self._lock:
            self._discard()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """First come, first served."""
        try:
            async with asyncio.timeout(MAX_QUEUE_S):
                await self._running.acquire()
        except TimeoutError:
            raise QueueFullError(
                "Too many templates or constraints are being worked on; try again."
            ) from None
        try:
            yield
        finally:
            self._running.release()

    async def _exchange(self, job: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        started = loop.time()
        answer = bytearray()
        # a connection that breaks: it died early, and what it said before still counts
        with self._submit() as ours, contextlib.suppress(ConnectionError):
            await loop.sock_sendall(ours, job)
            ours.shutdown(socket.SHUT_WR)
            while len(answer) <= self._limits.output_bytes + 1:
                chunk = await loop.sock_recv(ours, CHUNK_BYTES)
                if not chunk:
                    break
                answer += chunk
        if answer.startswith(OUT_OF_MEMORY):
            raise JobError("memory")
        if answer.startswith(TOO_MUCH_OUTPUT) or len(answer) > self._limits.output_bytes + 1:
            raise JobError("output")
        if not answer:  # the alarm kills without a word
            raise JobError("time" if loop.time() - started >= self._limits.seconds else "crash")
        return bytes(answer[1:])

    def _submit(self) -> socket.socket:
        """Our end of a job's socket pair; the other one is on its way to a child."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            ours.setblocking(False)
            for _ in range(2):  # the worker may have died since the last job
                control = self._ensure_started()
                try:
                    socket.send_fds(control, [b"j"], [theirs.fileno()])
                except (ConnectionError, BlockingIOError):  # or it takes no more jobs, which is as bad
                    self._discard()
                else:
                    return ours
        ours.close()
        raise JobError("crash")

    def _ensure_started(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._discard()
        if self._control is None:
            self._control, theirs = socket.socketpair()
            self._control.setblocking(False)
            with theirs:
                self._process = subprocess.Popen(
                    [*self._command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=_environment(),
                    process_group=0,  # Ctrl-C in the terminal is for the server alone
                )
        return self._control

    def _discard(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()  # its children die with it
            self._process.wait()
            self._process = None


def serve_jobs(handle: Callable[[bytes], bytes], limits: JobLimits, control: socket.socket) -> None:
    """The worker process: fork a child per job until the control socket ends.

    Args:
        handle: job → answer, run in the child. Only MemoryError may leave it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system itself buries the children
    libc = ctypes.CDLL(None)
    gc.freeze()  # what is shared with the children stays so
    young: deque[tuple[float, int]] = deque()  # children that are not to be slowed down yet, and until when
    while True:
        _slow_down_the_old(young)
        wait_s = max(0.0, young[0][0] - time.monotonic()) if young else None
        if not select.select([control], [], [], wait_s)[0]:
            continue
        data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        for descriptor in descriptors:
            with socket.socket(fileno=descriptor) as connection:
                child = _fork(handle, limits, connection, control, libc)
            if child is not None:
                young.append((time.monotonic() + SHORT_S, child))


def _slow_down_the_old(young: deque[tuple[float, int]]) -> None:
    """Done from here, because a child that computes inside a library hears nothing."""
    while young and young[0][0] <= time.monotonic():
        _, child = young.popleft()
        if sys.platform == "linux":
            with contextlib.suppress(ProcessLookupError):  # it is done
                os.sched_setscheduler(child, os.SCHED_IDLE, os.sched_param(0))


def _fork(
    handle: Callable[[bytes], bytes],
    limits: JobLimits,
    connection: socket.socket,
    control: socket.socket,
    libc: ctypes.CDLL,
) -> int | None:
    """The child that does the job; None if there could be none."""
    try:
        child = os.fork()
    except OSError:
        return None  # the end of its socket tells the caller
    if child:
        return child
    status = 1
    try:
        _limit_this_process(limits, libc)
        control.close()
        _work(handle, limits, connection)
        status = 0
    except Exception:
        logger.exception("a job failed")
    finally:
        os._exit(status)  # nothing of the worker's own must run in its child


def _limit_this_process(limits: JobLimits, libc: ctypes.CDLL) -> None:
    """All of these are kept by the kernel: none needs this process's help to strike."""
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # with the worker, which ends with the server
    with contextlib.suppress(OSError):  # should memory run out all the same, the model is not what goes
        Path("/proc/self/oom_score_adj").write_text("1000")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits.seconds)
    seconds = math.ceil(limits.seconds)
    for name, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(name, (soft, hard))
    os.nice(NICENESS)


def _work(handle: Callable[[bytes], bytes], limits: JobLimits, connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):  # the server asks no more
        job = bytearray()
        while chunk := connection.recv(CHUNK_BYTES):
            job += chunk
        try:
            answer = handle(bytes(job))
        except MemoryError:
            connection.sendall(OUT_OF_MEMORY)
            return
        if len(answer) > limits.output_bytes:
            connection.sendall(TOO_MUCH_OUTPUT)
            return
        connection.sendall(DONE)
        connection.sendall(answer)


def control_socket(argument: str) -> socket.socket:
    """The worker's end of the control socket, which the server passes as the last argument."""
    return socket.socket(fileno=int(argument))


def _environment() -> dict[str, str]:
    """The same jaxserve importable from any directory, and nothing that could be a secret."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment
