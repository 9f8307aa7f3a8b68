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
import hmac
import logging
import os
import queue
import secrets
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
SECRET_BYTES = 32
JOIN_LIMIT_S = 300  # for all processes to have started
CONNECT_LIMIT_S = 60.0  # for them to reach each other's sockets after that
GREETING_LIMIT_S = 5.0  # for whoever connects to say who it is
HEARTBEAT_LIMIT_S = 30  # jax.distributed's own watch, where a machine is gone without a word
END_LIMIT_S = 10  # for all to end together
OWN_FIELDS = (
    "model",
    "tokenizer",
    "process_id",
    "compilation_cache",
)  # each process's; the rest is process 0's

OnLoss = Callable[[str], NoReturn]
"""Called in any thread, with one line, when another process is gone; ends this one."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Process 0's configuration, which all run under."""

    config: dict[str, Any]
    jax_version: str


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
    """A step begins: of the runner's `shape`-th shape, with these packed inputs."""

    shape: int
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

    def send_step(self, shape: int, packed: npt.NDArray[np.int32]) -> None:
        """Tell the others to run a step of the runner's `shape`-th shape."""

    def close(self) -> None:
        """End together with the others."""


class Leader(Lockstep):
    """Process 0's side: accepts the others.

    Raises:
        ConfigError: they do not come, or the address is none of this machine's.
    """

    def __init__(self, config: EngineConfig, on_loss: OnLoss) -> None:
        super().__init__(config)
        self._on_loss = on_loss
        self._closing = False
        self._ready: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        secret = secrets.token_bytes(SECRET_BYTES)
        host, _ = coordinator(config)
        try:
            listener = socket.create_server((host, 0), family=_family(host))
        except OSError as error:
            raise ConfigError(
                f"--coordinator-address: {host} cannot be listened on: {error.strerror}."
            ) from None
        with listener:
            _broadcast(secret + listener.getsockname()[1].to_bytes(2, "little"))
            self._followers = self._accept(listener, secret, config.num_processes - 1)
        hello = Hello(dataclasses.asdict(config), jax.__version__)
        for process_id, follower in self._followers.items():
            _send(follower, hello)
            threading.Thread(target=self._watch, args=(process_id, follower), daemon=True).start()
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

    def send_step(self, shape: int, packed: npt.NDArray[np.int32]) -> None:
        self._send_all(Step(shape, packed.tobytes()))

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

    def _accept(self, listener: socket.socket, secret: bytes, count: int) -> dict[int, socket.socket]:
        followers: dict[int, socket.socket] = {}
        deadline = time.monotonic() + CONNECT_LIMIT_S
        while len(followers) < count:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise ConfigError(
                    f"Only {len(followers)} of {count} processes reached this one's socket within "
                    f"{CONNECT_LIMIT_S:.0f} s: let them connect to {listener.getsockname()[0]}."
                ) from None
            connection.settimeout(GREETING_LIMIT_S)
            with contextlib.suppress(OSError, EOFError):  # a stranger
                greeting = _receive_exactly(connection, SECRET_BYTES + 2)
                if hmac.compare_digest(greeting[:SECRET_BYTES], secret):
                    _prepare(connection)
                    followers[int.from_bytes(greeting[SECRET_BYTES:], "little")] = connection
                    continue
            connection.close()
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
        message = _broadcast(bytes(SECRET_BYTES + 2))
        host, _ = coordinator(config)
        address = (host, int.from_bytes(message[SECRET_BYTES:], "little"))
        try:
            self._socket = socket.create_connection(address, CONNECT_LIMIT_S)
            self._socket.sendall(message[:SECRET_BYTES] + config.process_id.to_bytes(2, "little"))
            hello = _receive(self._socket)
        except (OSError, EOFError) as error:
            raise ConfigError(f"Process 0 cannot be reached at {host}, port {address[1]}: {error}.") from None
        assert isinstance(hello, Hello), "process 0 begins with it"
        if hello.jax_version != jax.__version__:
            raise ConfigError(f"Process 0 runs JAX {hello.jax_version}, this one {jax.__version__}.")
        own = {name: getattr(config, name) for name in OWN_FIELDS}
        super().__init__(EngineConfig(**hello.config | own))
        _prepare(self._socket)
        self._go = threading.Event()
        self._frames: queue.SimpleQueue[Table | Step | End] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

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


def join(config: EngineConfig, on_loss: OnLoss = end_process) -> Lockstep:
    """Meet the other processes, if there are to be any. Comes before anything else that JAX is asked for.

    Raises:
        ConfigError: they do not all come in time.
    """
    if config.num_processes == 1:
        return Lockstep(config)
    host, port = coordinator(config)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        jax.distributed.initialize(
            address,
            config.num_processes,
            config.process_id,
            coordinator_bind_address=address,
            initialization_timeout=JOIN_LIMIT_S,
            heartbeat_timeout_seconds=HEARTBEAT_LIMIT_S,
            shutdown_timeout_seconds=END_LIMIT_S,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"The {config.num_processes} processes did not meet at --coordinator-address {address}: "
            f"{str(error).splitlines()[0]:.200}"
        ) from None
    return Leader(config, on_loss) if config.process_id == 0 else Follower(config, on_loss)


def coordinator(config: EngineConfig) -> tuple[str, int]:
    """Host and port of --coordinator-address."""
    assert config.coordinator_address is not None, "the configuration asks for it"
    host, _, port = config.coordinator_address.rpartition(":")
    return host.strip("[]"), int(port)


def _broadcast(message: bytes) -> bytes:
    """Process 0's message, in every process; all bring one of the same length."""
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(message, np.uint8))
    return np.asarray(told).astype(np.uint8).tobytes()


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
