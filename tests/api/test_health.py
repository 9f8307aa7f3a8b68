"""Probes, /version and /load: what an orchestrator and a load balancer are told, state by state."""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

import jaxserve
from jaxserve.api.app import create_app
from jaxserve.api.context import ServerContext
from jaxserve.errors import EngineDeadError, EngineError, EngineStalledError, EngineStartingError
from jaxserve.messages import SequenceOutput
from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient
from tests.api.http_server import until
from tests.api.small_model import MODEL, make_context, make_tokenizer

READY = ("/health", "/health/ready", "/ping")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient()


@pytest.fixture
def context(tokenizer: Tokenizer, engine: FakeEngineClient) -> ServerContext:
    return make_context(tokenizer, engine)


async def probe(context: ServerContext, path: str, method: str = "GET") -> tuple[int, Any]:
    """Status, and the error's code or the whole body."""
    response = await create_app(context).test_client().open(path, method=method)
    body = await response.get_json()
    if response.status_code == 503:
        assert body["error"]["type"] == "service_unavailable_error"
        assert int(response.headers["Retry-After"]) >= 1
        return 503, body["error"]["code"]
    return response.status_code, body


@pytest.mark.parametrize("path", [*READY, "/health/live"])
async def test_a_healthy_server_says_ok(context: ServerContext, path: str) -> None:
    assert await probe(context, path) == (200, {"status": "ok"})


async def test_profiles_begin_and_end_where_there_is_a_place_for_them(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    context = make_context(tokenizer, engine, profile_dir="traces")
    for path, status, profiling in (
        ("/stop_profile", 400, False),
        ("/start_profile", 200, True),
        ("/start_profile", 400, True),
        ("/stop_profile", 200, False),
    ):
        assert (await probe(context, path, "POST"))[0] == status
        assert engine.profiling == profiling
    engine.error = EngineDeadError("gone")
    assert await probe(context, "/start_profile", "POST") == (503, "engine_dead")


async def test_without_a_place_for_profiles_there_are_no_such_routes(context: ServerContext) -> None:
    for path in ("/start_profile", "/stop_profile"):
        assert (await probe(context, path, "POST"))[0] == 404


async def test_ping_may_be_posted(context: ServerContext, engine: FakeEngineClient) -> None:
    assert await probe(context, "/ping", "POST") == (200, {"status": "ok"})
    engine.error = EngineDeadError("gone")
    assert await probe(context, "/ping", "POST") == (503, "engine_dead")


@pytest.mark.parametrize("path", READY)
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineStartingError("loading"), "starting"),
        (EngineDeadError("gone"), "engine_dead"),
        (EngineStalledError("hangs"), "engine_stalled"),
    ],
    ids=str,
)
async def test_a_server_that_cannot_serve_is_not_ready(
    context: ServerContext, engine: FakeEngineClient, path: str, error: EngineError, code: str
) -> None:
    engine.error = error
    assert await probe(context, path) == (503, code)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (EngineStartingError("loading"), (200, {"status": "ok"})),  # slow to start is no reason for a restart
        (EngineDeadError("gone"), (503, "engine_dead")),
        (EngineStalledError("hangs"), (503, "engine_stalled")),
    ],
    ids=str,
)
async def test_a_server_is_alive_unless_its_engine_is_dead_or_stalled(
    context: ServerContext, engine: FakeEngineClient, error: EngineError, answer: Any
) -> None:
    engine.error = error
    assert await probe(context, "/health/live") == answer


async def test_a_draining_server_is_alive_and_not_ready(context: ServerContext) -> None:
    context.draining = True
    for path in READY:
        assert await probe(context, path) == (503, "draining")
    assert await probe(context, "/health/live") == (200, {"status": "ok"})


async def test_a_draining_server_whose_engine_has_died_is_not_alive(
    context: ServerContext, engine: FakeEngineClient
) -> None:
    context.draining, engine.error = True, EngineDeadError("gone")
    assert await probe(context, "/health/live") == (503, "engine_dead")


async def test_a_server_is_not_ready_before_its_tokenizer_is(
    context: ServerContext, engine: FakeEngineClient
) -> None:
    context._tokenizer = None
    for path in READY:
        assert await probe(context, path) == (503, "starting")
    assert await probe(context, "/health/live") == (200, {"status": "ok"})


async def test_a_server_that_recovers_is_ready_again(
    context: ServerContext, engine: FakeEngineClient
) -> None:
    engine.error = EngineStalledError("hangs")
    assert (await probe(context, "/health"))[0] == 503
    engine.error = None
    assert (await probe(context, "/health"))[0] == 200


async def test_the_version_is_the_packages_own(context: ServerContext) -> None:
    assert await probe(context, "/version") == (200, {"version": jaxserve.__version__})
    try:
        assert version("jaxserve") == jaxserve.__version__
    except PackageNotFoundError:  # run from a checkout that is not installed
        pytest.skip("jaxserve is not installed")


async def test_load_counts_requests_from_admission_to_their_end(
    context: ServerContext, engine: FakeEngineClient
) -> None:
    app = create_app(context)

    async def load() -> int:
        response = await app.test_client().get("/load")
        return int((await response.get_json())["server_load"])

    async def complete() -> int:
        body = {"model": MODEL, "prompt": "a", "n": 2}
        return int((await app.test_client().post("/v1/completions", json=body)).status_code)

    assert await load() == 0
    requests = [asyncio.create_task(complete()) for _ in range(2)]
    await until(lambda: len(engine.submitted) == 2)
    assert await load() == 2  # requests, not their choices
    refused = await app.test_client().post("/v1/completions", json={"model": MODEL, "prompt": ""})
    assert (refused.status_code, await load()) == (400, 2)
    first, second = (request.request_id for request in engine.submitted)
    engine.emit(*(SequenceOutput(first, i, [104], finish_reason="length") for i in range(2)))
    await until(lambda: any(request.done() for request in requests))
    assert await load() == 1
    engine.fail(EngineDeadError("gone"))
    assert sorted(await asyncio.gather(*requests)) == [200, 503]
    assert await load() == 0  # also with a dead engine: the route needs none
    assert second not in engine.live
