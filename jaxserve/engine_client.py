"""The API process's side of the engine: submit, stream, abort, health; and the engine process's life."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from jaxserve.config import EngineConfig
from jaxserve.errors import (
    EngineDeadError,
    EngineStalledError,
    EngineStartingError,
    ModelLoadError,
    RequestError,
)
from jaxserve.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineInfo,
    EngineStats,
    FromEngine,
    Profile,
    Profiled,
    SequenceOutput,
    Shutdown,
    StartupPhase,
    StepOutputs,
    ToEngine,
    encode_frame,
)

logger = logging.getLogger("jaxserve.engine_client")
EXIT_GRACE_S = 5.0
EXIT_STATUS_LIMIT_S = 1.0
WATCH_INTERVAL_S = 0.25
KILL_POLL_S = 0.01
ENGINE_COMMAND = (sys.executable, "-m", "jaxserve.engine_server")

RequestStream = AsyncIterator[list[SequenceOutput]]
"""Outputs of one request, a list a step; ends when every sequence is finished or aborted."""


class EngineLoad(NamedTuple):
    """What is in the engine now. A request waits until its first sequence has been scheduled."""

    num_waiting_requests: int = 0
    num_waiting_tokens: int = 0
    num_sequences: int = 0


class EngineClient(Protocol):
    """What the API needs of an engine."""

    @property
    def info(self) -> EngineInfo:
        """Raises EngineStartingError before the engine is ready."""
        ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def load(self) -> EngineLoad: ...

    def check_serving(self) -> None:
        """Raises EngineStartingError, EngineDeadError or EngineStalledError unless the engine serves."""
        ...

    def submit(self, request: AddRequest) -> RequestStream:
        """Hand a request over. The stream raises EngineError if the engine fails; so does this call."""
        ...

    def abort(self, request_id: str, indices: list[int] | None = None) -> None:
        """End sequences of a request (None: all); their streams end. Unknown ones have ended already."""
        ...

    async def profile(self, *, running: bool) -> None:
        """Begin or end a trace of the engine. Raises RequestError if that is not possible now, or EngineError."""
        ...


class OutputStream:
    """One request's outputs on their way to its handler, the only one who reads them."""

    def __init__(self, request: AddRequest) -> None:
        params = request.params
        self.live = set(range(params.n if params.use_beam_search else params.num_sequences))
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.waiting = True
        self._arrived: deque[list[SequenceOutput]] = deque()
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None  # set while it waits

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> list[SequenceOutput]:
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self.live:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._arrived.popleft()

    def put(self, outputs: list[SequenceOutput]) -> None:
        self.waiting = False
        wanted = [output for output in outputs if output.index in self.live]
        if wanted:
            self._arrived.append(wanted)
            for output in wanted:
                if output.finish_reason is not None:
                    self.live.discard(output.index)
            self._wake()

    def end(self, indices: set[int]) -> None:
        self.live -= indices
        if not self.live:
            self._wake()

    def fail(self, error: Exception) -> None:
        self.live.clear()
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class SocketEngineClient:
    """An engine in a process of its own, over a UNIX socket.

    Args:
        stall_limit_s: with work pending and no word for this long, the engine counts as stalled.
        on_step: called with the statistics of every step; may be set later.
        command: how to start the engine process; the socket's path is appended.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        stall_limit_s: float = 60.0,
        on_step: Callable[[EngineStats], None] = lambda _: None,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._config = config
        self._stall_limit_s = stall_limit_s
        self.on_step = on_step
        self._command = command
        self._streams: dict[str, OutputStream] = {}
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._dead = False
        self._ended_for: str | None = None
        self._stalled = False
        self._last_word = time.monotonic()
        self._profiling = False
        self._profiled: asyncio.Future[Profiled] | None = None  # set while the engine is asked
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] | None = None
        self._door = contextlib.ExitStack()  # through which the engine process comes in
        self._tasks: list[asyncio.Task[None]] = []

    # --- what handlers use ----------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineStartingError("The model is still loading.")
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def load(self) -> EngineLoad:
        waiting = [stream for stream in self._streams.values() if stream.waiting]
        return EngineLoad(
            num_waiting_requests=len(waiting),
            num_waiting_tokens=sum(stream.num_prompt_tokens for stream in waiting),
            num_sequences=sum(len(stream.live) for stream in self._streams.values()),
        )

    def check_serving(self) -> None:
        if self._dead:
            raise EngineDeadError("The engine has ended.")
        if self._info is None:
            raise EngineStartingError("The model is still loading.")
        if self._stalled:
            raise EngineStalledError("The engine makes no progress.")

    def submit(self, request: AddRequest) -> RequestStream:
        self.check_serving()
        if not self._streams:
            self._last_word = time.monotonic()  # an idle engine says nothing, and need not
        stream = self._streams[request.request_id] = OutputStream(request)
        self._send(request)
        return stream

    def abort(self, request_id: str, indices: list[int] | None = None) -> None:
        stream = self._streams.get(request_id)
        if stream is None:
            return
        stream.end(set(stream.live) if indices is None else set(indices))
        if not stream.live:
            del self._streams[request_id]
        self._send(AbortRequest(request_id=request_id, indices=indices))

    def fail_all(self, error: Exception) -> None:
        """End every open stream with `error`, here and in the engine."""
        for request_id, stream in list(self._streams.items()):
            stream.fail(error)
            self._send(AbortRequest(request_id=request_id))
        self._streams.clear()

    # --- the engine process ---------------------------------------------------------------------------------

    async def spawn(self) -> None:
        """Begin the engine process, which then waits for `connect`."""
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._connected = connected = loop.create_future()

        def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not connected.done():
                connected.set_result((reader, writer))

        directory = self._door.enter_context(
            tempfile.TemporaryDirectory(prefix="jaxserve-")
        )  # its owner's only
        path = str(Path(directory) / "engine.sock")
        server = await asyncio.start_unix_server(on_connect, path, limit=MAX_FRAME_BYTES)
        self._door.callback(server.close)
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            path,
            env=engine_environment(),
            start_new_session=True,  # Ctrl-C in the terminal is for the API process alone
            stdin=asyncio.subprocess.DEVNULL,
        )

    async def connect(self) -> None:
        """Give the engine process its configuration; returns long before it is ready."""
        assert self._process is not None, "spawn() comes first"
        assert self._connected is not None
        exited = asyncio.create_task(self._process.wait())
        either: set[asyncio.Future[Any]] = {self._connected, exited}
        with self._door:
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                exited.cancel()
        if not self._connected.done():
            self._die(f"The engine process {await self._how_it_ended()} before it connected.")
            return
        reader, self._writer = self._connected.result()
        body = msgspec.msgpack.encode(dataclasses.asdict(self._config))
        self._writer.write(FRAME_HEADER.pack(len(body)) + body)
        self._tasks = [asyncio.create_task(self._read(reader)), asyncio.create_task(self._watch())]
        self._tasks[0].add_done_callback(self._reader_ended)

    async def profile(self, *, running: bool) -> None:
        self.check_serving()
        if self._profiled is not None or running == self._profiling:
            state = (
                "is being written"
                if self._profiled
                else "is running already"
                if running
                else "is not running"
            )
            raise RequestError(f"A trace {state}.")
        self._profiled = asyncio.get_running_loop().create_future()
        self._send(Profile(running=running))
        try:
            answer = await asyncio.shield(self._profiled)
        finally:
            self._profiled = None
        if answer.error is not None:
            raise RequestError(f"The profiler failed: {answer.error}")
        self._profiling = running

    async def wait_ready(self) -> EngineInfo:
        """The engine's own description, once it is ready.

        Raises:
            ModelLoadError: the model or a flag is at fault.
            EngineDeadError: the engine failed.
        """
        assert self._ready is not None, "spawn() comes first"
        return await asyncio.shield(self._ready)

    async def stop(self) -> None:
        """End the engine process and wait for it."""
        self._dead = True
        self._door.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is None:
            return
        if self._writer is not None:
            self._send(Shutdown())
            self._writer.close()  # it ends at the end of the socket, too, whatever it is at
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), EXIT_GRACE_S)
        self.kill()
        await self._process.wait()

    def kill(self) -> None:
        """End the engine process now."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def kill_and_wait(self, limit_s: float) -> bool:
        """End the engine process now and block until it is gone, for at most `limit_s`; whether it is.

        For a caller that ends next, without its event loop: what starts after it finds the memory and the
        accelerator free.
        """
        self.kill()
        deadline = time.monotonic() + limit_s
        while self._process is not None:
            try:
                if os.waitpid(self._process.pid, os.WNOHANG)[0]:
                    return True
            except ChildProcessError:  # somebody else waited for it
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(KILL_POLL_S)
        return True

    # --- frames ---------------------------------------------------------------------------------------------

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        try:
            while True:
                (size,) = FRAME_HEADER.unpack(await reader.readexactly(FRAME_HEADER.size))
                if size > MAX_FRAME_BYTES:
                    raise msgspec.DecodeError(f"a frame of {size:,} bytes")
                self._receive(decoder.decode(await reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._lose()
            self._die(f"The engine process {await self._how_it_ended()}.")
        except msgspec.DecodeError as error:
            self.kill()
            self._die(f"The engine process sent what cannot be read: {error}.")

    def _reader_ended(self, task: asyncio.Task[None]) -> None:
        """A defect on this side must not look like an engine that has nothing to say."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("reading from the engine failed", exc_info=error)
            self.kill()
            self._die("The engine's output could not be handled.")

    async def _how_it_ended(self) -> str:
        """In words: the status tells a crash from the system's taking its memory back."""
        assert self._process is not None, "spawn() comes first"
        try:
            status = await asyncio.wait_for(self._process.wait(), EXIT_STATUS_LIMIT_S)
        except TimeoutError:
            self.kill()  # alive, but of no use; its memory is
            return "closed its connection"
        if status >= 0:
            return f"ended with status {status}"
        name = signal.Signals(-status).name if -status in signal.valid_signals() else f"signal {-status}"
        return f"was killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")

    def _receive(self, message: FromEngine) -> None:
        self._last_word = time.monotonic()
        if self._stalled:
            self._stalled = False
            logger.warning("the engine makes progress again")
        match message:
            case StepOutputs():
                self._stats = message.stats
                self._route(message.outputs)
                self.on_step(message.stats)
            case StartupPhase():
                logger.info("%s", message.text)
            case EngineInfo():
                self._info = message
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(message)
            case Profiled():
                if self._profiled is not None:
                    self._profiled.set_result(message)
            case EngineFailed():
                self._die(message.message, user_error=message.user_error)

    def _route(self, outputs: list[SequenceOutput]) -> None:
        by_request: dict[str, list[SequenceOutput]] = {}
        for output in outputs:
            by_request.setdefault(output.request_id, []).append(output)
        for request_id, own in by_request.items():
            stream = self._streams.get(request_id)
            if stream is not None:  # else aborted, and the engine did not know yet
                stream.put(own)
                if not stream.live:
                    del self._streams[request_id]

    async def _watch(self) -> None:
        """Notice an engine that has work and says nothing."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            silent_s = time.monotonic() - self._last_word
            if self._streams and not self._stalled and self._stall_limit_s and silent_s > self._stall_limit_s:
                logger.error("the engine has finished no step for %.0f s", silent_s)
                self._stalled = True
                self.fail_all(EngineStalledError("The engine makes no progress."))

    def _lose(self) -> None:
        """Nothing more will come: every open stream ends with an error, and no request is taken."""
        self._dead = True
        self._stats = msgspec.structs.replace(self._stats, num_running=0, num_waiting=0, kv_cache_usage=0.0)
        for stream in self._streams.values():
            stream.fail(EngineDeadError("The engine has ended."))
        if self._profiled is not None and not self._profiled.done():
            self._profiled.set_exception(EngineDeadError("The engine has ended."))
        self._streams.clear()

    def _die(self, reason: str, *, user_error: bool = False) -> None:
        """The engine has ended; the first reason counts, and whoever waits for its start is told."""
        if self._ended_for is not None:
            return
        self._ended_for = reason
        starting = self._ready is not None and not self._ready.done()
        if starting and self._ready is not None:
            self._ready.set_exception(ModelLoadError(reason) if user_error else EngineDeadError(reason))
            self._ready.exception()  # marks it as seen: nobody need wait
        else:
            logger.error("%s", reason)
        self._lose()


def engine_environment() -> dict[str, str]:
    """The engine's environment: the same jaxserve importable from any directory, no keys, and no threads of numpy's
    BLAS, which nothing uses: they spin while the engine starts."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {k: v for k, v in os.environ.items() if k != "JAXSERVE_API_KEY"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    return environment
