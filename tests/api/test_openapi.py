"""The API's own description: valid, complete, exact about what is accepted, and true of what is answered."""

from __future__ import annotations

import ast
import base64
import html.parser
import json
import math
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from quart import Quart

import jaxserve
from jaxserve.api.fields import Table, UnknownFields
from jaxserve.api.openapi import DocumentConfig, openapi_document
from jaxserve.api.openapi_responses import ERRORS
from jaxserve.api.request_tables import (
    TOKENIZE_TEXT,
    ProtocolConfig,
    chat_table,
    completion_table,
    decimal_pattern,
    detokenize_table,
    tokenize_messages_table,
)
from jaxserve.engine_client import EngineLoad
from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient, fake_info
from tests.api.small_model import (
    MODEL,
    VOCAB_SIZE,
    generate_a_little,
    make_app,
    make_tokenizer,
)

HELLO = [{"role": "user", "content": "hi"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
V = 100
PROTOCOL = ProtocolConfig(model_names=(MODEL,), vocab_size=V, max_model_len=64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(script=generate_a_little, info=fake_info(vocab_size=VOCAB_SIZE))


@pytest.fixture
def app(tokenizer: Tokenizer, engine: FakeEngineClient) -> Quart:
    return make_app(tokenizer, engine)


async def get_document(app: Quart, **headers: str) -> dict[str, Any]:
    response = await app.test_client().get("/openapi.json", headers=headers)
    assert (response.status_code, response.content_type) == (200, "application/json")
    return await response.get_json()


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    """For a schema of the document, which may refer to its components."""
    return Draft202012Validator(schema | {"components": document["components"]})


# --- the document ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"api_keys": ("k",)},
        {"unknown_fields": "ignore"},
        {"root_path": "/llm"},
        {"request_chat_template": False},
    ],
    ids=str,
)
async def test_it_is_valid_openapi_3_1(tokenizer: Tokenizer, engine: FakeEngineClient, config: Any) -> None:
    app = make_app(tokenizer, engine, **config)
    document = await get_document(app, Authorization="Bearer k")
    assert document["openapi"].startswith("3.1.")
    assert document["servers"] == [{"url": config.get("root_path", "/")}]
    assert document["info"]["version"] == jaxserve.__version__
    OpenAPIV31SpecValidator(document).validate()
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


async def test_profiles_are_in_it_where_they_are_served(
    tokenizer: Tokenizer, engine: FakeEngineClient, app: Quart
) -> None:
    profiling = make_app(tokenizer, engine, profile_dir="traces")
    added = (await get_document(profiling))["paths"].keys() - (await get_document(app))["paths"].keys()
    assert added == {"/start_profile", "/stop_profile"}


async def test_every_route_is_in_it_and_nothing_else(app: Quart) -> None:
    routes = set()
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<model_id:model_id>", "{model_id}")
        assert "<" not in path
        routes |= {(path, method.lower()) for method in rule.methods or () if method != "HEAD"}
    paths = (await get_document(app))["paths"]
    assert {(path, method) for path, methods in paths.items() for method in methods} == routes


async def test_operations_have_their_own_names(app: Quart) -> None:
    paths = (await get_document(app))["paths"]
    names = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(set(names)) == len(names)


async def test_every_component_is_used(app: Quart) -> None:
    document = await get_document(app)
    text = json.dumps(document)
    for kind, components in document["components"].items():
        for name in components:
            assert f'"#/components/{kind}/{name}"' in text, name


async def test_keys_are_asked_for_where_they_are_needed(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    without = await get_document(make_app(tokenizer, engine))
    assert "security" not in without
    assert "securitySchemes" not in without["components"]
    assert "401" not in without["paths"][CHAT]["post"]["responses"]
    app = make_app(tokenizer, engine, api_keys=("k",))
    assert (await app.test_client().get("/openapi.json")).status_code == 401
    assert (await app.test_client().get("/docs")).status_code == 401
    document = await get_document(app, Authorization="Bearer k")
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert document["security"] == [{"key": []}]
    without_key = {
        path
        for path, methods in document["paths"].items()
        for operation in methods.values()
        if operation.get("security") == []
    }
    assert without_key == {"/health", "/health/live", "/health/ready", "/ping", "/version"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert ("401" in operation["responses"]) is (path not in without_key)


async def test_there_is_no_document_while_the_model_loads(app: Quart, engine: FakeEngineClient) -> None:
    engine.error = EngineDeadError("gone")
    for path in ("/openapi.json", "/docs"):
        assert (await app.test_client().get(path)).status_code == 503


async def test_it_can_be_turned_off(tokenizer: Tokenizer, engine: FakeEngineClient) -> None:
    client = make_app(tokenizer, engine, disable_docs=True).test_client()
    for path in ("/openapi.json", "/docs"):
        response = await client.get(path)
        assert (response.status_code, (await response.get_json())["error"]["code"]) == (404, "not_found")
    assert (await client.get("/v1/models")).status_code == 200


# --- the page -------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags that are never closed, ids, links and everything that would be fetched."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if attributes.get("id"):
            self.ids.append(attributes["id"] or "")
        if tag == "a":
            self.links.append(attributes["href"] or "")
        elif "src" in attributes or "href" in attributes:
            self.fetched.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


async def test_the_page_shows_everything_and_fetches_nothing(app: Quart) -> None:
    document = await get_document(app)
    response = await app.test_client().get("/docs")
    assert (response.status_code, response.content_type) == (200, "text/html; charset=utf-8")
    text = (await response.get_data()).decode()
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert not page.tags & {"script", "iframe", "img", "link", "object", "embed"}
    assert "url(" not in text
    assert "@import" not in text
    assert len(set(page.ids)) == len(page.ids)
    names = [operation["operationId"] for m in document["paths"].values() for operation in m.values()]
    assert set(page.ids) == {*names, *document["components"]["schemas"]}
    assert set(page.links) == {"/openapi.json", *(f"#{name}" for name in page.ids)}
    for schema in document["components"]["schemas"].values():
        for name in schema.get("properties", ()):
            assert f"<code>{name}</code>" in text
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'"
    assert response.headers["Content-Security-Policy"] == policy


async def test_the_page_escapes_what_comes_from_the_command_line(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    app = make_app(tokenizer, engine, served_model_names=("</pre><script>alert(1)</script>",))
    text = (await (await app.test_client().get("/docs")).get_data()).decode()
    assert "alert(1)" in text
    assert "<script" not in text


# --- what is accepted -----------------------------------------------------------------------------------------

# that logit_bias has keys of the vocabulary is the one rule about a single field that no schema can express
EVERY_ID = ProtocolConfig(model_names=(MODEL,), vocab_size=10**20, max_model_len=64)
BIAS = Table(
    tuple(field for field in completion_table(EVERY_ID).fields if field.name == "logit_bias"),
    {"logit_bias": "."},
)
TABLES = {
    "logit_bias": (BIAS, {}),
    "chat": (chat_table(PROTOCOL), {"model": "m", "messages": HELLO}),
    "completion": (completion_table(PROTOCOL), {"model": "m", "prompt": "hi"}),
    "tokenize a text": (TOKENIZE_TEXT, {"prompt": "hi"}),
    "tokenize messages": (tokenize_messages_table(PROTOCOL), {"messages": HELLO}),
    "detokenize": (detokenize_table(PROTOCOL), {"tokens": []}),
}
VALIDATORS = {name: Draft202012Validator(table.json_schema()) for name, (table, _) in TABLES.items()}
FIELDS = [
    (name, field.name)
    for name, (table, _) in TABLES.items()
    for field in table.fields
    if name == "logit_bias" or field.name != "logit_bias"
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXT | st.from_regex(r"\A[0-9]{1,4}\Z"), inner, max_size=3)
    ),
    max_leaves=6,
)


def accepts(table: Table, body: dict[str, Any]) -> bool:
    """Whether the body is fine but for rules between fields."""
    try:
        table.check(table.convert(body, "", UnknownFields()), "")
    except RequestError:
        return False
    return True


def near(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the schema allows, and their neighbours that it does not."""
    if "anyOf" in schema or "oneOf" in schema:
        return st.one_of([near(branch) for branch in schema.get("anyOf", schema.get("oneOf"))])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "integer" | "number":
            lower, upper = schema.get("minimum", schema.get("exclusiveMinimum")), schema["maximum"]
            edges = [lower - 1, lower, lower + 1, upper - 1, upper, upper + 1, float(lower), lower + 0.5]
            finite = [edge for edge in edges if isinstance(edge, int) or math.isfinite(edge)]
            return st.sampled_from(finite) | st.integers(-5, 5) | st.floats(-5, 5)
        case "string":
            few, many = schema.get("minLength", 0), schema.get("maxLength", 2)
            return TEXT | st.sampled_from(["a" * n for n in (few - 1, few, many, many + 1, 129)])
        case "array":
            few, many = schema.get("minItems", 0), schema.get("maxItems", 2)
            lists = st.lists(near(schema["items"]), max_size=3)
            if many > 200:
                return lists
            return lists | near(schema["items"]).flatmap(
                lambda member: st.sampled_from([[member] * n for n in (max(0, few - 1), few, many, many + 1)])
            )
        case "object" if "properties" in schema:
            members = {name: near(member) for name, member in schema["properties"].items()}
            required = {name: members.pop(name) for name in schema["required"]}
            whole = st.fixed_dictionaries(required, optional=dict(list(members.items())))
            return whole | st.tuples(whole, st.sampled_from([*required, "more"])).map(_changed)
        case "object":
            inner = schema.get("additionalProperties")
            keys = st.from_regex(r"\A[0-9]{1,3}\Z") | TEXT | st.sampled_from(["tools", "_x", "messages"])
            return st.dictionaries(keys, near(inner) if isinstance(inner, dict) else JSON, max_size=17)
    return JSON


def _changed(change: tuple[dict[str, Any], str]) -> dict[str, Any]:
    """Without one of its members, or with one that it must not have."""
    value, name = change
    return (
        {key: member for key, member in value.items() if key != name} if name in value else value | {name: 1}
    )


@pytest.mark.parametrize(("table_name", "field"), FIELDS, ids=lambda name: name)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_field_is_accepted_exactly_if_its_schema_allows_it(
    table_name: str, field: str, data: st.DataObject
) -> None:
    (table, body), validator = TABLES[table_name], VALIDATORS[table_name]
    known = validator.schema["properties"].get(field)
    value = data.draw(JSON if known is None else near(known) | JSON)
    body = body | {field: value}
    if known is None and value is None:
        return  # null is absence, also of a field that is not served
    assert accepts(table, body) == validator.is_valid(body), body


@pytest.mark.parametrize("maximum", [0, 7, 9, 10, 99, 100, 259, 1009, 2000])
def test_a_pattern_matches_the_decimal_numbers_up_to_its_maximum(maximum: int) -> None:
    pattern = re.compile(decimal_pattern(maximum))
    matched = [number for number in range(12_000) if pattern.search(str(number))]
    assert matched == list(range(maximum + 1))
    assert pattern.search(f"00{maximum}")
    for text in ("", "-1", "+1", "1.0", " 1", "a"):
        assert not pattern.search(text)


def test_fields_that_are_not_served_are_not_in_it() -> None:
    for table, _ in TABLES.values():
        described = table.json_schema()["properties"]
        for field in table.fields:
            neutral = () if field.refusal is None else field.refusal.neutral
            assert (field.name in described) is (field.refusal is None or bool(neutral)), field.name
    properties = chat_table(PROTOCOL).json_schema()["properties"]
    assert "vllm_xargs" not in properties
    assert properties["priority"]["anyOf"] == [{"enum": [0]}, {"type": "null"}]


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, list):
        for member in schema:
            yield from _objects(member)
    elif isinstance(schema, dict):
        if "properties" in schema and "additionalProperties" in schema:
            yield schema
        for member in schema.values():
            yield from _objects(member)


def test_every_request_field_says_what_it_does() -> None:
    for table, _ in TABLES.values():
        for schema in _objects(table.json_schema()):
            for name, member in schema["properties"].items():
                assert member["description"][-1] in ".", name


def test_defaults_are_the_servers_own() -> None:
    config = ProtocolConfig(
        model_names=("m",), vocab_size=V, max_model_len=64, temperature=0.6, top_k=40, max_logprobs=5
    )
    properties = completion_table(config).json_schema()["properties"]
    assert properties["temperature"]["default"] == 0.6
    assert properties["top_k"]["default"] == 40
    assert properties["max_tokens"]["default"] == 16
    assert properties["logprobs"]["anyOf"][0]["maximum"] == 5
    assert "default" not in properties["seed"]


async def test_where_unknown_fields_are_dropped_the_schemas_are_open(
    tokenizer: Tokenizer, engine: FakeEngineClient
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi", "mood": "good"}], "more": 1}
    for mode, status in (("reject", 400), ("ignore", 200)):
        app = make_app(tokenizer, engine, unknown_fields=mode)
        document = await get_document(app)
        schema = document["components"]["schemas"]["ChatCompletionRequest"]
        assert validator(document, schema).is_valid(body) is (status == 200)
        assert (await app.test_client().post(CHAT, json=body)).status_code == status
        refused = body | {"vllm_xargs": {}}
        assert not validator(document, schema).is_valid(refused)
        assert (await app.test_client().post(CHAT, json=refused)).status_code == 400


async def test_its_examples_are_valid_and_served(app: Quart) -> None:
    document = await get_document(app)
    num_examples = 0
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if "requestBody" not in operation:
                continue
            media = operation["requestBody"]["content"]["application/json"]
            assert media["examples"], path
            for example in media["examples"].values():
                num_examples += 1
                validator(document, media["schema"]).validate(example["value"])
                response = await app.test_client().post(path, json=example["value"])
                assert response.status_code == 200, (path, await response.get_data())
    assert num_examples >= 6


# --- what is answered -----------------------------------------------------------------------------------------


async def check_response(
    app: Quart, document: dict[str, Any], path: str, body: Any = None, *, template: str = "", method: str = ""
) -> tuple[int, Any]:
    """Ask, and compare the answer with the document; its status and value (of a stream: its events)."""
    method = method or ("get" if body is None else "post")
    response = await app.test_client().open(
        path, method=method.upper(), **({} if body is None else {"json": body})
    )
    data = await response.get_data()
    described = document["paths"][template or path][method]["responses"][str(response.status_code)]
    if "$ref" in described:
        described = document["components"]["responses"][described["$ref"].rpartition("/")[2]]
    for name in described["headers"]:
        header = document["components"]["headers"][name]
        assert name in response.headers or not header.get("required"), name
        if name in response.headers:
            value: Any = response.headers[name]
            value = int(value) if header["schema"]["type"] == "integer" else value
            Draft202012Validator(header["schema"]).validate(value)
    schema = described["content"][response.mimetype]["schema"]
    if response.mimetype == "text/event-stream":
        *events, last = data.decode().removesuffix("\n\n").split("\n\n")
        assert last == "data: [DONE]"
        values = [json.loads(event.removeprefix("data: ")) for event in events]
        for data in ("[DONE]", *map(json.dumps, values)):
            validator(document, schema).validate({"data": data})
        content = schema["properties"]["data"]["anyOf"][0]["contentSchema"]
        for value in values:
            validator(document, content).validate(value)
        return response.status_code, values
    value = json.loads(data) if response.mimetype == "application/json" else data.decode()
    validator(document, schema).validate(value)
    return response.status_code, value


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3},
        {"echo": True},
        {"logprobs": 2},
        {"logprobs": 2, "echo": True},
        {"logprobs": 0, "return_tokens_as_token_ids": True},
        {"return_token_ids": True, "n": 2},
        {"prompt_logprobs": 2},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
        {"stop": "e"},
        {"stop_token_ids": [ord("e")]},
        {"best_of": 3},
        {"use_beam_search": True, "best_of": 2},
        {"include_usage": True},
        {"include_usage": True, "continuous_usage_stats": True},
    ],
    ids=str,
)
async def test_generation_answers_as_described(
    app: Quart, path: str, stream: bool, options: dict[str, Any]
) -> None:
    body = {"model": MODEL, "stream": stream} | options
    usage = {name: body.pop(name) for name in ("include_usage", "continuous_usage_stats") if name in body}
    if usage and stream:
        body["stream_options"] = usage
    if path == CHAT:
        body["messages"] = [*HELLO, {"role": "assistant", "content": "well"}]
        if "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    else:
        body["prompt"] = "abc"
    status, value = await check_response(app, await get_document(app), path, body)
    refused_in_streams = {"prompt_logprobs", "best_of", "use_beam_search"} & options.keys()
    impossible = (stream and refused_in_streams) or (path == CHAT and options.get("max_tokens") == 0)
    assert status == (400 if impossible else 200), value


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{}, {"logprobs": True, "n": 2}, {"return_token_ids": True}], ids=str)
async def test_answers_with_calls_are_as_described(app: Quart, stream: bool, options: dict[str, Any]) -> None:
    function = {"type": "function", "function": {"name": "f"}}
    body = {"model": MODEL, "messages": HELLO, "stream": stream, "tools": [function], "tool_choice": function}
    status, value = await check_response(app, await get_document(app), CHAT, body | options)
    assert status == 200
    assert "tool_calls" in json.dumps(value)


async def test_everything_else_answers_as_described(app: Quart) -> None:
    document = await get_document(app)
    model = "/v1/models/{model_id}"
    for path in set(document["paths"]) - {model, CHAT, COMPLETION, "/tokenize", "/detokenize"}:
        for method in document["paths"][path]:
            assert (await check_response(app, document, path, method=method))[0] == 200, path
    assert (await check_response(app, document, f"/v1/models/{MODEL}", template=model))[0] == 200
    assert (await check_response(app, document, "/v1/models/none", template=model))[0] == 404
    for body in ({"prompt": "hi"}, {"messages": HELLO}, {"prompt": "hi", "return_token_strs": True}):
        assert (await check_response(app, document, "/tokenize", body))[0] == 200
    assert (await check_response(app, document, "/detokenize", {"tokens": [104, 105]}))[0] == 200


async def test_errors_are_as_described(app: Quart, engine: FakeEngineClient) -> None:
    document = await get_document(app)
    for path in (CHAT, COMPLETION, "/tokenize", "/detokenize"):
        assert (await check_response(app, document, path, {}))[0] == 400
        assert (await check_response(app, document, path, {"model": MODEL, "n": []}))[0] == 400
        assert (await check_response(app, document, path, {"model": "no", "prompt": "a", "tokens": []}))[
            0
        ] in (400, 404)
    engine.error = EngineDeadError("gone")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if "503" in operation["responses"] and path not in ("/load", "/metrics"):
                asked = path.replace("{model_id}", MODEL)
                body = {} if "requestBody" in operation else None
                status, _ = await check_response(app, document, asked, body, template=path, method=method)
                assert status == 503


async def test_errors_of_http_itself_are_as_described(tokenizer: Tokenizer, engine: FakeEngineClient) -> None:
    app = make_app(tokenizer, engine, api_keys=("k",), max_body_bytes=100, max_num_queued_reqs=1)
    document = await get_document(app, Authorization="Bearer k")
    key, json_type = {"Authorization": "Bearer k"}, {"Content-Type": "application/json"}
    body = json.dumps({"model": MODEL, "prompt": "a"}).encode()
    engine.fixed_load = EngineLoad(num_waiting_requests=9, num_sequences=99)
    for status, headers, data in (
        (401, json_type, body),
        (413, key | json_type, b" " * 101),
        (415, key | {"Content-Type": "text/plain"}, body),
        (429, key | json_type, body),
        (431, key | json_type | {"X-Long": "x" * (16 << 10)}, body),
    ):
        response = await app.test_client().post(COMPLETION, data=data, headers=headers)
        assert response.status_code == status
        described = document["components"]["responses"][f"Error{status}"]
        assert all(name in response.headers for name in described["headers"])
        Draft202012Validator(described["content"]["application/json"]["schema"]).validate(
            await response.get_json()
        )


def test_every_error_code_of_the_source_is_described() -> None:
    known = {code for kind in ERRORS.values() for code in kind.codes} | {"method_not_allowed"}
    root = Path(jaxserve.__file__).parent
    used = set()
    for path in (*root.glob("*.py"), *(root / "api").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                used.add(node.value.value)
    assert len(used) > 12
    assert used <= known


def test_the_document_of_a_configuration_is_made_once() -> None:
    config = DocumentConfig(protocol=PROTOCOL)
    assert openapi_document(config) is openapi_document(DocumentConfig(protocol=PROTOCOL))


def test_the_pages_files_lie_beside_their_module() -> None:
    folder = Path(jaxserve.__file__).parent / "api"
    assert {path.name for path in folder.glob("docs.*")} == {"docs.py", "docs.html", "docs.css"}
