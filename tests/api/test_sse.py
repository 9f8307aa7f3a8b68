"""Streams and disconnects over real connections: headers, keep-alive, slow readers, clients that go away."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from jaxserve.api.app import create_app
from jaxserve.errors import EngineDeadError
from jaxserve.messages import AddRequest, SequenceOutput
from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient, generate
from tests.api.http_server import Served, exchange, read_response, serving, until
from tests.api.small_model import END, MODEL, falling_logprobs, make_context, make_tokenizer

pytestmark = pytest.mark.timing

BODY: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 60}
STREAM = BODY | {"stream": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient()


def post(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def token(request: AddRequest, text: str = "x", **more: Any) -> SequenceOutput:
    return SequenceOutput(request.request_id, 0, list(text.encode()), **more)


@asynccontextmanager
async def connection(server: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def submitted(engine: FakeEngineClient) -> AddRequest:
    await until(lambda: bool(engine.submitted))
    return engine.submitted[-1]


async def test_a_stream_has_its_headers_and_one_write_a_step(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with (
        serving(make_context(tokenizer, engine, port=0)) as server,
        connection(server) as (reader, writer),
    ):
        writer.write(post(STREAM | {"n": 2}))
        request = await submitted(engine)
        engine.emit(token(request, "a"), SequenceOutput(request.request_id, 1, [98]))
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        for line in (
            "content-type: text/event-stream; charset=utf-8",
            "cache-control: no-cache",
            "x-accel-buffering: no",
            "x-request-id: ",
        ):
            assert line in head
        chunk_size = int(await reader.readline(), 16)
        chunk = await reader.readexactly(chunk_size)  # one HTTP chunk a write
        assert [
            json.loads(e.removeprefix(b"data: "))["choices"][0]["text"] for e in chunk.split(b"\n\n") if e
        ] == [
            "a",
            "b",
        ]


async def test_a_client_of_an_older_http_gets_the_stream_without_chunks(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with (
        serving(make_context(tokenizer, engine, port=0)) as server,
        connection(server) as (reader, writer),
    ):
        writer.write(post(STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
        request = await submitted(engine)
        engine.emit(token(request, "a"))
        await reader.readuntil(b"\r\n\r\n")
        assert (await reader.readline()).startswith(b"data: {")
        engine.emit(token(request, "b", finish_reason="length"))
        assert (await reader.read()).endswith(b"}\n\ndata: [DONE]\n\n")


async def test_streams_follow_one_another_on_a_connection(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with (
        serving(make_context(tokenizer, engine, port=0)) as server,
        connection(server) as (reader, writer),
    ):
        for text in "abc":
            writer.write(post(STREAM))
            await until(lambda: bool(engine.live))
            engine.emit(token(engine.submitted[-1], text), token(engine.submitted[-1], text))
            engine.emit(token(engine.submitted[-1], finish_reason="length"))
            assert f'"text":"{text}"'.encode() in await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await read_response(reader)).status == 200


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("begun", [True, False], ids=["in decode", "in the queue"])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
async def test_a_client_that_goes_away_aborts_its_request_at_once(
    tokenizer: Tokenizer, engine: FakeEngineClient, how: str, begun: bool, streamed: bool
) -> None:
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(post(BODY | {"stream": streamed}))
        request = await submitted(engine)
        if begun:
            engine.emit(token(request))
        if begun and streamed:
            await reader.readuntil(b"data: ")
        left_at = asyncio.get_running_loop().time()
        if how == "half-close":
            writer.write_eof()
        else:
            if how == "reset":
                own = writer.get_extra_info("socket")
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
        await until(lambda: bool(engine.aborted))
        assert asyncio.get_running_loop().time() - left_at < 0.5
        await until(lambda: server.http.num_connections == 0)
        assert engine.aborted == [(request.request_id, None)]
        assert server.context.admission.num_requests == 0
        assert server.context.num_open_requests == 0
        writer.close()


async def test_a_client_that_closes_right_behind_its_body_is_not_served(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    context = make_context(tokenizer, engine, port=0)
    app = create_app(context)
    events = [{"type": "http.request", "body": json.dumps(BODY).encode()}, {"type": "http.disconnect"}]
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/completions",
        "raw_path": b"/v1/completions", "query_string": b"", "headers": [(b"host", b"x")],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return events.pop(0)

    async def send(message: object) -> None:
        pytest.fail(f"sent {message}")

    async with app.test_app():
        await asyncio.wait_for(app(scope, receive, send), 2)  # type: ignore[arg-type]
    assert len(engine.submitted) == len(engine.aborted)
    assert context.admission.num_requests == 0


async def test_an_idle_connection_that_its_client_closes_is_gone(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        for _ in range(3):
            assert (await exchange(server.port, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200
        await until(lambda: server.http.num_connections == 0, limit_s=2)


async def test_a_connection_serves_one_request_after_another(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    engine.script = lambda request: generate(request, [[104, 105, END]])
    async with (
        serving(make_context(tokenizer, engine, port=0)) as server,
        connection(server) as (reader, writer),
    ):
        for _ in range(3):
            writer.write(post(BODY))
            response = await read_response(reader)
            assert json.loads(response.body)["choices"][0]["text"] == "hi"
        assert server.http.num_connections == 1


def bulky(request: AddRequest, num_tokens: int, **more: Any) -> SequenceOutput:
    """Tokens that come to some 300 bytes each, by their logprobs."""
    logprobs = [falling_logprobs(120, 20)] * num_tokens
    return SequenceOutput(request.request_id, 0, [120] * num_tokens, logprobs=logprobs, **more)


async def test_a_client_that_sends_all_of_its_large_body_sees_the_413(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with (
        serving(make_context(tokenizer, engine, port=0)) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        for _ in range(3):
            refused = await client.post("/v1/completions", content=b" " * 8_000_000)
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")


async def test_a_refused_client_that_neither_closes_nor_stops_sending_is_cut_off(
    tokenizer: Tokenizer, engine: FakeEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.api.http_server.LINGER_S", 0.1)
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000000\r\n\r\n")
        assert (await read_response(reader)).status == 413
        writer.write(b"x" * 100_000)
        await until(lambda: server.http.num_connections == 0)
        writer.close()


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_a_client_that_does_not_read_is_aborted(
    tokenizer: Tokenizer, engine: FakeEngineClient, streamed: bool
) -> None:
    async with serving(make_context(tokenizer, engine, port=0, stall_timeout_s=0.2)) as server:
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(own, ("127.0.0.1", server.port))
        await loop.sock_sendall(own, post(BODY | {"stream": streamed, "logprobs": 20}))
        request = await submitted(engine)
        for _ in range(10):  # far more than the sockets hold
            engine.emit(bulky(request, 1000))
        if not streamed:
            engine.emit(bulky(request, 1, finish_reason="length"))
        await until(lambda: server.http.num_connections == 0)
        assert server.context.admission.num_requests == 0
        assert engine.aborted == ([(request.request_id, None)] if streamed else [])
        own.close()


async def test_a_client_that_reads_slowly_gets_everything(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with serving(make_context(tokenizer, engine, port=0, stall_timeout_s=0.4)) as server:
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        own.setblocking(False)
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", server.port))
        reader, writer = await asyncio.open_connection(sock=own, limit=1 << 12)
        writer.write(post(BODY | {"logprobs": 20}))
        request = await submitted(engine)
        engine.emit(bulky(request, 20_000, finish_reason="length"))
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        left = int(head.partition("content-length: ")[2].split("\r\n")[0])
        assert left > 5_000_000
        began = asyncio.get_running_loop().time()
        while left:
            data = await reader.read(1 << 14)
            assert data, f"cut off with {left:,} bytes to go"
            left -= len(data)
            if asyncio.get_running_loop().time() - began < 1:  # more than two stall timeouts
                await asyncio.sleep(0.01)
        writer.close()


async def test_a_silent_stream_says_keep_alive(tokenizer: Tokenizer, engine: FakeEngineClient) -> None:
    context = make_context(tokenizer, engine, port=0, sse_keep_alive_interval_s=0.02)
    async with serving(context) as server, connection(server) as (reader, writer):
        writer.write(post(STREAM))
        request = await submitted(engine)
        assert await reader.readuntil(b": keep-alive\n\n")  # before the first token
        engine.emit(token(request))
        first = await reader.readuntil(b'"text":"x"')
        assert await reader.readuntil(b": keep-alive\n\n")  # and between tokens
        engine.emit(token(request, "y", finish_reason="length"))
        rest = await reader.readuntil(b"data: [DONE]\n\n")
        assert b'"text":"y"' in rest
        assert b"keep-alive" not in first[-20:]


async def test_without_an_interval_there_is_no_keep_alive(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with (
        serving(make_context(tokenizer, engine, port=0)) as server,
        connection(server) as (reader, writer),
    ):
        writer.write(post(STREAM))
        request = await submitted(engine)
        engine.emit(token(request))
        engine.emit(token(request, "y", finish_reason="length"))
        assert b": keep-alive" not in await reader.readuntil(b"data: [DONE]\n\n")


async def test_a_client_that_leaves_while_it_is_kept_alive_aborts_too(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    context = make_context(tokenizer, engine, port=0, sse_keep_alive_interval_s=0.02)
    async with serving(context) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(post(STREAM))
        request = await submitted(engine)
        await reader.readuntil(b": keep-alive\n\n")
        writer.close()
        await until(lambda: bool(engine.aborted))
        assert engine.aborted == [(request.request_id, None)]


async def test_an_engine_failure_in_a_stream_is_an_event_and_then_done(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with (
        serving(make_context(tokenizer, engine, port=0)) as server,
        connection(server) as (reader, writer),
    ):
        writer.write(post(STREAM))
        request = await submitted(engine)
        engine.emit(token(request))
        await reader.readuntil(b'"text":"x"')
        engine.fail(EngineDeadError("killed"))
        rest = await reader.readuntil(b"data: [DONE]\n\n")
        event = next(line for line in rest.split(b"\n") if b'"error"' in line)
        error = json.loads(event.removeprefix(b"data: "))["error"]
        assert (error["type"], error["code"]) == ("service_unavailable_error", "engine_dead")
        health = await exchange(server.port, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (health.status, json.loads(health.body)["error"]["code"]) == (503, "engine_dead")


async def test_an_engine_failure_before_the_first_token_has_a_status(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with (
        serving(make_context(tokenizer, engine, port=0)) as server,
        connection(server) as (reader, writer),
    ):
        writer.write(post(STREAM))
        await submitted(engine)
        engine.fail(EngineDeadError("killed"))
        response = await read_response(reader)
        assert (response.status, json.loads(response.body)["error"]["code"]) == (503, "engine_dead")


async def test_an_open_stream_counts_until_its_last_byte(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with (
        serving(make_context(tokenizer, engine, port=0)) as server,
        connection(server) as (reader, writer),
    ):
        writer.write(post(STREAM))
        request = await submitted(engine)
        engine.emit(token(request))
        await reader.readuntil(b'"text":"x"')
        load = await exchange(server.port, "GET /load HTTP/1.1\r\nHost: x\r\n\r\n")
        assert json.loads(load.body) == {"server_load": 1}
        await until(lambda: server.context.num_open_requests == 1)  # the stream alone
        engine.emit(token(request, "y", finish_reason="length"))
        await reader.readuntil(b"0\r\n\r\n")
        await until(lambda: server.context.num_open_requests == 0)
        load = await exchange(server.port, "GET /load HTTP/1.1\r\nHost: x\r\n\r\n")
        assert json.loads(load.body) == {"server_load": 0}


async def test_streams_that_are_open_when_the_server_ends_do_not_hold_it_up(
    tokenizer: Tokenizer, engine: FakeEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.api.http_server.FAREWELL_S", 0.1)
    loop = asyncio.get_running_loop()
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(post(STREAM))
        request = await submitted(engine)
        ended_at = loop.time()
    assert loop.time() - ended_at < 2
    assert engine.aborted == [(request.request_id, None)]
    writer.close()
