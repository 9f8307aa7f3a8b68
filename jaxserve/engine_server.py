"""The engine process: `python -m jaxserve.engine_server [--log-level LEVEL] SOCKET`.

It connects to the API process's UNIX socket, reads its EngineConfig as the first frame, says EngineInfo when it is
ready, and then steps while there is work. One thread reads the socket, one writes it, and the main thread steps:
a slow reader on the other side never delays a step. The process ends when the socket closes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, JaxserveError, ModelLoadError, RequestError
from jaxserve.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    AbortRequest,
    AddRequest,
    EngineFailed,
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
from jaxserve.models.loader.hub import resolve_model
from jaxserve.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from jaxserve.engine import Engine

logger = logging.getLogger("jaxserve.engine")
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>


class Connection:
    """Frames over a socket: `received` and `send` are queues, so that nobody waits for the other side."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.received: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="engine-writer", daemon=True)

    def read_config(self) -> EngineConfig:
        """The first frame.

        Raises:
            EOFError: the other side has gone.
        """
        body = self._read_frame()
        fields: dict[str, Any] = msgspec.msgpack.decode(body)
        return EngineConfig(**fields)

    def start(self) -> None:
        """Begin to read and write in the background."""
        self._writer.start()
        threading.Thread(target=self._read_all, name="engine-reader", daemon=True).start()

    def send(self, message: FromEngine) -> None:
        self._outgoing.put(encode_frame(message))

    def flush(self, timeout_s: float = 5.0) -> None:
        """Write what is queued, then stop writing."""
        self._outgoing.put(None)
        self._writer.join(timeout_s)

    def _read_all(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToEngine)
        try:
            while True:
                self.received.put(decoder.decode(self._read_frame()))
        except (EOFError, OSError):
            # nobody is left to serve, whatever the main thread is at: also in the middle of a compilation
            os._exit(0)

    def _write_all(self) -> None:
        while (frame := self._outgoing.get()) is not None:
            try:
                self._socket.sendall(frame)
            except OSError:
                return  # the reader notices, too

    def _read_frame(self) -> bytes:
        (size,) = FRAME_HEADER.unpack(self._read_exactly(FRAME_HEADER.size))
        if size > MAX_FRAME_BYTES:
            raise EOFError
        return self._read_exactly(size)

    def _read_exactly(self, size: int) -> bytes:
        chunks = bytearray()
        while len(chunks) < size:
            chunk = self._socket.recv(min(size - len(chunks), 1 << 20))
            if not chunk:
                raise EOFError
            chunks += chunk
        return bytes(chunks)


def serve(connection: Connection, config: EngineConfig) -> None:
    """Load, then step until told to end."""
    # these import jax: only once the socket is there to report on it
    from jaxserve.engine import Engine
    from jaxserve.lockstep import end_process
    from jaxserve.model_runner import ModelRunner

    def report(text: str) -> None:
        connection.send(StartupPhase(text=text))

    def lose(reason: str) -> NoReturn:
        connection.send(EngineFailed(message=reason, user_error=False))
        connection.flush()
        end_process(reason)

    gc.disable()  # tracing makes millions of objects that live as long as the programs
    _keep_freed_memory(megabytes=1024)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(_load_tokenizer, config)
        runner = ModelRunner(config, report, lose)
        engine = Engine(runner, seed=config.seed, tokenizer=loading.result())
    gc.enable()
    gc.freeze()
    _keep_freed_memory(megabytes=64)
    connection.send(engine.info())
    _warm_up_constraints(engine)
    while True:
        while not engine.has_work or not connection.received.empty():
            message = connection.received.get()
            match message:
                case AddRequest():
                    try:
                        engine.add_request(message)
                    except RequestError as error:
                        connection.send(_refusal(message, error, engine.stats()))
                case AbortRequest():
                    engine.abort_request(message)
                    if not engine.has_work:
                        connection.send(StepOutputs(outputs=[], stats=engine.stats()))
                case Profile():
                    connection.send(Profiled(error=runner.profile(running=message.running)))
                case Shutdown():
                    runner.close()
                    return
        connection.send(engine.step())


def _warm_up_constraints(engine: Engine) -> None:
    """The first constraint would make all streams wait for the vocabulary's preparation."""
    if engine.tokenizer is not None:
        with contextlib.suppress(RequestError):  # said to whoever asks for one
            engine.text_constraints.compiler(engine.tokenizer.eos_token_ids).prepare()


def _load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """For stop strings in beams. What is wrong with it, the API process says: it needs it for everything."""
    try:
        return load_tokenizer(resolve_model(config.tokenizer or config.model))
    except JaxserveError:
        return None


def _refusal(request: AddRequest, error: RequestError, stats: Any) -> StepOutputs:
    outputs = [
        SequenceOutput(request.request_id, index, [], finish_reason="error", error=str(error))
        for index in range(request.params.n)
    ]
    return StepOutputs(outputs=outputs, stats=stats)


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent dies: the end of the socket says so, too, but only to a
    thread that gets to run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _keep_freed_memory(*, megabytes: int) -> None:
    """How much of the heap the GNU C library keeps from now on instead of handing it back; what is more than that goes
    now. A compiler frees and takes so much that the system's clearing of pages was a sixth of a cold start."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(M_TRIM_THRESHOLD, megabytes << 20)
        libc.mallopt(M_TOP_PAD, min(megabytes, 64) << 20)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        libc.malloc_trim(megabytes << 20)


def configure_logging(name: str) -> None:
    """Log what jaxserve itself has to say from level `name` on, and only the troubles of the libraries: jax, for one,
    tells at INFO of every platform that the machine does not have."""
    level = logging.getLevelNamesMapping()[name]
    logging.basicConfig(
        stream=sys.stderr,
        level=max(level, logging.WARNING),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("jaxserve").setLevel(level)
    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault(
        "TF_CPP_MIN_LOG_LEVEL", "2"
    )  # of XLA's own log, read when jax is imported; 2: errors


def main() -> int:
    """Entry point; the exit status is 0 after Shutdown, 2 for a wrong model or flag, 1 for a defect."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the API process, which drains
    _end_with_parent()
    parser = argparse.ArgumentParser(prog="python -m jaxserve.engine_server")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("socket")
    arguments = parser.parse_args()
    configure_logging(arguments.log_level.upper())
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(arguments.socket)
        connection = Connection(sock)
        config = connection.read_config()
    except (OSError, EOFError):
        return 0  # the API process has ended already
    connection.start()
    try:
        serve(connection, config)
    except (ConfigError, ModelLoadError) as error:
        connection.send(EngineFailed(message=str(error), user_error=True))
        connection.flush()
        return 2
    except Exception as error:
        logger.exception("the engine failed")
        connection.send(
            EngineFailed(message=f"{type(error).__name__}: the engine failed; see its log", user_error=False)
        )
        connection.flush()
        return 1
    connection.flush()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # the reader thread may hold the socket; XLA's own threads need no farewell
