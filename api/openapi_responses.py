"""What the API answers, as JSON Schema: whole responses, stream chunks and errors.

Objects are closed: a key that is not named here is never sent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from jaxserve.api.errors import MAX_MESSAGE_CHARS, MAX_PARAM_CHARS
from jaxserve.api.fields import JsonSchema, array_schema

STRING: JsonSchema = {"type": "string"}
INTEGER: JsonSchema = {"type": "integer"}
NUMBER: JsonSchema = {"type": "number"}
COUNT: JsonSchema = {"type": "integer", "minimum": 0}
TOKEN_IDS = array_schema(COUNT)
NULL: JsonSchema = {"type": "null"}


def ref(name: str) -> JsonSchema:
    """A reference to a component."""
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(schema: JsonSchema) -> JsonSchema:
    return {"anyOf": [schema, NULL]}


def about(schema: JsonSchema, description: str) -> JsonSchema:
    return schema | {"description": description}


def closed_object(properties: Mapping[str, JsonSchema], optional: Collection[str] = ()) -> JsonSchema:
    """An object with these keys and no others; all are there but for the optional ones."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


# --- errors ---------------------------------------------------------------------------------------------------


class ErrorKind(NamedTuple):
    """One status, as contract and `api.errors` have it."""

    type: str
    codes: tuple[str, ...]
    when: str


ERRORS: Mapping[int, ErrorKind] = {
    400: ErrorKind(
        "invalid_request_error",
        (
            "invalid_json",
            "missing_required_parameter",
            "unknown_parameter",
            "unsupported_parameter",
            "unsupported_value",
            "invalid_type",
            "invalid_value",
            "context_length_exceeded",
            "invalid_constraint",
            "constraint_too_complex",
            "invalid_template",
        ),
        "The body is no valid request; `param` is the path of the field at fault.",
    ),
    401: ErrorKind("authentication_error", ("invalid_api_key",), "The API key is missing or wrong."),
    404: ErrorKind("not_found_error", ("model_not_found", "not_found"), "There is no such model or path."),
    408: ErrorKind(
        "timeout_error", ("request_timeout",), "The body did not come in time, or no token within the limit."
    ),
    413: ErrorKind("invalid_request_error", ("request_too_large",), "The body is too large."),
    415: ErrorKind(
        "invalid_request_error", ("unsupported_media_type",), "The body is no `application/json` in UTF-8."
    ),
    429: ErrorKind("rate_limit_error", ("queue_full",), "Too many requests are waiting; try again later."),
    431: ErrorKind("invalid_request_error", ("request_too_large",), "The header block is too large."),
    500: ErrorKind("server_error", ("internal_error",), "The server failed on this request."),
    503: ErrorKind(
        "service_unavailable_error",
        ("starting", "draining", "engine_dead", "engine_stalled", "too_many_connections"),
        "The server cannot serve requests now.",
    ),
}


def error_schema(kinds: Collection[ErrorKind]) -> JsonSchema:
    """The one shape of every error, for some of their kinds."""
    codes = dict.fromkeys(code for kind in kinds for code in kind.codes)
    error = {
        "message": about(STRING | {"maxLength": MAX_MESSAGE_CHARS}, "What is wrong and what is allowed."),
        "type": {"enum": list(dict.fromkeys(kind.type for kind in kinds))},
        "param": about(
            nullable(STRING | {"maxLength": MAX_PARAM_CHARS}), "Path of the field at fault in the body."
        ),
        "code": {"enum": list(codes)},
    }
    return closed_object({"error": closed_object(error)})


# --- what generation answers have in common -------------------------------------------------------------------

USAGE = closed_object(
    {
        "prompt_tokens": about(COUNT, "Each prompt once, whatever n."),
        "completion_tokens": about(COUNT, "Of all returned choices."),
        "total_tokens": about(COUNT, "The sum of both."),
        "prompt_tokens_details": closed_object(
            {"cached_tokens": about(COUNT, "Prompt tokens found in the prefix cache.")}
        ),
    }
)
PROMPT_LOGPROBS = array_schema(
    nullable(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": closed_object(
                {
                    "logprob": NUMBER,
                    "rank": about(INTEGER | {"minimum": 1}, "1 + the number of likelier tokens."),
                    "decoded_token": STRING,
                }
            ),
        }
    )
)
_STOP_REASON = about(
    {"anyOf": [STRING, COUNT, NULL]}, "The stop string or the stop token's id that ended the choice."
)
_TOKEN_IDS = about(TOKEN_IDS, "With return_token_ids.")
_PROMPT_TOKEN_IDS = about(TOKEN_IDS, "With return_token_ids.")
_USAGE_SO_FAR = about(
    nullable(ref("Usage")),
    "With include_usage: null, or the usage so far (continuous_usage_stats); in the last chunk all of it.",
)


def _envelope(object_name: str, id_prefix: str) -> dict[str, JsonSchema]:
    return {
        "id": {"type": "string", "pattern": f"^{id_prefix}-"},
        "object": {"const": object_name},
        "created": about(COUNT, "Unix seconds of the request's arrival."),
        "model": about(STRING, "The first served name."),
        "system_fingerprint": STRING,
    }


def _finish_reason(*more: str) -> JsonSchema:
    return {"enum": ["stop", "length", *more]}


# --- /v1/completions ------------------------------------------------------------------------------------------


def _completion_schemas() -> dict[str, JsonSchema]:
    logprobs = closed_object(
        {
            "text_offset": array_schema(COUNT),
            "token_logprobs": array_schema(nullable(NUMBER)),
            "tokens": array_schema(STRING),
            "top_logprobs": array_schema(nullable({"type": "object", "additionalProperties": NUMBER})),
        }
    )
    choice = {
        "index": about(COUNT, "The prompt's index · n + the choice's."),
        "text": STRING,
        "logprobs": nullable(ref("CompletionLogprobs")),
        "finish_reason": _finish_reason(),
        "stop_reason": _STOP_REASON,
    }
    token_ids = {"token_ids": _TOKEN_IDS, "prompt_token_ids": _PROMPT_TOKEN_IDS}
    whole = choice | {"prompt_logprobs": nullable(ref("PromptLogprobs"))} | token_ids
    piece = choice | {"finish_reason": nullable(_finish_reason())} | token_ids
    envelope = _envelope("text_completion", "cmpl")
    chunk_choices = array_schema(closed_object(piece, token_ids), 0, 1)
    return {
        "CompletionLogprobs": about(logprobs, "Four arrays of the same length, one member a token."),
        "Completion": closed_object(
            envelope | {"choices": array_schema(closed_object(whole, token_ids), 1), "usage": ref("Usage")}
        ),
        "CompletionChunk": closed_object(
            envelope | {"choices": chunk_choices, "usage": _USAGE_SO_FAR}, ["usage"]
        ),
    }


# --- /v1/chat/completions -------------------------------------------------------------------------------------


def _chat_logprobs() -> JsonSchema:
    byte = {"type": "integer", "minimum": 0, "maximum": 255}
    token = {"token": STRING, "logprob": NUMBER, "bytes": array_schema(byte)}
    entry = token | {"top_logprobs": array_schema(closed_object(token))}
    return closed_object({"content": array_schema(closed_object(entry))})


def _tool_call(*, in_stream: bool) -> JsonSchema:
    function = closed_object({"name": STRING, "arguments": STRING}, ["name"] if in_stream else ())
    call = {"id": STRING, "type": {"const": "function"}, "function": function}
    if not in_stream:
        return closed_object(call)
    return closed_object({"index": COUNT} | call, ["id", "type"])


def _chat_schemas(*, tools: bool) -> dict[str, JsonSchema]:
    """`tools`: whether the server calls functions."""
    content = nullable(STRING) if tools else STRING
    calls = {"tool_calls": array_schema(ref("ToolCall"), 1)} if tools else {}
    call_chunks = {"tool_calls": array_schema(ref("ToolCallChunk"), 1)} if tools else {}
    finish_reason = _finish_reason("tool_calls") if tools else _finish_reason()
    message = closed_object({"role": STRING, "content": content, "refusal": NULL} | calls, calls)
    delta = {"role": STRING, "content": content} | call_chunks
    choice = {
        "index": COUNT,
        "message": message,
        "logprobs": nullable(ref("ChatLogprobs")),
        "finish_reason": finish_reason,
        "stop_reason": _STOP_REASON,
        "token_ids": _TOKEN_IDS,
    }
    piece = {
        "index": COUNT,
        "delta": closed_object(delta, delta),
        "logprobs": nullable(ref("ChatLogprobs")),
        "finish_reason": nullable(finish_reason),
        "stop_reason": about(_STOP_REASON, "In the last chunk of a choice: what ended it."),
        "token_ids": _TOKEN_IDS,
    }
    whole = {
        "choices": array_schema(closed_object(choice, ["token_ids"]), 1),
        "usage": ref("Usage"),
        "prompt_logprobs": nullable(ref("PromptLogprobs")),
        "prompt_token_ids": _PROMPT_TOKEN_IDS,
    }
    chunk = {
        "choices": array_schema(closed_object(piece, ["stop_reason", "token_ids"]), 0, 1),
        "usage": _USAGE_SO_FAR,
        "prompt_token_ids": about(TOKEN_IDS, "In the first chunk, with return_token_ids."),
    }
    schemas = {
        "ChatLogprobs": _chat_logprobs(),
        "ChatCompletion": closed_object(
            _envelope("chat.completion", "chatcmpl") | whole, ["prompt_token_ids"]
        ),
        "ChatCompletionChunk": closed_object(
            _envelope("chat.completion.chunk", "chatcmpl") | chunk, ["usage", "prompt_token_ids"]
        ),
    }
    if tools:
        schemas |= {"ToolCall": _tool_call(in_stream=False), "ToolCallChunk": _tool_call(in_stream=True)}
    return schemas


# --- everything else ------------------------------------------------------------------------------------------


def _model_schemas() -> dict[str, JsonSchema]:
    flags = ("create_engine", "sampling", "logprobs", "search_indices", "view", "fine_tuning")
    permission = closed_object(
        {
            "id": {"type": "string", "pattern": "^modelperm-"},
            "object": {"const": "model_permission"},
            "created": COUNT,
            **{f"allow_{flag}": {"type": "boolean"} for flag in flags},
            "organization": STRING,
            "group": nullable(STRING),
            "is_blocking": {"type": "boolean"},
        }
    )
    card = closed_object(
        {
            "id": about(STRING, "A served name."),
            "object": {"const": "model"},
            "created": about(COUNT, "Unix seconds of the server's start."),
            "owned_by": {"const": "jaxserve"},
            "root": about(STRING, "The first served name."),
            "parent": NULL,
            "max_model_len": about(COUNT, "Tokens that a prompt and its output may have together."),
            "permission": array_schema(permission),
        }
    )
    models = closed_object({"object": {"const": "list"}, "data": array_schema(ref("Model"), 1)})
    return {"Model": card, "ModelList": models}


def _small_schemas() -> dict[str, JsonSchema]:
    return {
        "Tokenization": closed_object(
            {
                "count": COUNT,
                "max_model_len": COUNT,
                "tokens": TOKEN_IDS,
                "token_strs": about(nullable(array_schema(STRING)), "With return_token_strs."),
            }
        ),
        "Detokenization": closed_object({"prompt": STRING}),
        "Healthy": closed_object({"status": {"const": "ok"}}),
        "Version": closed_object({"version": STRING}),
        "Load": closed_object({"server_load": about(COUNT, "Generation requests that have not ended.")}),
    }


def response_schemas(*, tools: bool) -> dict[str, JsonSchema]:
    """Components by name; `tools`: whether the server calls functions."""
    in_streams = [ERRORS[status] for status in (408, 500, 503)]
    return {
        **_completion_schemas(),
        **_chat_schemas(tools=tools),
        "Usage": USAGE,
        "PromptLogprobs": about(
            PROMPT_LOGPROBS,
            "For each prompt token, by token id: itself and the likeliest; null for the first.",
        ),
        "StreamError": about(error_schema(in_streams), "The engine failed after the stream had begun."),
        **_model_schemas(),
        **_small_schemas(),
    }
