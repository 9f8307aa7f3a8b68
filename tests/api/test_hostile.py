"""Bodies made to hurt, over HTTP: each is refused quickly, briefly, where the fault is; never a 500."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from quart import Quart

from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient, fake_info, generate
from tests.api.small_model import END, MODEL, VOCAB_SIZE, make_app, make_tokenizer

pytestmark = pytest.mark.timing

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
)
GENERATION = (COMPLETIONS, CHAT)
LIMIT_S = 2.0  # of processor time; half of it on a machine that does nothing else
MEGABYTES = 3_900_000  # just within the limit for bodies
JSON, TYPE, VALUE = "invalid_json", "invalid_type", "invalid_value"
UNKNOWN, CONTEXT = "unknown_parameter", "context_length_exceeded"
HELLO = [{"role": "user", "content": "hi"}]
BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": MODEL, "prompt": "hi"},
    CHAT: {"model": MODEL, "messages": HELLO},
    TOKENIZE: {"prompt": "hi"},
    DETOKENIZE: {"tokens": [1]},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine() -> FakeEngineClient:
    info = fake_info(vocab_size=VOCAB_SIZE)
    return FakeEngineClient(script=lambda r: generate(r, [[104, END]] * r.params.num_sequences), info=info)


@pytest.fixture
def app(tokenizer: Tokenizer, engine: FakeEngineClient) -> Quart:
    return make_app(tokenizer, engine)


def dumped(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


async def refusal(app: Quart, path: str, body: bytes) -> tuple[int, Any, Any]:
    """Status, code and param; asserts that it was quick and is brief."""
    began = time.process_time()
    response = await app.test_client().post(path, data=body, headers={"Content-Type": "application/json"})
    assert time.process_time() - began < LIMIT_S
    data = await response.get_data()
    assert len(data) < 4096
    error = json.loads(data)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) <= 1000
    return response.status_code, error["code"], error["param"]


# --- JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "code"),
    [
        (b'"n":NaN', JSON),
        (b'"n":-Infinity', JSON),
        (b'"n":1e999', JSON),
        (b'"n":' + b"9" * 5000, JSON),
        (b'"n":' + b"9" * MEGABYTES, JSON),
        (b'"user":"\\ud800"', JSON),
        (b'"user":"\\udc00x"', JSON),
        (b'"user":"\xff"', JSON),
        (b'"user":"\xc0\x80"', JSON),
        (b'"x":' + b"[" * 100_000 + b"]" * 100_000, JSON),
        (b'"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000, JSON),
        (b'"x":' + b"[" * 100_000, JSON),
        (b'"x":' + b"[" * 100 + b"]" * 100, UNKNOWN),
        (b'"x":1', UNKNOWN),
        (b'"' + b"x" * MEGABYTES + b'":1', UNKNOWN),
        (b",".join(b'"x%d":1' % i for i in range(300_000)), UNKNOWN),
    ],
    ids=lambda value: repr(value)[:40],
)
@pytest.mark.parametrize("path", ROUTES)
async def test_hostile_json_is_refused(app: Quart, path: str, member: bytes, code: str) -> None:
    body = dumped(BASE[path])[:-1] + b"," + member + b"}"
    status, found, _ = await refusal(app, path, body)
    assert (status, found) == (400, code)


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"5", b"true", b"null", b"[" + b"1," * 1_900_000 + b"1]"])
@pytest.mark.parametrize("path", ROUTES)
async def test_a_body_that_is_no_object_is_of_the_wrong_type(app: Quart, path: str, body: bytes) -> None:
    assert await refusal(app, path, body) == (400, TYPE, None)


@pytest.mark.parametrize("path", GENERATION)
async def test_of_duplicate_keys_the_last_wins(app: Quart, engine: FakeEngineClient, path: str) -> None:
    body = dumped(BASE[path])[:-1] + b',"n":0,"n":"x","n":2}'
    response = await app.test_client().post(path, data=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200
    assert engine.submitted[0].params.n == 2


# --- values -------------------------------------------------------------------------------------------------

Row = tuple[dict[str, Any], str, str]  # changes to the body, code, param
BEYOND = 2**64  # one more than 64 bits hold
BOTH: list[Row] = [
    ({"n": 10**9}, VALUE, "n"),
    ({"n": 1e9}, VALUE, "n"),
    ({"n": 10**300}, VALUE, "n"),
    ({"best_of": 10**9}, VALUE, "best_of"),
    ({"use_beam_search": True, "best_of": 10**9}, VALUE, "best_of"),
    ({"seed": BEYOND}, VALUE, "seed"),
    ({"seed": -(10**100)}, VALUE, "seed"),
    ({"top_k": BEYOND}, VALUE, "top_k"),
    ({"temperature": BEYOND}, VALUE, "temperature"),
    ({"temperature": 1e308}, VALUE, "temperature"),
    ({"repetition_penalty": BEYOND}, JSON, "repetition_penalty"),
    ({"use_beam_search": True, "n": 2, "length_penalty": BEYOND}, JSON, "length_penalty"),
    ({"min_tokens": 10**18}, VALUE, "min_tokens"),
    ({"max_tokens": 10**18}, CONTEXT, "max_tokens"),
    ({"truncate_prompt_tokens": BEYOND}, VALUE, "truncate_prompt_tokens"),
    ({"logit_bias": {"0": BEYOND}}, VALUE, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(300_000)}}, VALUE, "logit_bias"),
    ({"logit_bias": {str(2**63 + i): 1 for i in range(1024)}}, VALUE, "logit_bias"),
    ({"allowed_token_ids": [BEYOND]}, VALUE, "allowed_token_ids"),
    ({"allowed_token_ids": [0] * 1_000_000}, VALUE, "allowed_token_ids"),
    ({"stop_token_ids": [VOCAB_SIZE]}, VALUE, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, VALUE, "stop_token_ids"),
    ({"stop_token_ids": [0] * 1_000_000}, VALUE, "stop_token_ids"),
    ({"stop": ["x"] * 900_000}, VALUE, "stop"),
    ({"stop": "x" * MEGABYTES}, VALUE, "stop"),
    ({"bad_words": ["x"] * 900_000}, VALUE, "bad_words"),
    ({"bad_words": [f"{i:03}" + "x" * 253 for i in range(128)]}, VALUE, "bad_words"),
    ({"user": "x" * MEGABYTES}, VALUE, "user"),
    ({"cache_salt": "x" * MEGABYTES}, VALUE, "cache_salt"),
    ({"request_id": "x" * MEGABYTES}, VALUE, "request_id"),
    ({"model": 10**100}, TYPE, "model"),
    ({"metadata": {f"k{i}": "v" for i in range(200_000)}}, VALUE, "metadata"),
    ({"metadata": {"k": BEYOND}}, TYPE, "metadata.k"),
    ({"prompt_cache_options": {"a": [{"b": -BEYOND}]}}, JSON, "prompt_cache_options"),
    ({"guided_json": {"maximum": BEYOND}}, JSON, "guided_json"),
    ({"structured_outputs": {"json": {"maximum": BEYOND}}}, JSON, "structured_outputs.json"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"maximum": BEYOND}},
            }
        },
        JSON,
        "response_format.json_schema.schema",
    ),
]
COMPLETION: list[Row] = [
    ({"prompt": [VOCAB_SIZE]}, VALUE, "prompt"),
    ({"prompt": [BEYOND]}, VALUE, "prompt"),
    ({"prompt": [[0]] * 1000 + [[-1]]}, VALUE, "prompt"),
    ({"prompt": [[0]] * 900_000}, VALUE, "prompt"),
    ({"prompt": ["x"] * 900_000}, VALUE, "prompt"),
    ({"prompt": [0] * 1_900_000}, CONTEXT, "prompt"),
    ({"prompt": ["x"] * 1024, "n": 2}, VALUE, "n"),
    ({"prompt": "1" * MEGABYTES}, CONTEXT, "prompt"),
    ({"prompt": " " * MEGABYTES}, CONTEXT, "prompt"),
    ({"prompt": "hello 1 " * (MEGABYTES // 8)}, CONTEXT, "prompt"),
    ({"prompt": ["x"] * 1023 + ["1" * 3_000_000]}, CONTEXT, "prompt"),
    ({"logprobs": 10**9}, VALUE, "logprobs"),
]
CONVERSATION: list[Row] = [
    ({"messages": [{"role": "user", "content": "1" * MEGABYTES}]}, CONTEXT, "messages"),
    ({"messages": HELLO * 100_000}, CONTEXT, "messages"),
    ({"messages": [{"role": "x" * MEGABYTES, "content": "x"}]}, VALUE, "messages[0].role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "x" * MEGABYTES}]}]},
        "unsupported_value",
        "messages[0].content[0].type",
    ),
    ({"chat_template_kwargs": {"a": {"b": [BEYOND]}}}, JSON, "chat_template_kwargs"),
    ({"documents": [{"a": BEYOND}]}, TYPE, "documents[0].a"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"maximum": BEYOND}}}]},
        JSON,
        "tools[0].function.parameters",
    ),
    ({"logprobs": True, "top_logprobs": 10**9}, VALUE, "top_logprobs"),
]


@pytest.mark.parametrize(("changes", "code", "param"), BOTH + COMPLETION, ids=lambda value: repr(value)[:40])
async def test_hostile_values_in_completions_are_refused(
    app: Quart, engine: FakeEngineClient, changes: dict[str, Any], code: str, param: str
) -> None:
    body = dumped(BASE[COMPLETIONS] | changes)
    assert await refusal(app, COMPLETIONS, body) == (400, code, param)
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("changes", "code", "param"), BOTH + CONVERSATION, ids=lambda value: repr(value)[:40]
)
async def test_hostile_values_in_chats_are_refused(
    app: Quart, engine: FakeEngineClient, changes: dict[str, Any], code: str, param: str
) -> None:
    body = dumped(BASE[CHAT] | changes)
    assert await refusal(app, CHAT, body) == (400, code, param)
    assert engine.submitted == []


async def test_ids_that_no_tokenizer_has_are_refused(app: Quart) -> None:
    for tokens in ([VOCAB_SIZE], [-1], [BEYOND], [0] * 1_000_000 + [VOCAB_SIZE]):
        body = dumped({"tokens": tokens})
        assert await refusal(app, DETOKENIZE, body) == (400, VALUE, "tokens")
