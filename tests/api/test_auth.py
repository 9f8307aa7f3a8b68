"""Keys: which routes ask for one, what counts as one, and that no spelling of a request goes round them."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest
from quart import Quart

from jaxserve.api.auth import OPEN_ROUTES, Authenticator
from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient
from tests.api.http_server import exchange, serving
from tests.api.small_model import make_app, make_context, make_tokenizer

OPEN = ("/health", "/health/live", "/health/ready", "/ping", "/version")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def app(tokenizer: Tokenizer) -> Quart:
    return make_app(tokenizer, FakeEngineClient(), api_keys=("first", "second"))


def test_without_keys_everybody_may() -> None:
    assert Authenticator(()).allows("/v1/models", None)
    assert Authenticator(()).allows(None, "nonsense")


@pytest.mark.parametrize(
    "header",
    ["Bearer first", "bearer first", "BEARER first", "Bearer  first ", "Bearer second"],
)
def test_any_of_the_keys_will_do_and_the_schemes_case_does_not_matter(header: str) -> None:
    assert Authenticator(("first", "second")).allows("/v1/models", header)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "first",
        "Bearer",
        "Bearer ",
        "Bearer firs",
        "Bearer firstx",
        "Bearer FIRST",
        "Bearer first second",
        "Basic first",
        "Bearer, first",
        "Bearer \x00first",
        "Bearer \udcff",
        "Bearer " + "x" * 100_000,
    ],
)
def test_anything_else_will_not(header: str | None) -> None:
    assert not Authenticator(("first", "second")).allows("/v1/models", header)


def test_every_key_is_compared_every_time_as_a_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    genuine: Callable[[bytes, bytes], bool] = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return genuine(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    Authenticator(("a", "bb", "ccc")).allows("/v1/models", "Bearer a")
    assert compared == [(32, 32)] * 3


def test_keys_are_in_no_repr(tokenizer: Tokenizer) -> None:
    context = make_context(tokenizer, FakeEngineClient(), api_keys=("sesame",))
    assert "sesame" not in repr(context)
    assert "sesame" not in repr(vars(Authenticator(("sesame",))))


def test_the_open_routes_are_the_five_probes() -> None:
    assert frozenset(OPEN) == OPEN_ROUTES


async def test_every_other_route_of_the_app_needs_a_key(app: Quart) -> None:
    client = app.test_client()
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<model_id:model_id>", "org/small")
        for method in (rule.methods or set()) - {"HEAD"}:
            response = await client.open(path, method=method)
            assert (response.status_code == 401) == (path not in OPEN), (method, path)
            if path not in OPEN:
                error: dict[str, Any] = (await response.get_json())["error"]
                assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
                assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", OPEN)
async def test_probes_are_open(app: Quart, path: str) -> None:
    assert (await app.test_client().get(path)).status_code == 200


async def test_the_key_comes_before_the_body_and_before_404_and_405(app: Quart) -> None:
    client = app.test_client()
    assert (await client.post("/v1/completions", data=b"{")).status_code == 401
    assert (await client.get("/nowhere")).status_code == 401
    assert (await client.put("/v1/completions")).status_code == 401
    key = {"Authorization": "Bearer first"}
    assert (await client.get("/nowhere", headers=key)).status_code == 404
    assert (await client.put("/v1/completions", headers=key)).status_code == 405


async def test_a_key_beyond_ascii_works_as_its_utf_8(tokenizer: Tokenizer) -> None:
    context = make_context(tokenizer, FakeEngineClient(), port=0, api_keys=("schlüssel",))
    async with serving(context) as server:
        for key, status in (("schlüssel", 200), ("schlussel", 401)):
            request = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n"
            assert (await exchange(server.port, request)).status == status


@pytest.mark.parametrize(
    "target",
    [
        "//health",
        "/health/",
        "/v1/models/../../health",
        "/health/../v1/models",
        "/r/../health",
        "/%2e/health",
        "/health%2f..%2fv1/models",
        "/health;/v1/models",
        "/HEALTH",
        "/v1/models?x=/health",
        "/v1/models#/health",
        "/metrics",
        "http://localhost/v1/models",
        "http://health/v1/models",
        "/version/v1/models",
    ],
)
@pytest.mark.parametrize("host", ["x", "x/health", "health", ""])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "TRACE"])
async def test_no_spelling_goes_round_the_key(
    tokenizer: Tokenizer, target: str, host: str, method: str
) -> None:
    context = make_context(tokenizer, FakeEngineClient(), port=0, api_keys=("k",))
    async with serving(context) as server:
        request = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        response = await exchange(server.port, request)
        assert response.status == 401
        assert json.loads(response.body)["error"]["code"] == "invalid_api_key"
