"""The bytes of a body: strict JSON under the right media type, of bounded size and depth, in time."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from quart import Quart

from jaxserve.api import app as app_module
from jaxserve.api import request_body
from jaxserve.api.errors import HttpError
from jaxserve.api.request_body import LARGE_BODY_BYTES, parse_json_object
from jaxserve.errors import RequestError
from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient, generate
from tests.api.http_server import RawResponse, exchange, read_response, serving
from tests.api.small_model import END, MODEL, make_app, make_context, make_tokenizer

VALID = json.dumps({"model": MODEL, "prompt": "a"}).encode()
ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(script=lambda request: generate(request, [[104, 105, END]] * request.params.n))


@pytest.fixture
def app(tokenizer: Tokenizer, engine: FakeEngineClient) -> Quart:
    return make_app(tokenizer, engine)


async def send(app: Quart, body: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
    """Status and code of the answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = await app.test_client().post(path, data=body, headers=named)
    answer = await response.get_json()
    return response.status_code, answer.get("error", {}).get("code")


# --- JSON -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"}", b'{"a":1,}', b"{'a':1}", b"{a:1}", b'{"a":1} x', b'{"a":1}{}', b"// x\n{}",
        b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":1e999}', b'{"a":-1e999}', b'{"a":01}', b'{"a":+1}',
        b'{"a":.5}', b'{"a":"\\ud800"}', b'{"\\udc00":1}', b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\n"}',
        b'\xef\xbb\xbf{"a":1}', '{"a":1}'.encode("utf-16"), b'{"a":"\\x41"}', b'{"a":tru}', b"\x00", b"undefined",
        b'{"a":' + b"1" * 5000 + b"}", b'{"a":' * 129 + b"1" + b"}" * 129, b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_what_is_no_strict_json_is_invalid_json(body: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        parse_json_object(body)
    error = caught.value.body
    assert (error.status, error.type, error.code, error.param) == (
        400, "invalid_request_error", "invalid_json", None,
    )  # fmt: skip
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"[]", "an array"),
        (b'"{}"', "a string"),
        (b"1", "a number"),
        (b"1.5", "a number"),
        (b"9" * 30, "a number"),
        (b"true", "a boolean"),
        (b"null", "null"),
    ],
    ids=repr,
)
def test_json_that_is_no_object_is_of_the_wrong_type(body: bytes, kind: str) -> None:
    with pytest.raises(RequestError, match=f"must be a JSON object, got: {kind}") as caught:
        parse_json_object(body)
    assert (caught.value.code, caught.value.param) == ("invalid_type", None)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"{}", {}),
        (b' \n\t{"a" : 1}\r\n', {"a": 1}),
        (b'{"a":1,"a":2}', {"a": 2}),  # the last wins
        (b'{"a":"\\ud83d\\ude00\\u0000"}', {"a": "😀\x00"}),
        ('{"ключ":"π"}'.encode(), {"ключ": "π"}),
        (b'{"a":1e308,"b":-0.0,"c":1e-400}', {"a": 1e308, "b": -0.0, "c": 0.0}),
        (b'{"a":9223372036854775807}', {"a": 2**63 - 1}),
        (b'{"a":-9223372036854775808}', {"a": -(2**63)}),
        (b'{"a":5.0}', {"a": 5.0}),
    ],
    ids=repr,
)
def test_valid_json_is_read_as_it_is(body: bytes, value: dict[str, Any]) -> None:
    parsed = parse_json_object(body)
    assert parsed == value
    assert [type(v) for v in parsed.values()] == [type(v) for v in value.values()]


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**64, 10**40, -(10**100)])
def test_long_integers_stay_integers_so_that_their_field_can_be_named(number: int) -> None:
    assert parse_json_object(json.dumps({"a": [number], "b": 1.5}).encode()) == {"a": [number], "b": 1.5}


@pytest.mark.parametrize(("opening", "closing"), [(b'{"a":', b"}"), (b"[", b"]")])
def test_a_hundred_and_twenty_eight_levels_are_allowed_and_one_more_is_not(
    opening: bytes, closing: bytes
) -> None:
    def nested(levels: int) -> bytes:
        return b'{"top":' + opening * (levels - 1) + b"1" + closing * (levels - 1) + b"}"

    parse_json_object(nested(128))
    with pytest.raises(HttpError, match="nested deeper than 128"):
        parse_json_object(nested(129))


# --- media type -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "media_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/json; charset=utf8; v=1",
        "application/json; profile=x",
        None,
    ],
)
async def test_json_is_read_under_its_media_type_or_none(app: Quart, media_type: str | None) -> None:
    headers = {} if media_type is None else {"Content_Type": media_type}
    assert await send(app, VALID, **headers) == (200, None)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"Content_Type": "multipart/form-data; boundary=x"},
        {"Content_Type": "application/jsonl"},
        {"Content_Type": "application/problem+json"},
        {"Content_Type": "json"},
        {"Content_Type": "application/json; charset=latin-1"},
        {"Content_Type": "application/json; charset=utf-16"},
        {"Content_Encoding": "gzip"},
        {"Content_Encoding": "br", "Content_Type": "application/json"},
        {"Content_Encoding": "identity, gzip"},
    ],
    ids=lambda headers: " ".join(headers.values()),
)
async def test_another_media_type_charset_or_encoding_is_415(
    app: Quart, path: str, headers: dict[str, str]
) -> None:
    assert await send(app, VALID, path, **headers) == (415, "unsupported_media_type")


@pytest.mark.parametrize("encoding", ["identity", "Identity"])
async def test_identity_is_no_encoding(app: Quart, encoding: str) -> None:
    assert await send(app, VALID, Content_Encoding=encoding) == (200, None)


async def test_the_media_type_is_checked_before_the_size_and_that_before_the_json(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    app = make_app(tokenizer, engine, max_body_bytes=100)
    assert (await send(app, b"{" * 200, Content_Type="text/plain"))[0] == 415
    assert (await send(app, b"{" * 200))[0] == 413
    assert (await send(app, b"{" * 50))[0] == 400


@pytest.mark.parametrize("path", ROUTES)
async def test_every_route_with_a_body_reads_it_alike(app: Quart, path: str) -> None:
    assert await send(app, b"{", path) == (400, "invalid_json")
    assert await send(app, b"[]", path) == (400, "invalid_type")


# --- size and time, over a real connection --------------------------------------------------------------------


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def code(response: RawResponse) -> str:
    return str(json.loads(response.body)["error"]["code"])


async def test_a_body_over_the_limit_is_refused_from_its_announced_length(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with serving(make_context(tokenizer, engine, port=0, max_body_bytes=100)) as server:
        response = await exchange(server.port, post(b"{", "Content-Length: 101"))  # the rest never comes
        assert (response.status, code(response)) == (413, "request_too_large")
        assert "100" in json.loads(response.body)["error"]["message"]
        huge = await exchange(server.port, post(b"{", f"Content-Length: {1 << 62}"))
        assert huge.status == 413


async def test_a_body_as_large_as_the_limit_is_read(tokenizer: Tokenizer, engine: FakeEngineClient) -> None:
    body = VALID + b" " * (100 - len(VALID))
    async with serving(make_context(tokenizer, engine, port=0, max_body_bytes=100)) as server:
        assert (await exchange(server.port, post(body, "Content-Length: 100"))).status == 200


async def test_a_chunked_body_is_read_and_cut_off_at_the_limit(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    def chunk(data: bytes) -> bytes:
        return f"{len(data):x}\r\n".encode() + data + b"\r\n"

    async with serving(make_context(tokenizer, engine, port=0, max_body_bytes=100)) as server:
        good = chunk(VALID[:10]) + chunk(VALID[10:]) + chunk(b"")
        assert (await exchange(server.port, post(good, "Transfer-Encoding: chunked"))).status == 200
        endless = chunk(b" " * 60) * 2  # and no end
        response = await exchange(server.port, post(endless, "Transfer-Encoding: chunked"))
        assert (response.status, code(response)) == (413, "request_too_large")


async def test_a_body_that_does_not_arrive_is_408(
    tokenizer: Tokenizer, engine: FakeEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert app_module.BODY_TIMEOUT_S == 60  # the contract's
    monkeypatch.setattr(app_module, "BODY_TIMEOUT_S", 0.05)
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        response = await exchange(server.port, post(VALID[:5], f"Content-Length: {len(VALID)}"))
        assert (response.status, code(response)) == (408, "request_timeout")
        assert json.loads(response.body)["error"]["type"] == "timeout_error"


async def test_a_client_that_goes_away_while_it_sends_leaves_nothing(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(post(VALID[:5], f"Content-Length: {len(VALID)}"))
        await writer.drain()
        writer.close()
        async with asyncio.timeout(5):
            while server.http.num_connections or server.context.num_open_requests:
                await asyncio.sleep(0.002)
    assert engine.submitted == []


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: -1",),
        ("Content-Length: x",),
        ("Content-Length: 1", "Content-Length: 2"),
        ("Content-Length: 5", "Transfer-Encoding: gzip"),
        ("Transfer-Encoding: x",),
    ],
)
async def test_a_length_that_makes_no_sense_is_400_or_the_end(
    tokenizer: Tokenizer, engine: FakeEngineClient, headers: tuple[str, ...]
) -> None:
    """Not the beginning of another request: bodies of unclear length are how requests are smuggled."""
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(post(VALID, *headers) + b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
    assert b"200 OK" not in answer.upper()
    assert answer.upper().count(b"HTTP/1.1 ") <= 1
    assert engine.submitted == []


async def test_a_connection_serves_again_after_a_refused_body(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for body, status in ((b"{", 400), (VALID, 200), (b"[]", 400)):
            writer.write(post(body, f"Content-Length: {len(body)}"))
            assert (await read_response(reader)).status == status
        writer.close()


async def test_a_large_body_is_parsed_beside_the_event_loop(
    app: Quart, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def parse(raw: bytes) -> dict[str, Any]:
        threads.append(threading.current_thread() is threading.main_thread())
        return parse_json_object(raw)

    monkeypatch.setattr(request_body, "parse_json_object", parse)
    assert (await send(app, VALID))[0] == 200
    assert (await send(app, VALID + b" " * LARGE_BODY_BYTES))[0] == 200
    assert (await send(app, b"{" + b" " * LARGE_BODY_BYTES))[0] == 400  # its faults are told alike
    assert threads == [True, False, False]
