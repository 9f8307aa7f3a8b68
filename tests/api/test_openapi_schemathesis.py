"""schemathesis against the server with a fake engine: whatever comes, answers are as described and never a 5xx."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from quart import Quart
from schemathesis import Case, CheckContext, Config, Response

from jaxserve.api.openapi import DocumentConfig, openapi_document
from jaxserve.api.protocol import ProtocolConfig
from tests.api.fake_engine import FakeEngineClient, fake_info
from tests.api.small_model import VOCAB_SIZE, generate_a_little, make_app, make_tokenizer

NAMES, MAX_MODEL_LEN = ("m",), 4096
PROTOCOL = ProtocolConfig(model_names=NAMES, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)
DOCUMENT = openapi_document(DocumentConfig(protocol=PROTOCOL))
# valid bodies may break rules between fields; `only_rules_between_fields` is stricter about why
CONFIG = Config.from_dict({"checks": {"positive_data_acceptance": {"enabled": False}}})
BETWEEN_FIELDS = ("invalid_value", "unsupported_parameter", "context_length_exceeded", "invalid_template")
# free objects, regexes and grammars have rules that no schema of the body can express
INSIDE_FIELDS = ("invalid_constraint", "constraint_too_complex")
HUGE_INTEGER = "an integer of more than 64 bits"


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


def only_rules_between_fields(context: CheckContext, response: Response, case: Case) -> None:
    """A body that its schema allows is not refused for its form."""
    if case.meta is not None and case.meta.generation.mode.is_positive and response.status_code == 400:
        error = response.json()["error"]
        assert error["code"] in (*BETWEEN_FIELDS, *INSIDE_FIELDS) or HUGE_INTEGER in error["message"]


@schema.parametrize()
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_described_and_never_a_defect(case: Case) -> None:
    response = case.call_and_validate(additional_checks=[only_rules_between_fields])
    assert response.status_code < 500


async def test_it_is_the_servers_own_document() -> None:
    response = await server().test_client().get("/openapi.json")
    assert await response.get_json() == DOCUMENT
