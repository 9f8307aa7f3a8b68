"""Structured output and tools over HTTP: what is refused, what the engine is asked for, what the answer looks like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quart import Quart

from jaxserve.api.app import create_app
from jaxserve.api.tools import moved
from jaxserve.constraints.compiler import Compiler
from jaxserve.constraints.constraint import Constraint
from jaxserve.constraints.json_schema import normalize_schema
from jaxserve.constraints.vocabulary import Vocabulary
from jaxserve.constraints.worker import ConstraintWorker
from jaxserve.messages import AddRequest, SequenceOutput
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from tests.api.fake_engine import FakeEngineClient, generate
from tests.api.small_model import (
    END,
    MODEL,
    VOCAB_SIZE,
    CompilerHere,
    falling_logprobs,
    ids,
    make_context,
    make_tokenizer,
)

HELLO = [{"role": "user", "content": "hi"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = SCHEMA) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def response_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]},
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Server:
    """An app whose engine says `text`, a token a byte."""

    def __init__(self, tokenizer: Tokenizer, text: str = "", finish: str = "stop", **config: Any) -> None:
        def script(request: AddRequest) -> list[list[SequenceOutput]]:
            sequences = [ids(text)] * request.params.n
            return generate(request, sequences, finish_reason=finish, logprobs=falling_logprobs)  # type: ignore[arg-type]

        self.engine = FakeEngineClient(script=script)
        self.context = make_context(tokenizer, self.engine, **config)
        self.app: Quart = create_app(self.context)

    @property
    def asked(self) -> list[Constraint]:
        """The constraints that were compiled."""
        assert isinstance(self.context.constraints, CompilerHere)
        return self.context.constraints.asked

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        response = await self.app.test_client().post(path, json={"model": MODEL, **body})
        return response.status_code, json.loads(await response.get_data())

    async def chat(self, body: dict[str, Any]) -> Any:
        status, answer = await self.post("/v1/chat/completions", {"messages": HELLO, **body})
        assert status == 200, answer
        return answer

    async def stream(self, body: dict[str, Any]) -> list[Any]:
        """The chunks."""
        body = {"model": MODEL, "messages": HELLO, "stream": True, **body}
        response = await self.app.test_client().post("/v1/chat/completions", json=body)
        text = (await response.get_data()).decode()
        assert response.status_code == 200, text
        *events, done, nothing = text.split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


# --- refusals -------------------------------------------------------------------------------------------------

VALUE, CONSTRAINT, COMPLEX = "invalid_value", "invalid_constraint", "constraint_too_complex"
UNKNOWN, MISSING = "unknown_parameter", "missing_required_parameter"
S = "structured_outputs"
Row = tuple[dict[str, Any], str, str, str]  # body, code, param, part of the message
BOTH: list[Row] = [
    # one constraint
    ({"guided_json": {}, "guided_regex": "a"}, VALUE, "guided_regex", "guided_json and guided_regex are two"),
    (
        {"guided_regex": "a", "guided_grammar": "start: A"},
        VALUE,
        "guided_grammar",
        "guided_regex and guided_g",
    ),
    (
        {"response_format": {"type": "json_object"}, "guided_choice": ["a"]},
        VALUE,
        "guided_choice",
        "response_format and guided_choice",
    ),
    (
        {**response_format({}), S: {"regex": "a"}},
        VALUE,
        f"{S}.regex",
        f"response_format and {S}.regex are two",
    ),
    ({S: {"regex": "a", "json": {}}}, VALUE, f"{S}.regex", f"{S}.json and {S}.regex"),
    (
        {S: {"json_object": True, "choice": ["a"]}},
        VALUE,
        f"{S}.json_object",
        f"{S}.choice and {S}.json_object",
    ),
    ({S: {}}, VALUE, S, "exactly one of json, regex, choice, grammar, json_object"),
    ({S: {"json_object": False}}, VALUE, S, "exactly one of"),
    ({S: {"whitespace_pattern": ""}}, VALUE, S, "exactly one of"),
    # other masks
    (
        {"guided_regex": "a", "allowed_token_ids": [1]},
        VALUE,
        "allowed_token_ids",
        "guided_regex cannot be combined",
    ),
    ({S: {"json": {}}, "bad_words": ["x"]}, VALUE, "bad_words", f"{S}.json cannot be combined"),
    # options of JSON
    ({"guided_whitespace_pattern": " ?"}, VALUE, "guided_whitespace_pattern", "only with a JSON constraint"),
    (
        {"guided_whitespace_pattern": " ?", "guided_regex": "a"},
        VALUE,
        "guided_whitespace_pattern",
        "only with",
    ),
    ({S: {"regex": "a", "whitespace_pattern": " "}}, VALUE, f"{S}.whitespace_pattern", "only with a JSON"),
    (
        {S: {"choice": ["a"], "disable_any_whitespace": True}},
        VALUE,
        f"{S}.disable_any_whitespace",
        "only with",
    ),
    (
        {S: {"regex": "a", "disable_additional_properties": True}},
        VALUE,
        f"{S}.disable_additional_properties",
        "only with",
    ),
    (
        {S: {"json_object": True, "disable_additional_properties": True}},
        VALUE,
        f"{S}.disable_additional_properties",
        "needs a schema",
    ),
    (
        {S: {"json": {}, "whitespace_pattern": " "}, "guided_whitespace_pattern": " "},
        VALUE,
        f"{S}.whitespace_pattern",
        "guided_whitespace_pattern and structured_outputs.whitespace_pattern",
    ),
    (
        {S: {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}},
        VALUE,
        f"{S}.disable_any_whitespace",
        "give one of them",
    ),
    # what the compiler says, at the field that it is about
    ({"guided_json": {"type": "nothing"}}, CONSTRAINT, "guided_json", "must be one or several of null"),
    ({"guided_json": "{"}, CONSTRAINT, "guided_json", "no valid JSON"),
    ({"guided_json": "[]"}, CONSTRAINT, "guided_json", "must be a JSON object"),
    ({"guided_json": {"not": {}}}, CONSTRAINT, "guided_json", "The keyword not is not supported (at #/not)"),
    ({S: {"json": {"uniqueItems": True}}}, CONSTRAINT, f"{S}.json", "uniqueItems"),
    (response_format({"if": {}}), CONSTRAINT, "response_format.json_schema.schema", "The keyword if"),
    ({"guided_regex": "("}, CONSTRAINT, "guided_regex", "not closed"),
    ({"guided_regex": "a" * 5000}, COMPLEX, "guided_regex", "at most 4,096 bytes"),
    ({S: {"regex": "(?=a)"}}, CONSTRAINT, f"{S}.regex", "ook"),
    ({"guided_choice": ["a" * (64 << 10)]}, COMPLEX, "guided_choice", "at most 65,536 bytes"),
    ({S: {"choice": ["x" * i for i in range(1, 400)]}}, COMPLEX, f"{S}.choice", "at most 65,536"),
    ({"guided_grammar": ""}, CONSTRAINT, "guided_grammar", ""),
    ({S: {"grammar": "start: nothing"}}, CONSTRAINT, f"{S}.grammar", "nothing"),
    (
        {"guided_json": {}, "guided_whitespace_pattern": "x"},
        CONSTRAINT,
        "guided_whitespace_pattern",
        "only spaces",
    ),
    ({S: {"json": {}, "whitespace_pattern": "("}}, CONSTRAINT, f"{S}.whitespace_pattern", "not closed"),
    (
        {S: {"json": {"multipleOf": 3}, "disable_fallback": True}, "guided_decoding_backend": "outlines"},
        CONSTRAINT,
        f"{S}.json",
        "The backend outlines cannot be used",
    ),
    ({"guided_decoding_backend": "xgrammar"}, VALUE, "guided_decoding_backend", "'lm-format-enforcer'"),
]
AUTO = "--enable-auto-tool-choice"
CHAT: list[Row] = [
    ({"tools": [tool("f")]}, VALUE, "tool_choice", AUTO),
    ({"tools": [tool("f")], "tool_choice": "auto"}, VALUE, "tool_choice", AUTO),
    ({"tools": [tool("f")], "tool_choice": allowed("auto", "f")}, VALUE, "tool_choice", AUTO),
    ({"tool_choice": "auto"}, VALUE, "tool_choice", "needs tools"),
    ({"tool_choice": "required"}, VALUE, "tool_choice", "needs tools"),
    ({"tool_choice": named("f")}, VALUE, "tool_choice", "needs tools"),
    ({"tool_choice": allowed("required", "f")}, VALUE, "tool_choice", "needs tools"),
    ({"tools": [tool("f"), tool("f")]}, VALUE, "tools[1].function.name", "distinct, got 'f' twice"),
    (
        {"tools": [tool("f")], "tool_choice": named("g")},
        VALUE,
        "tool_choice.function.name",
        "must be one of tools (f), got 'g'",
    ),
    (
        {"tools": [tool("f")], "tool_choice": allowed("required", "f", "g")},
        VALUE,
        "tool_choice.allowed_tools.tools[1].function.name",
        "got 'g'",
    ),
    (
        {"tools": [tool("f")], "tool_choice": allowed("required")},
        VALUE,
        "tool_choice.allowed_tools.tools",
        "at least 1",
    ),
    (
        {"tools": [tool("f")], "tool_choice": allowed("any", "f")},
        VALUE,
        "tool_choice.allowed_tools.mode",
        "'auto', 'required'",
    ),
    ({"tools": [tool("f")], "tool_choice": {**named("f"), "x": 1}}, UNKNOWN, "tool_choice.x", "Unknown"),
    ({"tools": [tool("f")], "tool_choice": {"type": "custom"}}, VALUE, "tool_choice.type", "'function'"),
    (
        {"tools": [tool("f")], "tool_choice": {"type": "function"}},
        MISSING,
        "tool_choice.function",
        "required",
    ),
    *(
        (
            {"tools": [tool("f")], "tool_choice": choice, "guided_json": {}},
            VALUE,
            "tool_choice",
            "guided_json and",
        )
        for choice in ("required", named("f"), allowed("required", "f"))
    ),
    (
        {"tools": [tool("f")], "tool_choice": "required", "bad_words": ["x"]},
        VALUE,
        "bad_words",
        "tool_choice cannot be combined",
    ),
    *(
        (
            {"tools": [tool("f"), tool("g", {"not": {}})], "tool_choice": choice},
            CONSTRAINT,
            "tools[1].function.parameters",
            "The keyword not is not supported (at #/not)",
        )
        for choice in ("none", "required", named("f"), named("g"), allowed("required", "f"))
    ),
    *(  # that no arguments are valid
        (
            {
                "tools": [tool("f"), tool("g", {"required": ["a"], "properties": {"a": False}})],
                "tool_choice": choice,
            },
            CONSTRAINT,
            "tools[1].function.parameters",
            "contradictory",
        )
        for choice in ("none", "required", named("f"))
    ),
    (
        {"tools": [tool("f", {"type": "string"})], "tool_choice": "none"},
        CONSTRAINT,
        "tools[0].function.parameters",
        'must be "object"',
    ),
]


def row_id(row: Row) -> str:
    return f"{json.dumps(row[0])[:60]}-{row[1]}"


async def assert_refused(server: Server, path: str, row: Row, base: dict[str, Any]) -> None:
    changes, code, param, words = row
    status, answer = await server.post(path, base | changes)
    assert status == 400, answer
    error = answer["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param), error
    assert words in error["message"]
    assert not server.engine.submitted


@pytest.mark.parametrize("row", BOTH, ids=row_id)
async def test_a_completion_request_is_refused_where_the_fault_is(tokenizer: Tokenizer, row: Row) -> None:
    await assert_refused(Server(tokenizer), "/v1/completions", row, {"prompt": "x"})


@pytest.mark.parametrize("row", BOTH + CHAT, ids=row_id)
async def test_a_chat_request_is_refused_where_the_fault_is(tokenizer: Tokenizer, row: Row) -> None:
    await assert_refused(Server(tokenizer), "/v1/chat/completions", row, {"messages": HELLO})


async def test_a_prompt_that_is_too_long_is_refused_before_the_constraint_is_compiled(
    tokenizer: Tokenizer,
) -> None:
    server = Server(tokenizer)
    body = {"prompt": "x" * 100, "guided_regex": "("}
    status, answer = await server.post("/v1/completions", body)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert not server.asked


async def test_a_constraint_is_refused_also_where_nothing_is_generated(tokenizer: Tokenizer) -> None:
    body = {"prompt": "x", "echo": True, "max_tokens": 0, "guided_regex": "("}
    status, answer = await Server(tokenizer).post("/v1/completions", body)
    assert (status, answer["error"]["param"]) == (400, "guided_regex")


async def test_nothing_is_served_before_constraints_can_be_compiled(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer)
    server.context.constraints = None
    status, answer = await server.post("/v1/completions", {"prompt": "x"})
    assert (status, answer["error"]["code"]) == (503, "starting")


# --- what is asked of the engine ------------------------------------------------------------------------------

SCHEMA_TEXT = json.dumps(SCHEMA, separators=(",", ":"))
ASKED: list[tuple[dict[str, Any], Constraint | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}, "guided_json": None, S: None}, None),
    ({"guided_decoding_backend": "outlines"}, None),
    ({"guided_json": SCHEMA}, Constraint(kind="json_schema", text=SCHEMA_TEXT)),
    ({"guided_json": '{"type": "integer"}'}, Constraint(kind="json_schema", text='{"type": "integer"}')),
    ({"guided_regex": "a+"}, Constraint(kind="regex", text="a+")),
    ({"guided_choice": ["ä", "b"]}, Constraint(kind="choice", text='["ä","b"]')),
    ({"guided_grammar": 'start: "a"'}, Constraint(kind="grammar", text='start: "a"')),
    (
        {"guided_regex": "a+", "guided_decoding_backend": "outlines"},
        Constraint(kind="regex", text="a+", backend="outlines"),
    ),
    (
        {"guided_json": {}, "guided_whitespace_pattern": r"\n?"},
        Constraint(kind="json_schema", text="{}", whitespace_pattern=r"\n?"),
    ),
    ({"response_format": {"type": "json_object"}}, Constraint(kind="json_object")),
    (response_format(SCHEMA), Constraint(kind="json_schema", text=SCHEMA_TEXT)),
    ({S: {"json": SCHEMA}}, Constraint(kind="json_schema", text=SCHEMA_TEXT)),
    ({S: {"json_object": True}}, Constraint(kind="json_object")),
    ({S: {"json_object": False, "regex": "a"}}, Constraint(kind="regex", text="a")),
    (
        {S: {"choice": ["a"], "regex": None, "disable_fallback": True}},
        Constraint(kind="choice", text='["a"]', fallback=False),
    ),
    ({S: {"grammar": 'start: "a"'}}, Constraint(kind="grammar", text='start: "a"')),
    (
        {S: {"json": {}, "disable_any_whitespace": True}},
        Constraint(kind="json_schema", text="{}", whitespace_pattern=""),
    ),
    (
        {S: {"json": {}, "whitespace_pattern": " *", "disable_additional_properties": True}},
        Constraint(kind="json_schema", text="{}", whitespace_pattern=" *", additional_properties=False),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "expected"), ASKED, ids=lambda x: json.dumps(x)[:60] if isinstance(x, dict) else ""
)
@pytest.mark.parametrize("api", ["completions", "chat/completions"])
async def test_fields_become_one_constraint(
    tokenizer: Tokenizer, api: str, body: dict[str, Any], expected: Constraint | None
) -> None:
    server = Server(tokenizer, "a")
    prompt = {"prompt": "x"} if api == "completions" else {"messages": HELLO}
    status, answer = await server.post(f"/v1/{api}", prompt | body)
    assert status == 200, answer
    assert server.asked == ([] if expected is None else [expected])
    (request,) = server.engine.submitted
    vocabulary = Vocabulary.of(tokenizer, VOCAB_SIZE, [END])
    assert request.constraint == (None if expected is None else Compiler(vocabulary).compile(expected))


async def test_the_flag_chooses_the_backend_of_requests_that_name_none(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, "a", guided_decoding_backend="outlines")
    await server.chat({"guided_regex": "a"})
    await server.chat({"guided_regex": "a", "guided_decoding_backend": "auto"})
    assert [constraint.backend for constraint in server.asked] == ["outlines", "auto"]


async def test_compilations_are_observed(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, "a")
    await server.chat({"guided_regex": "a"})
    await server.post("/v1/completions", {"prompt": "x", "guided_regex": "("})
    assert (
        'jaxserve:grammar_compile_seconds_count{model_name=""} 2.0'
        in server.context.metrics.render().decode()
    )


# --- tools: what is enforced ----------------------------------------------------------------------------------

CALL = {
    "type": "object",
    "properties": {"name": {"const": "f"}, "parameters": SCHEMA},
    "required": ["name", "parameters"],
    "additionalProperties": False,
}


def array_of(*calls: Any, **bounds: int) -> dict[str, Any]:
    return {"type": "array", "items": {"anyOf": list(calls)}, "minItems": 1, **bounds}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"tool_choice": "none"}, None),
        ({"tool_choice": named("f")}, SCHEMA),
        ({"tool_choice": named("g")}, {"type": "object", "additionalProperties": False}),
        ({"tool_choice": allowed("required", "f")}, array_of(CALL)),
        ({"tool_choice": allowed("required", "f"), "parallel_tool_calls": False}, array_of(CALL, maxItems=1)),
        (
            {"tool_choice": "required"},
            array_of(
                CALL,
                CALL
                | {
                    "properties": {
                        "name": {"const": "g"},
                        "parameters": {"type": "object", "additionalProperties": False},
                    }
                },
            ),
        ),
    ],
    ids=lambda x: json.dumps(x)[:60],
)
async def test_what_a_tool_choice_enforces(tokenizer: Tokenizer, body: dict[str, Any], expected: Any) -> None:
    server = Server(tokenizer, '[{"name": "f", "parameters": {"a": 1}}]')
    await server.chat({"tools": [tool("f"), tool("g", None)], **body})
    (request,) = server.engine.submitted
    if expected is None:
        assert request.constraint is None
    else:
        assert json.loads(server.asked[-1].text) == expected


@pytest.mark.parametrize(
    ("parameters", "enforced"),
    [
        ({}, {"type": "object"}),
        ({"properties": {}}, {"properties": {}, "type": "object"}),
        ({"type": ["object", "null"]}, {"type": "object"}),
        ({"$ref": "#/$defs/a", "$defs": {"a": SCHEMA}}, {"$ref": "#/$defs/a", "$defs": {"a": SCHEMA}}),
    ],
)
async def test_arguments_are_an_object(tokenizer: Tokenizer, parameters: Any, enforced: Any) -> None:
    server = Server(tokenizer, "{}")
    await server.chat({"tools": [tool("f", parameters)], "tool_choice": named("f")})
    assert json.loads(server.asked[-1].text) == enforced


def test_a_schema_that_is_moved_into_another_means_the_same() -> None:
    schema = {
        "$id": "https://example.com/s",
        "type": "object",
        "properties": {
            "$ref": {"$ref": "#/$defs/n"},
            "enum": {"enum": [{"$ref": "#/x"}]},
            "all": {"$ref": "#"},
            "list": {"type": "array", "items": {"$ref": "#/properties/enum"}},
        },
        "$defs": {"n": {"type": "integer"}},
    }
    inside = moved(schema, "#/properties/p")
    whole = normalize_schema({"type": "object", "properties": {"p": inside}})
    alone = normalize_schema(schema)

    def resolved(value: Any, definitions: Any, depth: int = 4) -> Any:
        if isinstance(value, list):
            return [resolved(member, definitions, depth) for member in value]
        if not isinstance(value, dict):
            return value
        name = value.get("$ref")
        if isinstance(name, str) and name.startswith("#/$defs/"):
            return (
                resolved(definitions[name.removeprefix("#/$defs/")], definitions, depth - 1)
                if depth
                else None
            )
        return {key: resolved(member, definitions, depth) for key, member in value.items() if key != "$defs"}

    assert resolved(whole["properties"]["p"], whole["$defs"]) == resolved(alone, alone["$defs"])


# --- tools: answers -------------------------------------------------------------------------------------------

USE = {"tools": [tool("f"), tool("g", None)]}
REQUIRED = {**USE, "tool_choice": "required"}
NAMED = {**USE, "tool_choice": named("f")}
TWO_CALLS = '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]'
HERMES: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
THINKING = 'Let me see. <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


def without_ids(calls: list[Any]) -> list[Any]:
    """Calls without their ids, which are `call_…` and all different."""
    call_ids = [call["id"] for call in calls]
    assert all(call_id.startswith("call_") for call_id in call_ids)
    assert len(set(call_ids)) == len(call_ids)
    return [{key: value for key, value in call.items() if key != "id"} for call in calls]


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


Answer = tuple[str, str, dict[str, Any], dict[str, Any], str | None, list[Any] | None, str]
ANSWERS: list[
    Answer
] = [  # generated text, engine's reason; configuration, body; content, calls, finish_reason
    ('{"a": 1}', "stop", {}, NAMED, None, [call("f", '{"a": 1}')], "stop"),
    ('{"a": ', "length", {}, NAMED, None, [call("f", '{"a": ')], "length"),
    (TWO_CALLS, "stop", {}, REQUIRED, None, [call("f", '{"a": 1}'), call("g", "{}")], "tool_calls"),
    (TWO_CALLS[:33], "length", {}, REQUIRED, None, [call("f", '{"a"')], "length"),
    (TWO_CALLS[:5], "length", {}, REQUIRED, "", None, "length"),
    (
        '[{"name": "f", "parameters": {"a": 1}}]',
        "stop",
        {},
        {**USE, "tool_choice": allowed("required", "f")},
        None,
        [call("f", '{"a": 1}')],
        "tool_calls",
    ),
    (THINKING, "stop", HERMES, USE, "Let me see.", [call("f", '{"a": 1}')], "tool_calls"),
    (THINKING[:-13], "length", HERMES, USE, "Let me see.", [call("f", '{"a": 1}')], "length"),
    ("Hello. ", "stop", HERMES, USE, "Hello. ", None, "stop"),
    (THINKING, "stop", HERMES, {**USE, "tool_choice": "none"}, THINKING, None, "stop"),
    (THINKING, "stop", HERMES, {**USE, "tool_choice": allowed("auto", "g")}, THINKING, None, "stop"),
    (THINKING, "stop", HERMES, {}, THINKING, None, "stop"),
    (THINKING, "stop", HERMES, {**USE, "guided_regex": "(?s:.*)"}, THINKING, None, "stop"),
    (THINKING, "stop", {}, {**USE, "tool_choice": "none"}, THINKING, None, "stop"),
    (
        THINKING + THINKING.replace("f", "g"),
        "stop",
        HERMES,
        {**USE, "parallel_tool_calls": False},
        "Let me see.Let me see.",
        [call("f", '{"a": 1}')],
        "tool_calls",
    ),
    (
        '{"name": "f", "parameters": {"a": 2}}',
        "stop",
        HERMES | {"tool_call_parser": "llama3_json"},
        USE,
        None,
        [call("f", '{"a": 2}')],
        "tool_calls",
    ),
    (
        "[f(a=3)]",
        "stop",
        HERMES | {"tool_call_parser": "pythonic"},
        USE,
        None,
        [call("f", '{"a": 3}')],
        "tool_calls",
    ),
    # a stop string in the arguments
    (TWO_CALLS, "stop", {}, {**REQUIRED, "stop": "1}"}, None, [call("f", '{"a": ')], "stop"),
]
ANSWER_IDS = [f"{i}-{answer[0][:40]}" for i, answer in enumerate(ANSWERS)]


@pytest.mark.parametrize(
    ("text", "reason", "config", "body", "content", "calls", "finish_reason"), ANSWERS, ids=ANSWER_IDS
)
async def test_an_answer_has_content_or_calls(
    tokenizer: Tokenizer,
    text: str,
    reason: str,
    config: dict[str, Any],
    body: dict[str, Any],
    content: str | None,
    calls: list[Any] | None,
    finish_reason: str,
) -> None:
    server = Server(tokenizer, text, reason, **config)
    answer = await server.chat({**body, "n": 2})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        assert choice["finish_reason"] == finish_reason
        message = choice["message"]
        assert ("tool_calls" in message) == (calls is not None)
        if calls is not None:
            message["tool_calls"] = without_ids(message["tool_calls"])
        assert message == {"role": "assistant", "content": content, "refusal": None} | (
            {} if calls is None else {"tool_calls": calls}
        )


@pytest.mark.parametrize(
    ("text", "reason", "config", "body", "content", "calls", "finish_reason"), ANSWERS, ids=ANSWER_IDS
)
async def test_a_stream_of_calls_joins_to_the_answer(
    tokenizer: Tokenizer,
    text: str,
    reason: str,
    config: dict[str, Any],
    body: dict[str, Any],
    content: str | None,
    calls: list[Any] | None,
    finish_reason: str,
) -> None:
    server = Server(tokenizer, text, reason, **config)
    options = {**body, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    (whole,) = (await server.chat(options))["choices"]
    joined_content, joined_calls = "", list[Any]()
    token_ids, logprobs, reasons = list[int](), list[Any](), list[str]()
    for chunk in await server.stream(options):
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        joined_content += delta.get("content") or ""
        for piece in delta.get("tool_calls", ()):
            if piece["index"] == len(joined_calls):
                assert set(piece) == {"index", "id", "type", "function"}
                assert piece["function"] == {"name": piece["function"]["name"], "arguments": ""}
                joined_calls.append({key: piece[key] for key in ("id", "type", "function")})
            else:
                assert piece["index"] == len(joined_calls) - 1
                assert set(piece) == {"index", "function"}
                assert set(piece["function"]) == {"arguments"}
                joined_calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
        token_ids += choice["token_ids"]
        logprobs += (choice["logprobs"] or {"content": []})["content"]
        assert delta or choice["finish_reason"], "no empty chunks"
        if choice["finish_reason"]:
            reasons.append(choice["finish_reason"])
            assert choice["stop_reason"] == whole["stop_reason"]
    assert reasons == [finish_reason]
    assert joined_content == (content or "")
    assert without_ids(joined_calls) == (calls or [])
    assert token_ids == whole["token_ids"]
    assert logprobs == whole["logprobs"]["content"]


async def test_the_first_chunks_of_a_stream_of_calls(tokenizer: Tokenizer) -> None:
    """As OpenAI's clients read them: the call's name once, then pieces of its arguments."""
    chunks = await Server(tokenizer, '{"a": 1}').stream(NAMED)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    call_id = deltas[1]["tool_calls"][0].pop("id")
    assert call_id.startswith("call_")
    assert deltas[1] == {
        "tool_calls": [{"index": 0, "type": "function", "function": {"name": "f", "arguments": ""}}]
    }
    assert deltas[2] == {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}
    assert chunks[-1]["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]


async def test_a_logprob_comes_with_or_after_its_text(tokenizer: Tokenizer) -> None:
    server = Server(tokenizer, "ab <tool", **HERMES)
    chunks = await server.stream({**USE, "logprobs": True})
    seen = [
        (
            chunk["choices"][0]["delta"].get("content", ""),
            len((chunk["choices"][0]["logprobs"] or {"content": []})["content"]),
        )
        for chunk in chunks
    ]
    assert seen == [("", 0), ("a", 1), ("b", 1), (" <tool", 0), ("", 6)]


async def test_calls_are_found_also_where_their_marks_are_special_tokens(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text())
    marks = {"<tool_call>": VOCAB_SIZE, "</tool_call>": VOCAB_SIZE + 1}
    like = stored["added_tokens"][0]
    stored["added_tokens"] += [
        {**like, "content": mark, "id": i, "special": True} for mark, i in marks.items()
    ]
    path.write_text(json.dumps(stored))
    with_marks = load_tokenizer(tmp_path)
    server = Server(with_marks, **HERMES)
    middle = ids('{"name": "f", "arguments": {"a": 1}}')
    tokens = [marks["<tool_call>"], *middle, marks["</tool_call>"], END]
    server.engine.script = lambda request: generate(request, [tokens])
    (choice,) = (await server.chat(USE))["choices"]
    assert without_ids(choice["message"]["tool_calls"]) == [call("f", '{"a": 1}')]
    assert choice["message"]["content"] is None
    (choice,) = (await server.chat({**USE, "tool_choice": "none"}))["choices"]
    assert choice["message"]["content"] == '{"name": "f", "arguments": {"a": 1}}'


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_tools_reach_the_template(tokenizer: Tokenizer, path: str) -> None:
    template = "{{ tools | tojson }}"
    server = Server(tokenizer, "a")
    tools = [tool("f") | {"type": "function"}]
    body: dict[str, Any] = {"messages": HELLO, "tools": tools, "chat_template": template}
    if path == "/tokenize":
        status, answer = await server.post(path, body)
        tokens = answer["tokens"]
    else:
        status, answer = await server.post(path, body | {"tool_choice": "none", "truncate_prompt_tokens": -1})
        tokens = server.engine.submitted[-1].prompt_token_ids
    assert status == 200, answer
    rendered = json.dumps(tools)
    assert rendered.endswith(bytes(tokens).decode())
    assert path != "/tokenize" or bytes(tokens).decode() == rendered


async def test_a_real_worker_compiles_for_the_server(tokenizer: Tokenizer, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    server = Server(tokenizer, "a")
    server.context.constraints = worker = ConstraintWorker(tmp_path, VOCAB_SIZE, [END])
    try:
        await server.chat({"guided_choice": ["a", "b"]})
        status, answer = await server.post("/v1/completions", {"prompt": "x", "guided_regex": "(a|b"})
    finally:
        worker.process.close()
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (
        400,
        "invalid_constraint",
        "guided_regex",
    )
    (request,) = server.engine.submitted
    assert request.constraint is not None
    assert request.constraint.backend == "llguidance"
