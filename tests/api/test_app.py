"""What holds for every route: existence, methods, headers, request ids, the error envelope, CORS, odd targets."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from quart import Quart

from jaxserve.errors import EngineDeadError, EngineStartingError
from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient, generate
from tests.api.http_server import exchange, read_response, serving, until
from tests.api.small_model import END, MODEL, make_app, make_context, make_tokenizer

GETS = (
    "/v1/models",
    f"/v1/models/{MODEL}",
    "/health",
    "/health/live",
    "/health/ready",
    "/ping",
    "/version",
    "/load",
    "/metrics",
)
POSTS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/ping")
ABSENT = (
    "/",
    "/v1",
    "/v1/embeddings",
    "/v1/audio/speech",
    "/invocations",
    "/v1/responses",
    "/v1/load_lora_adapter",
    "/health/",
    "/v1/models/",
    "/v1/completions/",
    "//health",
    "//v1/models",
    "/static/x",
    "/V1/models",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(script=lambda request: generate(request, [[104, 105, END]] * request.params.n))


@pytest.fixture
def app(tokenizer: Tokenizer, engine: FakeEngineClient) -> Quart:
    return make_app(tokenizer, engine)


@pytest.mark.parametrize("path", GETS)
async def test_get_and_head_work_and_head_has_the_same_headers(app: Quart, path: str) -> None:
    got = await app.test_client().get(path)
    head = await app.test_client().head(path)
    assert got.status_code == head.status_code == 200
    assert got.headers["Content-Type"] == head.headers["Content-Type"]


@pytest.mark.parametrize("path", ABSENT)
async def test_an_unknown_path_is_404_in_the_envelope(app: Quart, path: str) -> None:
    response = await app.test_client().get(path)
    error = (await response.get_json())["error"]
    assert (response.status_code, response.content_type) == (404, "application/json")
    assert (error["type"], error["code"], error["param"]) == ("not_found_error", "not_found", None)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        *(("POST", path, "GET, HEAD") for path in GETS if path != "/ping"),
        *(("GET", path, "POST") for path in POSTS if path != "/ping"),
        ("HEAD", "/v1/completions", "POST"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("DELETE", "/ping", "GET, HEAD, POST"),
        ("BREW", "/version", "GET, HEAD"),
    ],
)
async def test_another_method_is_405_with_allow(app: Quart, method: str, path: str, allow: str) -> None:
    response = await app.test_client().open(path, method=method)
    assert (response.status_code, response.headers["Allow"]) == (405, allow)
    if method != "HEAD":
        error = (await response.get_json())["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "method_not_allowed")


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/v1/completions"])
async def test_the_clients_request_id_comes_back(app: Quart, path: str) -> None:
    response = await app.test_client().get(path, headers={"X-Request-Id": "a.B:c-_9"})
    assert response.headers["X-Request-Id"] == "a.B:c-_9"


@pytest.mark.parametrize("given", ["", "has space", "é", "x" * 129, "semi;colon", None])
async def test_a_request_id_that_does_not_fit_is_replaced(app: Quart, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-Id": given}
    ids = [
        (await app.test_client().get("/health", headers=headers)).headers["X-Request-Id"] for _ in range(2)
    ]
    assert given not in ids
    assert ids[0] != ids[1]
    assert all(len(own) == 32 for own in ids)


async def test_a_defect_is_500_with_the_request_id_and_nothing_of_its_cause(
    app: Quart, engine: FakeEngineClient, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("secret detail at /root/x.py")

    engine.submit = broken  # type: ignore[method-assign]
    response = await app.test_client().post(
        "/v1/completions", json={"model": MODEL, "prompt": "a"}, headers={"X-Request-Id": "req-7"}
    )
    error = (await response.get_json())["error"]
    assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert "req-7" in error["message"]
    assert "secret" not in error["message"]
    assert "secret detail" in caplog.text  # the log is where it belongs


async def test_503_comes_after_404_and_405_and_before_the_body(app: Quart, engine: FakeEngineClient) -> None:
    engine.error = EngineStartingError("loading")
    client = app.test_client()
    assert (await client.get("/nowhere")).status_code == 404
    assert (await client.get("/v1/completions")).status_code == 405
    response = await client.post("/v1/completions", data=b"{", headers={"Content-Type": "text/plain"})
    assert (response.status_code, (await response.get_json())["error"]["code"]) == (503, "starting")
    assert int(response.headers["Retry-After"]) >= 1
    for path in ("/version", "/metrics", "/load"):
        assert (await client.get(path)).status_code == 200


async def test_a_draining_server_refuses_new_requests(tokenizer: Tokenizer, engine: FakeEngineClient) -> None:
    context = make_context(tokenizer, engine)
    context.draining = True
    from jaxserve.api.app import create_app

    client = create_app(context).test_client()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        response = await client.post(path, json={})
        assert (response.status_code, (await response.get_json())["error"]["code"]) == (503, "draining"), path
        assert int(response.headers["Retry-After"]) >= 1


# --- over a real connection -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://elsewhere/health", 200),
        ("http://elsewhere", 404),
        ("/%68ealth", 200),
        ("/health?x=%ff", 200),
        ("/health%00", 404),
        ("/%ff", 404),
        ("?", 404),
        ("*", 404),
        ("/../health", 404),
        ("/./health", 404),
        ("/v1/models/org%2Fsmall", 200),
        ("/v1/models/org/small", 200),
        ("/" + "a" * 8000, 404),
    ],
)
async def test_odd_targets_get_an_answer_in_the_envelope(
    tokenizer: Tokenizer, engine: FakeEngineClient, target: str, status: int
) -> None:
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        response = await exchange(server.port, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n")
    assert response.status == status
    body = json.loads(response.body)
    assert ("error" in body) == (status != 200)
    assert len(response.body) < 4096
    assert response.headers["x-request-id"]


async def test_a_header_block_over_16_kib_is_refused(tokenizer: Tokenizer, engine: FakeEngineClient) -> None:
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        for size in (17_000, 200_000):
            large = f"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: {'a' * size}\r\n\r\n"
            assert (await exchange(server.port, large)).status == 431
        fits = f"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: {'a' * 12_000}\r\n\r\n"
        assert (await exchange(server.port, fits)).status == 200


async def test_a_websocket_is_refused_in_the_envelope(tokenizer: Tokenizer, engine: FakeEngineClient) -> None:
    upgrade = (
        "GET /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    for keys, status, code in (((), 404, "not_found"), (("k",), 401, "invalid_api_key")):
        async with serving(make_context(tokenizer, engine, port=0, api_keys=keys)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(upgrade.encode())
            answer = (await reader.read()).decode()
            writer.close()
        assert answer.startswith(f"HTTP/1.1 {status} ")
        assert f'"code":"{code}"' in answer
        assert "x-request-id" in answer.lower()


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        ("GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("no request at all\r\n\r\n", 400),
        ("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        ("POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (f"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: {'a' * 200_000}", 431),
        ("GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 400),
    ],
)
async def test_what_is_no_http_is_refused_in_the_envelope_and_the_connection_ends(
    tokenizer: Tokenizer, engine: FakeEngineClient, request_text: str, status: int
) -> None:
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request_text.encode())
        async with asyncio.timeout(2):
            response = await read_response(reader)
            assert await reader.read() == b""
        writer.close()
    assert response.status == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = json.loads(response.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/health", "/api/health"])
async def test_a_proxy_may_cut_the_root_path_off_or_not(
    tokenizer: Tokenizer, engine: FakeEngineClient, path: str
) -> None:
    async with serving(make_context(tokenizer, engine, port=0, root_path="/api")) as server:
        assert (await exchange(server.port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200
        for other in ("/apihealth", "/api/nope", "/api//health", "/api"):
            assert (await exchange(server.port, f"GET {other} HTTP/1.1\r\nHost: x\r\n\r\n")).status == 404


async def test_connections_over_the_limit_get_503_and_probes_do_not(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with serving(make_context(tokenizer, engine, port=0, max_connections=2)) as server:
        idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
        await until(lambda: server.http.num_connections == 2)
        refused = await exchange(server.port, "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert json.loads(refused.body)["error"]["type"] == "service_unavailable_error"
        assert (await exchange(server.port, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200
        idle[0][1].close()
        await until(lambda: server.http.num_connections == 1)
        assert (await exchange(server.port, "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200
        idle[1][1].close()


async def test_a_flood_of_connections_is_closed_at_the_door(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    async with serving(make_context(tokenizer, engine, port=0, max_connections=1)) as server:
        server.http._max_connections = 3
        opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(6)]
        ended = [asyncio.create_task(reader.read()) for reader, _ in opened]
        await until(lambda: sum(task.done() for task in ended) == 3)
        assert server.http.num_connections == 3
        for _, writer in opened:
            writer.close()
        await until(lambda: server.http.num_connections == 0)


# --- the log --------------------------------------------------------------------------------------------------


async def test_the_access_log_has_one_line_a_request_and_no_secrets(
    tokenizer: Tokenizer, engine: FakeEngineClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with (
        serving(
            make_context(tokenizer, engine, port=0, api_keys=("sesame-key",), enable_log_requests=True)
        ) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        headers = {"Authorization": "Bearer sesame-key", "X-Request-Id": "mine-1"}
        body = {
            "model": MODEL,
            "prompt": "private words",
            "stream": True,
            "user": "someone",
            "stop": "private stop",
        }
        assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
        await client.get("/sesame-path?key=sesame-key", headers={"X-Request-Id": "mine-2"})
        await until(lambda: server.context.num_open_requests == 0)
    lines = [r.getMessage() for r in caplog.records if r.name == "jaxserve.access"]
    assert [line.rsplit(" ", 2)[0] for line in lines] == [
        "mine-1 POST /v1/completions 200",
        "mine-2 GET unmatched 401",
    ]
    ours = "\n".join(
        r.getMessage() for r in caplog.records if r.name.startswith(("jaxserve", "hypercorn", "quart"))
    )
    assert "mine-1 prompt tokens [13]" in ours
    for secret in ("sesame", "private", "someone"):
        assert secret not in ours


async def test_a_client_that_resets_its_connection_is_no_error(
    tokenizer: Tokenizer,
    engine: FakeEngineClient,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the system says of a connection that was reset behind the answer's last byte."""

    def write_eof(_: asyncio.StreamWriter) -> None:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(asyncio.StreamWriter, "write_eof", write_eof)
    async with serving(make_context(tokenizer, engine, port=0)) as served:
        response = await exchange(served.port, "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert response.status == 200
        await until(lambda: served.http.num_connections == 0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_probes_are_logged_at_debug_unless_they_say_that_something_is_wrong(
    app: Quart, engine: FakeEngineClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for error in (EngineStartingError("loading"), None, EngineDeadError("gone")):
        engine.error = error
        await app.test_client().get("/health")
    levels = [r.levelname for r in caplog.records if r.name == "jaxserve.access"]
    assert levels == ["DEBUG", "DEBUG", "INFO"]


@pytest.mark.parametrize("host", ["", "..", ".x", "a" * 70, "x:y:z", "[::", "xn--a", "\xff", "evil/health"])
@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/v1/models", 200), ("/nope", 404)])
async def test_an_odd_host_changes_nothing(
    tokenizer: Tokenizer, engine: FakeEngineClient, host: str, path: str, status: int
) -> None:
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"
        response = await exchange(server.port, request.encode("latin-1"))
    assert response.status == status
    assert response.headers["content-type"] == "application/json"


# --- CORS -----------------------------------------------------------------------------------------------------

PREFLIGHT = {
    "Origin": "https://a.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


async def test_cors_is_off_by_default(app: Quart) -> None:
    preflight = await app.test_client().options("/v1/completions", headers=PREFLIGHT)
    assert preflight.status_code == 405
    got = await app.test_client().get("/v1/models", headers={"Origin": "https://a.example"})
    assert not [name for name, _ in got.headers if name.lower().startswith("access-control")]


async def test_a_preflight_of_an_allowed_origin_needs_no_key(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    app = make_app(tokenizer, engine, api_keys=("k",), allowed_origins=("https://a.example",))
    response = await app.test_client().options("/v1/completions", headers=PREFLIGHT)
    assert response.status_code == 204
    assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert response.headers["Access-Control-Allow-Methods"] == "POST"
    assert response.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
    assert response.headers["Vary"] == "Origin"
    assert "Access-Control-Allow-Credentials" not in response.headers


async def test_a_preflight_of_another_origin_needs_a_key_and_gets_no_permission(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    app = make_app(tokenizer, engine, api_keys=("k",), allowed_origins=("https://a.example",))
    response = await app.test_client().options(
        "/v1/completions", headers=PREFLIGHT | {"Origin": "https://b.example"}
    )
    assert response.status_code == 401
    assert "Access-Control-Allow-Origin" not in response.headers


async def test_errors_carry_cors_headers_so_that_pages_can_read_them(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    app = make_app(tokenizer, engine, api_keys=("k",), allowed_origins=("*",))
    response = await app.test_client().get("/v1/models", headers={"Origin": "https://a.example"})
    assert (response.status_code, response.headers["Access-Control-Allow-Origin"]) == (401, "*")


async def test_methods_headers_and_credentials_are_those_of_the_flags(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    app = make_app(
        tokenizer,
        engine,
        allowed_origins=("*",),
        allowed_methods=("GET", "POST"),
        allowed_headers=("Authorization",),
        allow_credentials=True,
    )
    response = await app.test_client().options("/v1/completions", headers=PREFLIGHT)
    assert (
        response.headers["Access-Control-Allow-Origin"] == "https://a.example"
    )  # "*" is refused with credentials
    assert response.headers["Access-Control-Allow-Credentials"] == "true"
    assert response.headers["Access-Control-Allow-Methods"] == "GET, POST"
    assert response.headers["Access-Control-Allow-Headers"] == "Authorization"


# --- processes ------------------------------------------------------------------------------------------------


async def test_the_api_process_imports_no_jax(tmp_path: Path) -> None:
    program = (
        "import sys, jaxserve.api.__main__, jaxserve.api.server\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'torch', 'transformers'} & sys.modules.keys()\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    import os
    import sys

    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert await process.wait() == 0


async def test_an_answer_before_the_body_announces_that_the_connection_ends(tokenizer: Tokenizer) -> None:
    head = "POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
    async with serving(make_context(tokenizer, FakeEngineClient(), port=0)) as server:
        early = await exchange(server.port, head)
        assert (early.status, early.headers.get("connection")) == (404, "close")


async def test_a_connection_goes_on_behind_a_refused_request_that_came_whole(tokenizer: Tokenizer) -> None:
    whole = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    async with serving(make_context(tokenizer, FakeEngineClient(), port=0)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(2):
            writer.write(whole)
            response = await read_response(reader)
            assert (response.status, response.headers.get("connection")) == (404, None)
        writer.close()
