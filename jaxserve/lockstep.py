"""Several processes, one engine: process 0 schedules and serves, the others run what it runs.

`jax.distributed` makes the processes' devices one mesh. A program over it runs only if every process starts it, with
the same inputs and in the same order; so process 0 says what it is about to start, over a socket to each other process:
a socket and no collective, because a process that has died is noticed at once by whoever reads from it, and a
collective would wait for it. Whoever notices ends, whatever its main thread is waiting for.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import msgspec
import numpy as np
import numpy.typing as npt
from jax.experimental import multihost_utils

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.messages import FRAME_HEADER

logger = logging.getLogger("jaxserve.engine")
GREETING = b"jaxserve"  # then the process's id in two bytes
JOIN_LIMIT_S = 300.0  # for all processes to have started
GREETING_LIMIT_S = 5.0  # for whoever connects to say who it is
KNOCK_INTERVAL_S = 0.2  # of a process that waits for process 0 to have started
INITIALIZATION_LIMIT_S = 60  # of jax.distributed, once all are there
HEARTBEAT_LIMIT_S = 30  # its own watch, where a machine is gone without a word
END_LIMIT_S = 10  # for all to end together
OWN_FIELDS = (
    "model",
    "tokenizer",
    "process_id",
    "compilation_cache",
)  # each process's; the rest is process 0's

OnLoss = Callable[[str], NoReturn]
"""Called in any thread, with one line, when another process is gone; ends this one."""
Report = Callable[[str], None]
"""Takes one line for the start-up log."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Process 0's configuration, which all run under, and the port on its host where jax.distributed meets."""

    config: dict[str, Any]
    jax_version: str
    port: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """A process has loaded and compiled everything. `programs` says of what; it must be what process 0 has."""

    programs: str


class Go(msgspec.Struct, frozen=True, tag="go"):
    """All have; the first programs may run."""


class Table(msgspec.Struct, frozen=True, tag="table"):
    """A slot table has changed."""

    name: str
    data: bytes


class Step(msgspec.Struct, frozen=True, tag="step"):
    """A step begins: of the runner's `program`-th program, with these packed inputs."""

    program: int
    packed: bytes


class End(msgspec.Struct, frozen=True, tag="end"):
    """Process 0 was told to end."""


Frame = Hello | Ready | Go | Table | Step | End


def end_process(reason: str) -> NoReturn:
    """The default `OnLoss`. The main thread may be in a collective that never returns."""
    logger.error("%s", reason)
    sys.stderr.flush()
    os._exit(1)


class Lockstep:
    """What a process that is alone needs of the others: nothing. Also the interface of those that are not.

    Attributes:
        config: what the engine runs under, the same in all processes but for OWN_FIELDS.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    def least(self, value: int) -> int:
        """The least of the processes' values, to within a MiB."""
        return value

    def start_together(self, programs: str) -> None:
        """Wait until all processes have come this far.

        Args:
            programs: what was compiled, in words that differ where it does.

        Raises:
            ConfigError: another process has compiled something else.
        """

    def send_table(self, name: str, table: npt.NDArray[Any]) -> None:
        """Tell the others that a slot table is now this one."""

    def send_step(self, program: int, packed: npt.NDArray[np.int32]) -> None:
        """Tell the others to run a step of the runner's `program`-th program."""

    def close(self) -> None:
        """End together with the others."""


class Leader(Lockstep):
    """Process 0's side: accepts the others.

    Raises:
        ConfigError: they do not all come in time, or the address is none of this machine's.
    """

    def __init__(self, config: EngineConfig, on_loss: OnLoss, report: Report) -> None:
        super().__init__(config)
        self._on_loss = on_loss
        self._closing = False
        self._ready: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        host, port = coordinator(config)
        try:
            listener = socket.create_server((host, port), family=_family(host))
        except OSError as error:
            raise ConfigError(
                f"--coordinator-address {config.coordinator_address}: {error.strerror}."
            ) from None
        with listener:
            count = config.num_processes
            report(f"waiting at {config.coordinator_address} for {count - 1} more of {count} processes")
            self._followers = self._accept(listener)
        with socket.create_server((host, 0), family=_family(host)) as free:
            port = free.getsockname()[1]
        hello = Hello(dataclasses.asdict(config), jax.__version__, port)
        for process_id, follower in self._followers.items():
            _send(follower, hello)
            threading.Thread(target=self._watch, args=(process_id, follower), daemon=True).start()
        _initialize(config, port)
        atexit.register(self.close)  # in a script, whose engine has no other end

    def least(self, value: int) -> int:
        return _least(value)

    def start_together(self, programs: str) -> None:
        for _ in self._followers:
            process_id, theirs = self._ready.get()  # one that is lost ends this process
            if theirs != programs:
                raise ConfigError(
                    f"Process {process_id} has another model: it made {theirs}, process 0 {programs}."
                )
        self._send_all(Go())

    def send_table(self, name: str, table: npt.NDArray[Any]) -> None:
        self._send_all(Table(name, table.tobytes()))

    def send_step(self, program: int, packed: npt.NDArray[np.int32]) -> None:
        self._send_all(Step(program, packed.tobytes()))

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._send_all(End())
        jax.distributed.shutdown()  # waits for the others to do the same

    def _send_all(self, frame: Frame) -> None:
        data = _encode(frame)
        for process_id, follower in self._followers.items():
            try:
                follower.sendall(data)
            except OSError:
                self._lose(process_id)

    def _accept(self, listener: socket.socket) -> dict[int, socket.socket]:
        missing = set(range(1, self.config.num_processes))
        followers: dict[int, socket.socket] = {}
        deadline = time.monotonic() + JOIN_LIMIT_S
        while missing:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise ConfigError(
                    f"--num-processes {self.config.num_processes}: within {JOIN_LIMIT_S:.0f} s no --process-id "
                    f"{', '.join(map(str, sorted(missing)))} came to {self.config.coordinator_address}."
                ) from None
            connection.settimeout(GREETING_LIMIT_S)
            process_id = _greeted_by(connection)
            if process_id in missing:
                _prepare(connection)
                followers[process_id] = connection
                missing.remove(process_id)
            else:
                connection.close()  # a stranger
        return followers

    def _watch(self, process_id: int, follower: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                message = _receive(follower)
                assert isinstance(message, Ready), "a follower has nothing else to say"
                self._ready.put((process_id, message.programs))
        if not self._closing:
            self._lose(process_id)

    def _lose(self, process_id: int) -> NoReturn:
        self._on_loss(f"Process {process_id} has ended; its own log says why.")


class Follower(Lockstep):
    """The other processes' side: connects to process 0 and takes its configuration.

    Raises:
        ConfigError: process 0 cannot be reached, or runs another version of JAX.
    """

    def __init__(self, config: EngineConfig, on_loss: OnLoss) -> None:
        self._on_loss = on_loss
        host, port = coordinator(config)
        self._socket = _knock(host, port)
        try:
            self._socket.sendall(GREETING + config.process_id.to_bytes(2, "little"))
            hello = _receive(self._socket)
        except (OSError, EOFError) as error:
            raise ConfigError(
                f"--process-id {config.process_id}: process 0 at {config.coordinator_address} did not take it "
                f"({error}). Is there another one?"
            ) from None
        assert isinstance(hello, Hello), "process 0 begins with it"
        if hello.jax_version != jax.__version__:
            raise ConfigError(f"Process 0 runs JAX {hello.jax_version}, this one {jax.__version__}.")
        own = {name: getattr(config, name) for name in OWN_FIELDS}
        super().__init__(EngineConfig(**hello.config | own))
        _prepare(self._socket)
        self._go = threading.Event()
        self._frames: queue.SimpleQueue[Table | Step | End] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        _initialize(self.config, hello.port)

    def least(self, value: int) -> int:
        return _least(value)

    def start_together(self, programs: str) -> None:
        _send(self._socket, Ready(programs))
        self._go.wait()  # if process 0 is lost, this one ends

    def close(self) -> None:
        jax.distributed.shutdown()

    def frames(self) -> Iterator[Table | Step]:
        """What process 0 does, until it is told to end."""
        while not isinstance(frame := self._frames.get(), End):
            yield frame

    def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                match _receive(self._socket):
                    case Go():
                        self._go.set()
                    case Table() | Step() as frame:
                        self._frames.put(frame)
                    case End() as frame:
                        self._frames.put(frame)
                        return
        self._on_loss("Process 0 has ended; its own log says why.")


def join(config: EngineConfig, on_loss: OnLoss = end_process, report: Report = lambda _: None) -> Lockstep:
    """Meet the other processes, if there are to be any. Comes before anything else that JAX is asked for.

    Raises:
        ConfigError: they do not all come in time.
    """
    if config.num_processes == 1:
        return Lockstep(config)
    return Leader(config, on_loss, report) if config.process_id == 0 else Follower(config, on_loss)


def _initialize(config: EngineConfig, port: int) -> None:
    host, _ = coordinator(config)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    jax.distributed.initialize(
        address,
        config.num_processes,
        config.process_id,
        coordinator_bind_address=address,
        initialization_timeout=INITIALIZATION_LIMIT_S,
        heartbeat_timeout_seconds=HEARTBEAT_LIMIT_S,
        shutdown_timeout_seconds=END_LIMIT_S,
    )


def coordinator(config: EngineConfig) -> tuple[str, int]:
    """Host and port of --coordinator-address."""
    assert config.coordinator_address is not None, "the configuration asks for it"
    host, _, port = config.coordinator_address.rpartition(":")
    return host.strip("[]"), int(port)


def _knock(host: str, port: int) -> socket.socket:
    """Connect to process 0, which may start later than this one."""
    deadline = time.monotonic() + JOIN_LIMIT_S
    while True:
        try:
            return socket.create_connection((host, port), JOIN_LIMIT_S)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--coordinator-address: process 0 did not come to {host}, port {port}, within "
                    f"{JOIN_LIMIT_S:.0f} s: {error}."
                ) from None
        time.sleep(KNOCK_INTERVAL_S)


def _greeted_by(connection: socket.socket) -> int | None:
    """The id that another process says it has; None if it is no process of ours."""
    with contextlib.suppress(OSError, EOFError):
        greeting = _receive_exactly(connection, len(GREETING) + 2)
        if greeting.startswith(GREETING):
            return int.from_bytes(greeting[len(GREETING) :], "little")
    return None


def _least(num_bytes: int) -> int:
    gathered = multihost_utils.process_allgather(np.int32(num_bytes >> 20))  # JAX has no int64 here
    return int(np.min(np.asarray(gathered))) << 20


def _prepare(connection: socket.socket) -> None:
    """No delay for small frames; a machine that is gone without a word is noticed within seconds."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 5),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 20_000),
    ):
        if hasattr(socket, name):  # Linux has them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _encode(frame: Frame) -> bytes:
    body = msgspec.msgpack.encode(frame)
    return FRAME_HEADER.pack(len(body)) + body


def _send(connection: socket.socket, frame: Frame) -> None:
    connection.sendall(_encode(frame))


def _receive(connection: socket.socket) -> Frame:
    (size,) = FRAME_HEADER.unpack(_receive_exactly(connection, FRAME_HEADER.size))
    frame: Frame = msgspec.msgpack.decode(_receive_exactly(connection, size), type=Frame)
    return frame


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < size:
        chunk = connection.recv(min(size - len(chunks), 1 << 20))
        if not chunk:
            raise EOFError("the connection was closed")
        chunks += chunk
    return bytes(chunks)
