"""`/v1/models` and `/v1/models/{id}`."""

from __future__ import annotations

import pytest
from openai.types import Model
from quart import Quart

from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient
from tests.api.small_model import CREATED, MODEL, make_app, make_tokenizer

ABSOLUTE = "/models/small"  # what a server started with a directory is called


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def app(tokenizer: Tokenizer) -> Quart:
    return make_app(tokenizer, FakeEngineClient(), served_model_names=(MODEL, "alias", ABSOLUTE))


async def test_there_is_a_card_for_every_served_name(app: Quart) -> None:
    response = await app.test_client().get("/v1/models")
    answer = await response.get_json()
    assert answer.keys() == {"object", "data"}
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == [MODEL, "alias", ABSOLUTE]
    assert [Model.model_validate(card).id for card in answer["data"]] == [MODEL, "alias", ABSOLUTE]


async def test_a_card_has_exactly_the_promised_keys(app: Quart) -> None:
    card = await (await app.test_client().get("/v1/models/alias")).get_json()
    (permission,) = card.pop("permission")
    assert card == {
        "id": "alias",
        "object": "model",
        "created": CREATED,
        "owned_by": "jaxserve",
        "root": MODEL,
        "parent": None,
        "max_model_len": 64,
    }
    assert permission.pop("id").startswith("modelperm-")
    assert permission == {
        "object": "model_permission",
        "created": CREATED,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/models/org/small", MODEL),
        ("/v1/models/org%2Fsmall", MODEL),
        ("/v1/models//models/small", ABSOLUTE),
        ("/v1/models/%2Fmodels%2Fsmall", ABSOLUTE),
    ],
)
async def test_names_may_hold_slashes_raw_or_escaped(app: Quart, path: str, name: str) -> None:
    response = await app.test_client().get(path)
    assert response.status_code == 200
    assert (await response.get_json())["id"] == name


@pytest.mark.parametrize(
    "path", ["/v1/models/other", "/v1/models/org/small/", "/v1/models/org", "/v1/models/a//b"]
)
async def test_an_unknown_model_is_not_found(app: Quart, path: str) -> None:
    response = await app.test_client().get(path)
    error = (await response.get_json())["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert error["message"] == f"The model `{path.removeprefix('/v1/models/')}` does not exist."


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/org/small"])
async def test_head_works_where_get_does(app: Quart, path: str) -> None:
    response = await app.test_client().head(path)
    assert response.status_code == 200
    assert response.content_type == "application/json"
