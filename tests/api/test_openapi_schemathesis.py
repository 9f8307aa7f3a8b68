"""schemathesis against the server with a fake engine: whatever comes, answers are as described and never a 5xx."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from quart import Quart
from schemathesis import Case, Config, HookContext

from jaxserve.api.openapi import DocumentConfig, openapi_document
from jaxserve.api.request_tables import ProtocolConfig
from tests.api.fake_engine import FakeEngineClient, fake_info
from tests.api.small_model import VOCAB_SIZE, generate_a_little, make_app, make_tokenizer

NAMES, MAX_MODEL_LEN = ("m",), 4096
PROTOCOL = ProtocolConfig(model_names=NAMES, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)
DOCUMENT = openapi_document(DocumentConfig(protocol=PROTOCOL))
# beside success: a name that no model has
CONFIG = Config.from_dict({"checks": {"positive_data_acceptance": {"expected-statuses": [200, 404]}}})
HINT_TEXT = {"role": "user", "content": "hi"}
CONSTRAINTS: dict[str, Any] = {  # what may stand in the fields whose texts have rules of their own
    "guided_json": {"type": "integer"},
    "guided_regex": "a+",
    "guided_choice": ["a", "b"],
    "guided_grammar": 'start: "a"',
    "structured_outputs": {"regex": "a+"},
    "response_format": {"type": "json_object"},
}
BEAM_SEARCH_ONLY = ("length_penalty", "early_stopping")
SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p", "stream", "stream_options")


@cache
def server() -> Quart:
    with TemporaryDirectory() as directory:
        tokenizer = make_tokenizer(Path(directory))
    info = fake_info(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)
    return make_app(
        tokenizer, FakeEngineClient(script=generate_a_little, info=info), served_model_names=NAMES
    )


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Made when it is first asked: these tests are collected more often than they run."""
    await server()(scope, receive, send)


schema = schemathesis.openapi.from_dict(DOCUMENT, config=CONFIG)
schema.app = app


def keeping_rules_between_fields(body: dict[str, Any], path: str) -> dict[str, Any]:
    """The body without what breaks a rule that no schema of a body can express: one between fields, inside of a text,
    or about the length of a prompt."""
    body = deepcopy(body)  # an example is used again

    def drop(*names: str) -> None:
        for name in names:
            body.pop(name, None)

    def given(name: str) -> bool:
        return body.get(name) is not None

    is_chat = given("messages")
    for name in ("max_tokens", "max_completion_tokens"):
        if given(name):
            body[name] = max(1, min(body[name], 16))
    drop("min_tokens", "chat_template", "chat_template_kwargs", "truncate_prompt_tokens")
    if is_chat:
        body["messages"].append(HINT_TEXT)  # a template may show no message of the others' roles
        if body.get("continue_final_message"):
            body["add_generation_prompt"] = False
        if body.get("top_logprobs"):
            body["logprobs"] = True
    if isinstance(body.get("tools"), list):
        for i, tool in enumerate(body["tools"]):
            tool["function"] |= {"name": f"f{i}"}
            tool["function"].pop("parameters", None)
        body["tools"] = body["tools"][:3]
    drop("tool_choice")
    if given("tools") and path == "/v1/chat/completions":
        body["tool_choice"] = "none"
    if body.get("stream"):
        drop("prompt_logprobs", "best_of")
        options = body.get("stream_options") or {}
        if options.get("continuous_usage_stats"):
            options["include_usage"] = True
    else:
        drop("stream_options")
    if given("best_of"):
        body["n"] = min(body.get("n") or 1, body["best_of"])
    if body.get("use_beam_search"):
        drop(*SAMPLING_ONLY)
        body["best_of"] = max(body.get("best_of") or body.get("n") or 1, 2)
    else:
        drop(*BEAM_SEARCH_ONLY)
    if isinstance(body.get("prompt"), list):
        body["prompt"] = body["prompt"][:4]
        if isinstance(body["prompt"][0], list):
            body["prompt"] = [ids[:9] for ids in body["prompt"]]
    asked = [name for name in CONSTRAINTS if given(name)]
    drop("guided_whitespace_pattern", *asked[1:])
    for name in asked[:1]:
        body[name] = CONSTRAINTS[name]
        drop("allowed_token_ids", "bad_words")
    if given("allowed_token_ids"):
        drop("bad_words")
    if given("prediction"):
        body["prediction"]["content"] = "a"
    drop("prompt_cache_options")  # may hold integers of any size
    return body


@schema.hook("map_case")
def map_case(_: HookContext, case: Case) -> Case:
    """Valid bodies shall keep the rules between fields, too; faulty ones stay as they are."""
    if case.meta is not None and case.meta.generation.mode.is_positive and isinstance(case.body, dict):
        case.body = keeping_rules_between_fields(case.body, case.path)
    return case


@pytest.mark.heavy
@schema.parametrize()
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_described_and_never_a_defect(case: Case) -> None:
    response = case.call_and_validate()
    assert response.status_code < 500


async def test_it_is_the_servers_own_document() -> None:
    response = await server().test_client().get("/openapi.json")
    assert await response.get_json() == DOCUMENT
