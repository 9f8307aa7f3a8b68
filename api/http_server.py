"""HTTP on one socket: Hypercorn's protocols, with connections that are counted, watched and ended on time."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import secrets
import socket
import ssl
import stat
import termios
from array import array
from typing import TYPE_CHECKING

import h11
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Body, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.ws_stream import Handshake
from hypercorn.utils import wrap_app

from jaxserve.api.errors import HttpError, headers_too_large, invalid_handshake, malformed_request
from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from quart import Quart

MAX_HEADER_BYTES = 16 << 10  # while it arrives
KEEP_ALIVE_S = 20.0  # longer than SDKs keep idle connections (5 s), so that it is they who close them
KEEPALIVE_IDLE_S = 60  # a client whose machine vanished is noticed, also while it waits in the queue
TLS_HANDSHAKE_S = 10.0
LINGER_S = 2.0  # for a client to take in its answer and close
FAREWELL_S = 1.0  # for the last bytes of connections when the server ends
BACKLOG = 1024
SPARE_CONNECTIONS = 64  # beyond --max-connections: enough to answer them with 503
SPARE_FILES = 128


def listen(config: ServerConfig) -> socket.socket:
    """Bind to `--uds`, or to `--host` and `--port`; from then on the system accepts connections.

    Raises:
        ConfigError: that is not possible; the message says why.
    """
    try:
        listener = _unix(config.uds) if config.uds else _tcp(config)
    except OSError as error:
        place = f"--uds {config.uds}" if config.uds else f"--host {config.host} --port {config.port}"
        raise ConfigError(f"{place}: cannot listen there: {error.strerror or error}.") from error
    listener.setblocking(False)
    return listener


def _tcp(config: ServerConfig) -> socket.socket:
    host = config.host.strip("[]")
    family, _, _, _, address = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    # connections inherit all of these
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    return _listening(listener, address)


def _unix(path: str) -> socket.socket:
    if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode) and not _is_served(path):
        os.unlink(path)  # left behind by a server that was killed
    return _listening(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), path)


def _listening(listener: socket.socket, address: object) -> socket.socket:
    try:
        listener.bind(address)  # type: ignore[arg-type]
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
    return True


def hypercorn_config(server: ServerConfig) -> Config:
    """Hypercorn's settings; it gets its socket ready-made.

    Raises:
        ConfigError: a TLS file is wrong.
    """
    config = Config()
    config.root_path = server.root_path
    config.keyfile, config.certfile = server.ssl_keyfile, server.ssl_certfile
    if server.ssl_ca_certs:  # without the second line the first would change nothing
        config.ca_certs = server.ssl_ca_certs
        config.verify_mode = ssl.CERT_REQUIRED
    config.h11_max_incomplete_size = MAX_HEADER_BYTES
    config.h2_max_header_list_size = MAX_HEADER_BYTES
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.include_server_header = False
    config.errorlog = logging.getLogger("jaxserve.http")
    config.errorlog.setLevel(logging.WARNING)
    config.accesslog = None  # the app writes its own
    for flag, path in (
        ("--ssl-keyfile", server.ssl_keyfile),
        ("--ssl-certfile", server.ssl_certfile),
        ("--ssl-ca-certs", server.ssl_ca_certs),
    ):
        if path is not None and not os.access(path, os.R_OK):
            raise ConfigError(f"{flag}: {path} cannot be read.")
    try:
        config.create_ssl_context()
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"--ssl-keyfile, --ssl-certfile, --ssl-ca-certs: {error}.") from error
    return config


class HttpServer:
    """Serves an app on a listening socket.

    Args:
        listener: as from `listen`; closed when serving ends.
    """

    def __init__(self, app: Quart, config: ServerConfig, listener: socket.socket) -> None:
        self._app = app
        self._http = hypercorn_config(config)
        self._listener = listener
        self._stall_timeout_s = config.stall_timeout_s
        self._max_connections = config.max_connections + SPARE_CONNECTIONS
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @property
    def num_connections(self) -> int:
        """Open connections, idle ones included."""
        return len(self._connections)

    async def serve(self, stop: asyncio.Event) -> None:
        """Until `stop`; what is open then has FAREWELL_S to end."""
        _allow_open_files(self._max_connections + SPARE_FILES)
        loop = asyncio.get_running_loop()
        context = WorkerContext(None)
        app = wrap_app(self._app, self._http.wsgi_max_body_size, "asgi")

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            if self.num_connections >= self._max_connections:
                writer.transport.abort()
                return
            self._connections[task] = writer
            try:
                await _Connection(
                    app, loop, self._http, context, {}, reader, writer, stall_timeout_s=self._stall_timeout_s
                )
            finally:
                del self._connections[task]

        tls = self._http.create_ssl_context()
        server = await asyncio.start_server(
            connected,
            sock=self._listener,
            backlog=BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=TLS_HANDSHAKE_S if tls else None,
        )
        await self._app.startup()
        try:
            await stop.wait()
        finally:
            server.close()
            await context.terminated.set()  # ends idle connections
            await self._end_connections()
            await self._app.shutdown()

    async def _end_connections(self) -> None:
        if self._connections:
            await asyncio.wait(set(self._connections), timeout=FAREWELL_S)
        for writer in self._connections.values():
            writer.transport.abort()
        if self._connections:
            await asyncio.wait(set(self._connections), timeout=FAREWELL_S)


class _Connection(TCPServer):  # type: ignore[misc]
    """Hypercorn's connection, but one that ends when its client has closed it or does not read."""

    def __init__(self, *args: object, stall_timeout_s: float) -> None:
        super().__init__(*args)
        self._stall_timeout_s = stall_timeout_s
        self._is_tls = self.writer.get_extra_info("ssl_object") is not None
        self._lingering: asyncio.TimerHandle | None = None

    async def _read_data(self) -> None:
        if isinstance(self.protocol.protocol, H11Protocol):
            self.protocol.protocol = _Http1.instead_of(self.protocol.protocol)
        await super()._read_data()
        await self.idle_task.stop()  # else the connection would stay open for the rest of KEEP_ALIVE_S

    async def protocol_send(self, event: Event) -> None:
        if (
            isinstance(event, Closed)
            and self.writer.can_write_eof()
            and not self.reader.at_eof()
            and self._linger()
        ):
            return
        if isinstance(event, RawData) and self._writes_at_once:
            self.writer.write(event.data)
            if self.writer.transport.get_write_buffer_size() == 0:
                return  # the system has taken all of it: there is nothing to wait for, and nobody to watch
            event = RawData(data=b"")
        with _StallWatch(self.writer.transport, self._stall_timeout_s):
            await super().protocol_send(event)

    @property
    def _writes_at_once(self) -> bool:
        """Whether what is written now goes to the system, not behind something else. TLS has buffers of its own."""
        transport = self.writer.transport
        return (
            not self._is_tls
            and not self.send_lock.locked()
            and not transport.is_closing()
            and transport.get_write_buffer_size() == 0
        )

    def _linger(self) -> bool:
        """Say that nothing more will come, and read on until the client closes, too: closing with bytes of a
        refused body unread would make the client's system throw away the answer. Returns False if the client is
        gone."""
        if self._lingering is None and not self.writer.is_closing():
            try:
                self.writer.write_eof()
            except OSError:  # it has reset the connection
                return False
            self._lingering = asyncio.get_running_loop().call_later(LINGER_S, self._stop_reading)
        return True

    def _stop_reading(self) -> None:
        self.writer.transport.pause_reading()
        self.reader.feed_eof()

    async def _close(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        with _StallWatch(self.writer.transport, self._stall_timeout_s):
            await super()._close()


class _Http1(H11Protocol):  # type: ignore[misc]
    """Hypercorn's HTTP/1.1, whose own refusals have the envelope of all others and end the connection, and whose chunks
    cost little."""

    _is_chunked = False  # the response under way

    @classmethod
    def instead_of(cls, other: H11Protocol) -> _Http1:
        """For the same connection, on which nothing has been read yet."""
        place = (other.app, other.config, other.context, other.task_group, other.connection_state)
        return cls(*place, other.ssl, other.client, other.server, other.send)

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Body) and self._is_chunked and self.connection.our_state is h11.SEND_BODY:
            # as h11 would write it, whose state it does not change
            await self.send(RawData(data=b"%x\r\n%b\r\n" % (len(event.data), event.data)))
            return
        if isinstance(event, Response):
            has_length = any(name.lower() == b"content-length" for name, _ in event.headers)
            self._is_chunked = (
                event.status_code == 200 and not has_length and self.connection.their_http_version == b"1.1"
            )
        await super().stream_send(event)

    async def _create_stream(self, request: h11.Request) -> None:
        headers = {name: value.lower() for name, value in request.headers}
        wants_websocket = (
            b"upgrade" in headers.get(b"connection", b"") and headers.get(b"upgrade") == b"websocket"
        )
        if wants_websocket and not Handshake(list(request.headers), request.http_version.decode()).is_valid():
            await self._refuse(invalid_handshake())
            await self.send(Closed())  # Hypercorn would keep it open for ever
        else:
            await super()._create_stream(request)

    async def _send_error_response(self, status_code: int) -> None:
        is_large = status_code == 431
        await self._refuse(
            headers_too_large(MAX_HEADER_BYTES) if is_large else malformed_request(status_code)
        )

    async def _refuse(self, error: HttpError) -> None:
        content = error.body.to_json()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
            (b"connection", b"close"),
            (b"x-request-id", secrets.token_hex(16).encode()),
            *self.config.response_headers("h11"),
        ]
        await self._send_h11_event(h11.Response(status_code=error.body.status, headers=headers))
        await self._send_h11_event(h11.Data(data=content))
        await self._send_h11_event(h11.EndOfMessage())


class _StallWatch:
    """While it is open, abort the transport if its client has read nothing for `timeout_s` (0: never)."""

    def __init__(self, transport: asyncio.WriteTransport, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._least_left: int | None = None
        self._progress_at = 0.0

    def __enter__(self) -> None:
        if self._timeout_s:
            self._progress_at = self._loop.time()
            self._timer = self._loop.call_later(self._timeout_s / 4, self._check)

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        left = _unread_bytes(self._transport)
        now = self._loop.time()
        if self._least_left is None or left < self._least_left:
            self._least_left, self._progress_at = left, now
        elif now - self._progress_at >= self._timeout_s:
            self._transport.abort()
            return
        self._timer = self._loop.call_later(self._timeout_s / 4, self._check)


def _unread_bytes(transport: asyncio.WriteTransport) -> int:
    """Written and not yet taken by the client's system. The transport's own buffer is not enough: the system's
    may hold megabytes, and takes more only once a third of them has gone."""
    unread = transport.get_write_buffer_size()
    own = transport.get_extra_info("socket")
    if own is not None and own.fileno() >= 0:
        queued = array("i", [0])
        with contextlib.suppress(OSError):  # a system that cannot tell
            fcntl.ioctl(own.fileno(), termios.TIOCOUTQ, queued)
        unread += queued[0]
    return unread


def _allow_open_files(wanted: int) -> None:
    """Every connection is an open file; shells start programs with as few as 1,024, and raising that is free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
