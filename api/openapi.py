"""The API's own description, OpenAPI 3.1: made from the request tables and the response schemas."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import orjson

import jaxserve
from jaxserve.api.auth import OPEN_ROUTES
from jaxserve.api.fields import JsonSchema, Table
from jaxserve.api.openapi_responses import ERRORS, error_schema, ref, response_schemas
from jaxserve.api.request_tables import (
    TOKENIZE_TEXT,
    ProtocolConfig,
    chat_table,
    completion_table,
    detokenize_table,
    tokenize_messages_table,
)

Json = dict[str, Any]
REQUEST_ID_PATTERN = "^[A-Za-z0-9._:-]{1,128}$"
ABOUT = (
    "OpenAI's API for large language models, served by jaxserve. A field that is accepted takes effect; what "
    "cannot be served is refused before the response begins. HEAD works wherever GET does; another method is a 405 "
    "with Allow, an unknown path a 404. Some rules hold "
    "between fields (n and best_of, stream and stream_options, the length of prompt and output): breaking one is "
    "a 400 that names the field, although the body is valid under its schema."
)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path.

    Attributes:
        request: component of the body's schema; None: there is no body.
        response: component of a successful response; None: it is text of `media_type`.
        chunk: component of the events, where the response may be a stream.
        errors: statuses that it may end with, beside those of every operation.
        examples: bodies, by what they show.
    """

    path: str
    method: Literal["get", "post"]
    name: str
    summary: str
    tag: str
    request: str | None = None
    response: str | None = None
    media_type: str = "application/json"
    chunk: str | None = None
    errors: tuple[int, ...] = ()
    parameters: tuple[Json, ...] = ()
    examples: dict[str, Json] = field(default_factory=dict)


BODY_ERRORS = (400, 404, 408, 413, 415, 503)


def _generation(**options: Any) -> Operation:
    return Operation(method="post", tag="Generation", errors=(*BODY_ERRORS, 429), **options)


def _get(
    path: str, name: str, summary: str, tag: str, response: str | None = None, **options: Any
) -> Operation:
    return Operation(
        path=path, method="get", name=name, summary=summary, tag=tag, response=response, **options
    )


def _operations(model: str) -> tuple[Operation, ...]:
    """Every operation of the server; examples use the model's name."""
    messages = [{"role": "user", "content": "Hello!"}]
    healthy = "200 only if requests are served and the engine makes progress."
    return (
        _generation(
            path="/v1/chat/completions",
            name="createChatCompletion",
            summary="Continue a conversation.",
            request="ChatCompletionRequest",
            response="ChatCompletion",
            chunk="ChatCompletionChunk",
            examples={
                "Conversation": {"model": model, "messages": messages},
                "Choice": {"model": model, "messages": messages, "guided_choice": ["positive", "negative"]},
                "Tool": {
                    "model": model,
                    "messages": messages,
                    "tools": [
                        {"type": "function", "function": {"name": "greet", "description": "Say hello."}}
                    ],
                    "tool_choice": {"type": "function", "function": {"name": "greet"}},
                },
                "Stream": {
                    "model": model,
                    "messages": messages,
                    "max_tokens": 8,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                },
            },
        ),
        _generation(
            path="/v1/completions",
            name="createCompletion",
            summary="Continue one or more prompts.",
            request="CompletionRequest",
            response="Completion",
            chunk="CompletionChunk",
            examples={
                "Text": {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0},
                "Stream": {"model": model, "prompt": ["One", "Two"], "max_tokens": 8, "stream": True},
            },
        ),
        _get(
            "/v1/models", "listModels", "A card for every served name.", "Models", "ModelList", errors=(503,)
        ),
        _get(
            "/v1/models/{model_id}",
            "retrieveModel",
            "The card of one served name.",
            "Models",
            "Model",
            errors=(404, 503),
            parameters=(
                {
                    "name": "model_id",
                    "in": "path",
                    "required": True,
                    "description": "The name; its slashes may be sent raw or as %2F.",
                    "schema": {"type": "string", "minLength": 1},
                    "example": model,
                },
            ),
        ),
        Operation(
            path="/tokenize",
            method="post",
            name="tokenize",
            summary="Token ids of a text or a conversation, as generation would feed them to the model.",
            tag="Tokenizer",
            request="TokenizeRequest",
            response="Tokenization",
            errors=BODY_ERRORS,
            examples={"Text": {"prompt": "Hello!"}, "Conversation": {"messages": messages}},
        ),
        Operation(
            path="/detokenize",
            method="post",
            name="detokenize",
            summary="The text of token ids.",
            tag="Tokenizer",
            request="DetokenizeRequest",
            response="Detokenization",
            errors=BODY_ERRORS,
            examples={"Ids": {"tokens": [1, 2, 3]}},
        ),
        _get("/health", "health", healthy, "Server", "Healthy", errors=(503,)),
        _get(
            "/health/live",
            "live",
            "200 unless the engine is dead or has stalled.",
            "Server",
            "Healthy",
            errors=(503,),
        ),
        _get("/health/ready", "ready", "200 once requests are served.", "Server", "Healthy", errors=(503,)),
        _get("/ping", "ping", "The same as /health.", "Server", "Healthy", errors=(503,)),
        Operation(
            path="/ping",
            method="post",
            name="postPing",
            summary="The same as /health; a body is not read.",
            tag="Server",
            response="Healthy",
            errors=(503,),
        ),
        _get("/version", "version", "The version of the server.", "Server", "Version"),
        _get("/load", "load", "Generation requests that have not ended.", "Server", "Load", errors=(503,)),
        _get(
            "/metrics",
            "metrics",
            "Metrics in Prometheus' text format.",
            "Server",
            media_type="text/plain",
            errors=(503,),
        ),
        _get("/openapi.json", "openapi", "This document.", "Server", "OpenApiDocument", errors=(503,)),
        _get("/docs", "docs", "This document as a page.", "Server", media_type="text/html", errors=(503,)),
    )


_PROFILING = tuple(
    Operation(
        path=f"/{verb}_profile",
        method="post",
        name=f"{verb}Profile",
        summary=summary,
        tag="Server",
        response="Healthy",
        errors=(400, 503),
    )
    for verb, summary in (
        ("start", "Begin a trace of the engine process; a body is not read."),
        ("stop", "End the trace; answered once it is on the disk. A body is not read."),
    )
)


@dataclass(frozen=True, kw_only=True)
class DocumentConfig:
    """What the document depends on.

    Attributes:
        root_path: path under which a proxy shows the server.
        needs_key: whether API keys are set.
        profiles: whether the engine can be traced.
    """

    protocol: ProtocolConfig
    root_path: str = ""
    needs_key: bool = False
    profiles: bool = False


@lru_cache(maxsize=4)
def openapi_document(config: DocumentConfig) -> Json:
    """The whole document. It is shared: do not change it."""
    protocol = config.protocol
    chat = chat_table(protocol)
    schemas = _request_schemas(protocol, chat) | response_schemas(tools=chat.by_name["tools"].is_served)
    schemas["OpenApiDocument"] = {
        "type": "object",
        "properties": {"openapi": {"type": "string", "pattern": r"^3\.1\."}},
        "required": ["openapi", "info", "paths"],
    }
    paths: dict[str, Json] = {}
    operations = _operations(protocol.model_names[0]) + (_PROFILING if config.profiles else ())
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, config)
    responses = {f"Error{status}": _error_response(status) for status in ERRORS}
    responses = _used("responses", responses, paths)
    headers = _used("headers", _HEADERS, [paths, responses])
    components: Json = {"schemas": schemas, "responses": responses, "headers": headers}
    document: Json = {
        "openapi": "3.1.1",
        "info": {"title": "jaxserve", "version": jaxserve.__version__, "description": ABOUT},
        "servers": [{"url": config.root_path or "/"}],
        "paths": paths,
        "components": components,
    }
    if config.needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _request_schemas(protocol: ProtocolConfig, chat: Table) -> dict[str, JsonSchema]:
    text = _body_schema(TOKENIZE_TEXT, protocol)
    messages = _body_schema(tokenize_messages_table(protocol), protocol)
    for schema, other in ((text, "messages"), (messages, "prompt")):
        schema["properties"][other] = {"type": "null", "description": "Give one of both."}
    return {
        "ChatCompletionRequest": _body_schema(chat, protocol),
        "CompletionRequest": _body_schema(completion_table(protocol), protocol),
        "TokenizeRequest": {"anyOf": [text, messages]},
        "DetokenizeRequest": _body_schema(detokenize_table(protocol), protocol),
    }


def _body_schema(table: Table, protocol: ProtocolConfig) -> JsonSchema:
    """Of a table. Where unknown fields are dropped, objects are open, and so must name what is known and refused."""
    schema = table.json_schema()
    if not protocol.ignore_unknown_fields:
        return schema
    refused = [entry.name for entry in table.fields if not entry.is_served]
    schema["properties"] |= {name: {"type": "null", "description": "Not served."} for name in refused}
    opened: JsonSchema = _opened(schema)
    return opened


def _used(kind: str, components: Json, by: Any) -> Json:
    """Those components that `by` refers to."""
    text = orjson.dumps(by).decode()
    return {
        name: component for name, component in components.items() if f'"#/components/{kind}/{name}"' in text
    }


def _opened(schema: Any) -> Any:
    """The schema with its closed objects open."""
    if isinstance(schema, list):
        return [_opened(member) for member in schema]
    if not isinstance(schema, dict):
        return schema
    is_closed = schema.get("additionalProperties") is False
    return {
        key: _opened(member)
        for key, member in schema.items()
        if not (is_closed and key == "additionalProperties")
    }


# --- operations -----------------------------------------------------------------------------------------------

_HEADERS: Json = {
    "X-Request-Id": {
        "description": "The request's own id if it sent a proper one, else a fresh one.",
        "required": True,
        "schema": {"type": "string", "pattern": REQUEST_ID_PATTERN},
    },
    "X-Ignored-Fields": {
        "description": "Paths of unknown fields that were dropped, with commas between them.",
        "schema": {"type": "string"},
    },
    "Retry-After": {
        "description": "Seconds after which to try again.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {
        "description": "How to authenticate.",
        "required": True,
        "schema": {"type": "string", "const": "Bearer"},
    },
}
_ERROR_HEADERS = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
_REQUEST_ID: Json = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "An id for logs and the response: 1 to 128 of A-Z a-z 0-9 . _ : -; anything else is replaced.",
    "schema": {"type": "string"},
}


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *names)}


def _error_response(status: int) -> Json:
    kind = ERRORS[status]
    return {
        "description": kind.when,
        "headers": _headers(*([_ERROR_HEADERS[status]] if status in _ERROR_HEADERS else [])),
        "content": {"application/json": {"schema": error_schema([kind])}},
    }


def _operation(operation: Operation, config: DocumentConfig) -> Json:
    is_open = operation.path in OPEN_ROUTES
    statuses = [*operation.errors, 431, 500, *([401] if config.needs_key and not is_open else [])]
    result: Json = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [operation.tag],
        "parameters": [*operation.parameters, _REQUEST_ID],
        "responses": {
            "200": _success(operation, config),
            **{str(status): {"$ref": f"#/components/responses/Error{status}"} for status in sorted(statuses)},
        },
    }
    if operation.request is not None:
        examples = {name: {"value": value} for name, value in operation.examples.items()}
        media = {"schema": ref(operation.request), "examples": examples}
        result["requestBody"] = {"required": True, "content": {"application/json": media}}
    if config.needs_key and is_open:
        result["security"] = []
    return result


def _success(operation: Operation, config: DocumentConfig) -> Json:
    ignored = operation.request is not None and config.protocol.ignore_unknown_fields
    schema = {"type": "string"} if operation.response is None else ref(operation.response)
    content: Json = {operation.media_type: {"schema": schema}}
    description = "The answer."
    if operation.chunk is not None:
        content["text/event-stream"] = {"schema": _event(operation.chunk)}
        description += " With stream: server-sent events; the schema is that of each event."
    return {
        "description": description,
        "headers": _headers(*(["X-Ignored-Fields"] if ignored else [])),
        "content": content,
    }


def _event(chunk: str) -> JsonSchema:
    """Of each event of the stream."""
    content = {"anyOf": [ref(chunk), ref("StreamError")]}
    json_text = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    return {
        "type": "object",
        "properties": {"data": {"anyOf": [json_text, {"const": "[DONE]"}]}},
        "required": ["data"],
    }
