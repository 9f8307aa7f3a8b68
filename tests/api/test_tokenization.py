"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

import pytest
from quart import Quart

from jaxserve.errors import EngineStartingError
from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient, fake_info, generate
from tests.api.small_model import END, HELLO, MODEL, USER, VOCAB_SIZE, ids, make_app, make_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(
        script=lambda request: generate(request, [[END]]), info=fake_info(vocab_size=VOCAB_SIZE)
    )


@pytest.fixture
def app(tokenizer: Tokenizer, engine: FakeEngineClient) -> Quart:
    return make_app(tokenizer, engine)


async def post(app: Quart, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    response = await app.test_client().post(path, json=body)
    return response.status_code, await response.get_json()


async def test_tokenize_answers_with_exactly_four_keys(app: Quart) -> None:
    status, answer = await post(app, "/tokenize", {"prompt": "hé"})
    assert status == 200
    assert answer == {"count": 3, "max_model_len": 64, "tokens": ids("hé"), "token_strs": None}


async def test_token_strings_come_on_request(app: Quart) -> None:
    _, answer = await post(app, "/tokenize", {"prompt": "hé<|end|>", "return_token_strs": True})
    assert answer["tokens"] == [*ids("hé"), END]
    assert answer["token_strs"] == ["h", "\ufffd", "\ufffd", "<|end|>"]


async def test_an_empty_prompt_gives_no_tokens(app: Quart) -> None:
    _, answer = await post(app, "/tokenize", {"prompt": "", "return_token_strs": True})
    assert (answer["count"], answer["tokens"], answer["token_strs"]) == (0, [], [])


async def test_a_prompt_longer_than_the_context_is_tokenized(app: Quart) -> None:
    _, answer = await post(app, "/tokenize", {"prompt": "x" * 1000})
    assert (answer["count"], answer["max_model_len"]) == (1000, 64)


@pytest.mark.parametrize(
    "body",
    [{}, {"add_generation_prompt": False}, {"documents": [{"a": "b"}]}],
    ids=["default", "no generation prompt", "documents"],
)
async def test_a_conversation_is_tokenized_as_the_chat_route_does_it(
    app: Quart, engine: FakeEngineClient, body: dict[str, Any]
) -> None:
    conversation = {"model": MODEL, "messages": MESSAGES} | body
    _, answer = await post(app, "/tokenize", conversation)
    await post(app, "/v1/chat/completions", conversation)
    assert answer["tokens"] == engine.submitted[0].prompt_token_ids


async def test_detokenize_keeps_special_tokens(app: Quart) -> None:
    tokens = [USER, *ids("hé"), HELLO, END]
    assert await post(app, "/detokenize", {"tokens": tokens}) == (200, {"prompt": "<|user|>héhello<|end|>"})
    assert await post(app, "/detokenize", {"tokens": []}) == (200, {"prompt": ""})


async def test_detokenize_undoes_tokenize(app: Quart) -> None:
    text = "naïve 👋🏽 text\n<|end|>"
    _, tokenized = await post(app, "/tokenize", {"prompt": text})
    assert await post(app, "/detokenize", {"tokens": tokenized["tokens"]}) == (200, {"prompt": text})


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
async def test_the_model_may_be_absent_but_not_unknown(app: Quart, path: str, body: dict[str, Any]) -> None:
    assert (await post(app, path, body | {"model": "alias"}))[0] == 200
    status, answer = await post(app, path, body | {"model": "other"})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")


async def test_token_ids_outside_the_vocabulary_are_refused(app: Quart) -> None:
    status, answer = await post(app, "/detokenize", {"tokens": [1, VOCAB_SIZE]})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "invalid_value", "tokens")
    assert str(VOCAB_SIZE) in answer["error"]["message"]


async def test_before_the_engine_is_ready_there_is_no_tokenizer(app: Quart, engine: FakeEngineClient) -> None:
    engine.error = EngineStartingError("loading")
    status, answer = await post(app, "/tokenize", {"prompt": "a"})
    assert (status, answer["error"]["code"]) == (503, "starting")
