"""Server-sent events: the response around a stream of chunks, and its end however it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from quart import Response

from jaxserve.api.context import server_context

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
KEEP_ALIVE = b": keep-alive\n\n"


def sse_response(chunks: AsyncIterator[bytes], *, on_close: Callable[[], None]) -> Response:
    """A streaming response of `chunks`, each one write.

    `on_close` is called exactly once, when the request's task ends: after the last chunk, or when the client
    has gone. That cancels the task, also before the stream has begun; a client that reads nothing for
    `--stall-timeout` is made to go.
    """
    task = asyncio.current_task()
    assert task is not None, "a handler runs in a task"
    task.add_done_callback(lambda _: on_close())
    interval_s = server_context().config.sse_keep_alive_interval_s
    events = _with_keep_alive(chunks, interval_s) if interval_s else chunks
    response = Response(events, content_type="text/event-stream; charset=utf-8", headers=HEADERS)
    response.timeout = None  # Quart would cut the stream after a minute, silently
    return response


async def _with_keep_alive(chunks: AsyncIterator[bytes], interval_s: float) -> AsyncIterator[bytes]:
    """A comment after every `interval_s` without a chunk."""
    following: asyncio.Task[bytes] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(_next(chunks))
            await asyncio.wait({following}, timeout=interval_s)
            if not following.done():
                yield KEEP_ALIVE
                continue
            try:
                chunk = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield chunk
    finally:
        if following is not None:
            following.cancel()


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    return await anext(chunks)
