"""The app behind a real HTTP server, in the test's own event loop: what streams and disconnects need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

from jaxserve.api.app import create_app
from jaxserve.api.context import ServerContext
from jaxserve.api.http_server import HttpServer, listen


class Served(NamedTuple):
    port: int
    context: ServerContext
    http: HttpServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class RawResponse(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes


@asynccontextmanager
async def serving(context: ServerContext) -> AsyncIterator[Served]:
    """Serve `context` on a port of the system's choice; its configuration must say port=0."""
    listener = listen(context.config)
    http = HttpServer(create_app(context), context.config, listener)
    context.num_connections = lambda: http.num_connections
    stop = asyncio.Event()
    port = listener.getsockname()[1]
    server = asyncio.create_task(http.serve(stop))
    try:
        yield Served(port, context, http)
    finally:
        stop.set()
        await server


async def exchange(port: int, request: str | bytes) -> RawResponse:
    """Send bytes as they are on a connection of their own; clients would tidy them up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode() if isinstance(request, str) else request)
    response = await read_response(reader)
    writer.close()
    return response


async def read_response(reader: asyncio.StreamReader) -> RawResponse:
    """A response with a Content-Length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name
    }
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return RawResponse(int(first.split()[1]), headers, body)


async def until(condition: Callable[[], bool | Awaitable[bool]], limit_s: float = 5.0) -> None:
    """Wait until `condition` holds; the loop goes on meanwhile."""
    async with asyncio.timeout(limit_s):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.002)
