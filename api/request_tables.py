"""What bodies of this API may hold: one table of fields for each kind of body.

The tables are the whole truth about that: requests are read by them, and `/openapi.json` is made from them.
"""

# ruff: noqa: ARG002  (every kind's `convert` takes the same arguments)

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, get_args

from jaxserve.api import field_texts
from jaxserve.api.fields import (
    Anything,
    Array,
    Boolean,
    ByType,
    Enum,
    Field,
    FreeObject,
    Integer,
    JsonSchema,
    Kind,
    Number,
    Refusal,
    String,
    StringMap,
    Strings,
    Table,
    Tagged,
    TokenIds,
    UnknownFields,
    Values,
    array_schema,
    as_integer,
    check_length,
    check_token_ids,
    json_type,
    missing,
    never,
    to_integers,
    token_id_schema,
    wrong_type,
)
from jaxserve.config import GuidedBackend, SchedulingPolicy, ToolCallParserName
from jaxserve.errors import RequestError
from jaxserve.sampling_params import (
    INT64_MAX,
    INT64_MIN,
    MAX_CHOICES,
    MAX_LOGIT_BIASES,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

MAX_PROMPTS = 1024
MAX_BAD_WORDS, MAX_BAD_WORD_CHARS = 128, 256
MAX_TOOLS = 128
MAX_ROLE_CHARS = 64
MAX_HINT_CHARS = 1024  # user, safety_identifier, prompt_cache_key
MAX_METADATA_PAIRS = 16
MAX_CACHE_SALT_CHARS = 128
DEFAULT_COMPLETION_TOKENS = 16
MAX_TOKEN_ID_CHARS = 20
INTEGER = re.compile(r"-?[0-9]+")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "tokenizer",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)


Prompt = str | list[int]


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """What the tables depend on: the model and the command line.

    Attributes:
        model_names: names that requests may use; the first is the one in responses.
        vocab_size: V.
        max_model_len: L.
        max_logprobs: the most top logprobs that a request may ask for.
        temperature, top_p, top_k, min_p, repetition_penalty: what absence means (the model's generation_config).
        return_tokens_as_token_ids: likewise.
        force_include_usage: every stream reports its usage.
        ignore_unknown_fields: drop unknown fields instead of refusing the request.
        request_chat_template: whether requests may bring templates and variables of their own.
        guided_decoding_backend: what enforces constraints whose requests do not say it.
        tool_call_parser: finds calls in free text; None: `tool_choice` "auto" is not served.
        scheduling_policy: whether requests may have priorities.
    """

    model_names: tuple[str, ...]
    vocab_size: int
    max_model_len: int
    max_logprobs: int = 20
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    return_tokens_as_token_ids: bool = False
    force_include_usage: bool = False
    ignore_unknown_fields: bool = False
    request_chat_template: bool = True
    guided_decoding_backend: GuidedBackend = "auto"
    tool_call_parser: ToolCallParserName | None = None
    scheduling_policy: SchedulingPolicy = "fcfs"


# Kinds of this API's own


@dataclass(frozen=True, kw_only=True)
class PromptKind(Kind):
    """`prompt`: text, texts, token ids, or lists of token ids; converted to a list of prompts."""

    vocab_size: int
    expected = "a string, an array of strings, an array of token ids or an array of arrays of token ids"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> list[Prompt]:
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise wrong_type(at, self.expected, value)
        if not value or all(isinstance(member, str) for member in value):
            return list(value)
        if all(isinstance(member, list) for member in value):
            check_length(at, len(value), 0, MAX_PROMPTS, "prompts")  # before work on each of them
            return [
                ids if set(map(type, ids)) <= {int} else to_integers(ids, f"{at}[{i}]")
                for i, ids in enumerate(value)
            ]
        if as_integer(value[0]) is not None:
            return [to_integers(value, at)]
        kinds = sorted({json_type(member) for member in value[:MAX_PROMPTS]})
        message = f"{at} must be {self.expected}, got an array with {', '.join(kinds)}."
        raise RequestError(message, param=at, code="invalid_type")

    def check(self, value: list[Prompt], at: str) -> None:
        check_length(at, len(value), 0, MAX_PROMPTS, "prompts")
        if not all(value) or not value:
            raise RequestError(f"{at} cannot be empty.", param=at)
        for i, prompt in enumerate(value):
            if not isinstance(prompt, str):
                check_token_ids(prompt, at if len(value) == 1 else f"{at}[{i}]", self.vocab_size)

    def json_schema(self) -> JsonSchema:
        text = {"type": "string", "minLength": 1}
        ids = array_schema(token_id_schema(self.vocab_size), 1)
        return {"anyOf": [text, array_schema(text, 1, MAX_PROMPTS), ids, array_schema(ids, 1, MAX_PROMPTS)]}


@dataclass(frozen=True, kw_only=True)
class LogitBias(Kind):
    """`{"<token id>": bias}`. One message names every key that is at fault."""

    vocab_size: int
    expected = "an object from token ids to numbers"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> dict[str, int | float]:
        if not isinstance(value, dict):
            raise wrong_type(at, self.expected, value)
        for key, bias in value.items():
            if type(bias) is not int and type(bias) is not float:
                error = wrong_type(f"{at}.{key[:20]}", "a number", bias)
                error.param = at
                raise error
        return value

    def check(self, value: dict[str, int | float], at: str) -> None:
        check_length(at, len(value), 0, MAX_LOGIT_BIASES, "entries")
        faults = (
            ("has keys that are no integers", [key for key in value if not INTEGER.fullmatch(key)]),
            (
                f"has token ids outside the vocabulary of {self.vocab_size}",
                [key for key in value if INTEGER.fullmatch(key) and not self._is_token_id(key)],
            ),
            (
                "must have values between -100 and 100; at fault",
                [key for key, bias in value.items() if not -100 <= bias <= 100],
            ),
        )
        found = [f"{what}: {', '.join(key[:20] for key in keys)}" for what, keys in faults if keys]
        if found:
            raise RequestError(f"{at} {'; '.join(found)}.", param=at)

    def json_schema(self) -> JsonSchema:
        return {
            "type": "object",
            "propertyNames": {
                "pattern": decimal_pattern(self.vocab_size - 1),
                "maxLength": MAX_TOKEN_ID_CHARS,
            },
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIASES,
        }

    def _is_token_id(self, key: str) -> bool:
        return len(key) <= MAX_TOKEN_ID_CHARS and 0 <= int(key) < self.vocab_size


def decimal_pattern(maximum: int) -> str:
    """A regular expression for the integers from 0 to `maximum`, with or without zeros in front."""
    digits = str(maximum)
    shorter = [f"[0-9]{{1,{len(digits) - 1}}}"] if len(digits) > 1 else []
    smaller = [
        f"{digits[:i]}[0-{int(digit) - 1}][0-9]{{{len(digits) - i - 1}}}"
        for i, digit in enumerate(digits)
        if digit != "0"
    ]
    return f"^0*(?:{'|'.join([*shorter, *smaller, digits])})$"


# Tables


def _boolean(name: str, default: bool = False, *, refusal: Refusal | None = None) -> Field:
    return Field(name=name, kind=Boolean(), default=default, refusal=refusal)


def _type_field() -> Field:
    return Field(name="type", kind=String(), required=True)


def _text_part(name: str) -> Table:
    return Table((_type_field(), Field(name=name, kind=String(), required=True)), field_texts.TEXT_PART)


CONTENT_PARTS = Tagged(
    {"text": _text_part("text"), "refusal": _text_part("refusal")}, code="unsupported_value"
)
CONTENT = ByType({str: String(), list: Array(member=CONTENT_PARTS, min_items=1, members="parts")})
FUNCTION_CALL = Table(
    (
        Field(name="name", kind=String(min_length=1), required=True),
        Field(name="arguments", kind=String(), required=True),
    ),
    field_texts.FUNCTION_CALL,
)
TOOL_CALL = Table(
    (
        Field(name="id", kind=String(), required=True),
        Field(name="type", kind=Enum(("function",)), required=True),
        Field(name="function", kind=FUNCTION_CALL, required=True),
        Field(name="index", kind=Integer(minimum=0)),
    ),
    field_texts.TOOL_CALL,
)
_NO_MEANING = "is accepted in a message only if it is null or empty."
MESSAGE = Table(
    (
        Field(name="role", kind=String(min_length=1, max_length=MAX_ROLE_CHARS), required=True),
        Field(name="content", kind=CONTENT),
        Field(name="name", kind=String()),
        Field(name="tool_calls", kind=Array(member=TOOL_CALL)),
        Field(name="tool_call_id", kind=String()),
        Field(name="refusal", kind=String()),
        Field(name="annotations", kind=Anything(), refusal=never(_NO_MEANING, [], {}, "")),
        Field(name="audio", kind=Anything(), refusal=never(_NO_MEANING, [], {}, "")),
        Field(name="function_call", kind=Anything(), refusal=never(_NO_MEANING, [], {}, "")),
    ),
    field_texts.MESSAGE,
)


class MessageKind(Kind):
    """One message; content may be missing only beside tool calls of an assistant."""

    expected = "an object"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> Values:
        message = MESSAGE.convert(value, at, unknown)
        if message["content"] is None and not (message["role"] == "assistant" and message["tool_calls"]):
            raise missing(f"{at}.content")
        return message

    def check(self, value: Values, at: str) -> None:
        MESSAGE.check(value, at)

    def json_schema(self) -> JsonSchema:
        with_content = {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}}
        calls = {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}}
        return MESSAGE.json_schema() | {
            "anyOf": [with_content, {"required": list(calls), "properties": calls}]
        }


MESSAGES = Array(member=MessageKind(), min_items=1, members="messages")
DOCUMENTS = Array(member=StringMap(), members="documents")

FUNCTION = Table(
    (
        Field(
            name="name",
            kind=String(pattern=TOOL_NAME, pattern_hint="1 to 64 of A-Z a-z 0-9 _ -"),
            required=True,
        ),
        Field(name="description", kind=String()),
        Field(name="parameters", kind=FreeObject()),
        Field(name="strict", kind=Boolean()),
    ),
    field_texts.FUNCTION,
)
TOOL = Tagged(
    {
        "function": Table(
            (_type_field(), Field(name="function", kind=FUNCTION, required=True)), field_texts.TOOL
        )
    }
)
TOOLS = Array(member=TOOL, min_items=1, max_items=MAX_TOOLS, members="tools")
_NAMED_FUNCTION = Table((Field(name="name", kind=String(), required=True),), field_texts.NAMED_FUNCTION)
_NAMED_TOOL = Table(
    (_type_field(), Field(name="function", kind=_NAMED_FUNCTION, required=True)), field_texts.TOOL_CHOICE
)
_ALLOWED_TOOLS = Table(
    (
        Field(name="mode", kind=Enum(("auto", "required")), required=True),
        Field(
            name="tools",
            kind=Array(member=Tagged({"function": _NAMED_TOOL}), min_items=1, members="tools"),
            required=True,
        ),
    ),
    field_texts.ALLOWED_TOOLS,
)
TOOL_CHOICE = ByType(
    {
        str: Enum(("none", "auto", "required")),
        dict: Tagged(
            {
                "function": _NAMED_TOOL,
                "allowed_tools": Table(
                    (_type_field(), Field(name="allowed_tools", kind=_ALLOWED_TOOLS, required=True)),
                    field_texts.TOOL_CHOICE,
                ),
            }
        ),
    }
)

JSON_SCHEMA = Table(
    (
        Field(name="name", kind=String(min_length=1), required=True),
        Field(name="schema", kind=FreeObject(), required=True),
        Field(name="strict", kind=Boolean()),
        Field(name="description", kind=String()),
    ),
    field_texts.JSON_SCHEMA,
)
RESPONSE_FORMAT = Tagged(
    {
        "text": Table((_type_field(),), field_texts.RESPONSE_FORMAT),
        "json_object": Table((_type_field(),), field_texts.RESPONSE_FORMAT),
        "json_schema": Table(
            (_type_field(), Field(name="json_schema", kind=JSON_SCHEMA, required=True)),
            field_texts.RESPONSE_FORMAT,
        ),
    }
)
SCHEMA_OR_TEXT = ByType({dict: FreeObject(), str: String()})
CHOICES = Strings(min_items=1, member=String(min_length=1), distinct=True)
STRUCTURED_OUTPUTS = Table(
    (
        Field(name="json", kind=SCHEMA_OR_TEXT),
        Field(name="regex", kind=String()),
        Field(name="choice", kind=CHOICES),
        Field(name="grammar", kind=String()),
        Field(name="json_object", kind=Boolean()),
        Field(name="whitespace_pattern", kind=String()),
        _boolean("disable_any_whitespace"),
        _boolean("disable_additional_properties"),
        _boolean("disable_fallback"),
    ),
    field_texts.STRUCTURED_OUTPUTS,
)
PREDICTION = Table(
    (
        Field(name="type", kind=Enum(("content",)), required=True),
        Field(name="content", kind=CONTENT, required=True),
    ),
    field_texts.PREDICTION,
)
STREAM_OPTIONS = Table(
    (
        _boolean("include_usage"),
        _boolean("continuous_usage_stats"),
        _boolean(
            "include_obfuscation",
            refusal=Refusal(
                because="must be false: chunks are not padded here.",
                neutral=(False,),
                code="unsupported_value",
            ),
        ),
    ),
    field_texts.STREAM_OPTIONS,
)


def _sampling_fields(config: ProtocolConfig) -> tuple[Field, ...]:
    return (
        Field(name="temperature", kind=Number(minimum=0, maximum=2), default=config.temperature),
        Field(name="top_p", kind=Number(minimum=0, maximum=1, above_minimum=True), default=config.top_p),
        Field(name="top_k", kind=Integer(minimum=-1), default=config.top_k),
        Field(name="min_p", kind=Number(minimum=0, maximum=1), default=config.min_p),
        Field(name="presence_penalty", kind=Number(minimum=-2, maximum=2), default=0.0),
        Field(name="frequency_penalty", kind=Number(minimum=-2, maximum=2), default=0.0),
        Field(
            name="repetition_penalty",
            kind=Number(minimum=0, above_minimum=True),
            default=config.repetition_penalty,
        ),
        Field(name="logit_bias", kind=LogitBias(vocab_size=config.vocab_size)),
        Field(
            name="allowed_token_ids",
            kind=TokenIds(vocab_size=config.vocab_size, min_items=1, max_items=config.vocab_size),
        ),
        Field(
            name="bad_words",
            kind=Strings(max_items=MAX_BAD_WORDS, member=String(min_length=1, max_length=MAX_BAD_WORD_CHARS)),
        ),
        Field(name="seed", kind=Integer(minimum=INT64_MIN, maximum=INT64_MAX)),
        Field(name="n", kind=Integer(minimum=1, maximum=MAX_CHOICES), default=1),
        Field(name="best_of", kind=Integer(minimum=1, maximum=MAX_CHOICES)),
        _boolean("use_beam_search"),
        Field(name="length_penalty", kind=Number(minimum=float("-inf")), default=1.0),
        Field(name="early_stopping", kind=ByType({bool: Boolean(), str: Enum(("never",))}), default=False),
    )


def _stopping_fields(config: ProtocolConfig) -> tuple[Field, ...]:
    stop_string = String(min_length=1, max_length=MAX_STOP_STRING_CHARS)
    stop = ByType({str: stop_string, list: Strings(max_items=MAX_STOP_STRINGS, member=stop_string)})
    stop_ids = TokenIds(vocab_size=config.vocab_size, max_items=MAX_STOP_TOKEN_IDS)
    return (
        Field(name="min_tokens", kind=Integer(minimum=0), default=0),
        Field(name="stop", kind=stop),
        Field(name="stop_token_ids", kind=stop_ids, default=()),
        _boolean("include_stop_str_in_output"),
        _boolean("ignore_eos"),
        _boolean("skip_special_tokens", True),
        _boolean("spaces_between_special_tokens", True),
    )


def _output_fields(config: ProtocolConfig) -> tuple[Field, ...]:
    logprobs = Integer(minimum=0, maximum=config.max_logprobs)
    return (
        Field(name="prompt_logprobs", kind=logprobs),
        _boolean("return_tokens_as_token_ids", config.return_tokens_as_token_ids),
        _boolean("return_token_ids"),
        _boolean("echo"),
        _boolean("stream"),
        Field(name="stream_options", kind=STREAM_OPTIONS),
    )


def _prompt_fields(config: ProtocolConfig, *, add_special_tokens: bool) -> tuple[Field, ...]:
    return (
        _boolean("add_special_tokens", add_special_tokens),
        Field(
            name="truncate_prompt_tokens", kind=Integer(minimum=1, maximum=config.max_model_len, also=(-1,))
        ),
        Field(name="truncation_side", kind=Enum(("left", "right")), default="left"),
        Field(name="cache_salt", kind=String(min_length=1, max_length=MAX_CACHE_SALT_CHARS)),
        Field(
            name="request_id",
            kind=String(pattern=REQUEST_ID, pattern_hint="1 to 128 of A-Z a-z 0-9 . _ : -"),
        ),
    )


def _structure_fields(config: ProtocolConfig) -> tuple[Field, ...]:
    return (
        Field(name="response_format", kind=RESPONSE_FORMAT),
        Field(name="structured_outputs", kind=STRUCTURED_OUTPUTS),
        Field(name="guided_json", kind=SCHEMA_OR_TEXT),
        Field(name="guided_regex", kind=String()),
        Field(name="guided_choice", kind=CHOICES),
        Field(name="guided_grammar", kind=String()),
        Field(name="guided_whitespace_pattern", kind=String()),
        Field(
            name="guided_decoding_backend",
            kind=Enum(get_args(GuidedBackend)),
            default=config.guided_decoding_backend,
        ),
    )


def _openai_fields() -> tuple[Field, ...]:
    """OpenAI's fields that have no meaning here: accepted where nothing is lost by it, else refused."""
    hint = String(max_length=MAX_HINT_CHARS)
    not_here = never("is not supported by this server; leave it out.")
    return (
        Field(name="user", kind=hint),
        Field(name="safety_identifier", kind=hint),
        Field(name="prompt_cache_key", kind=hint),
        Field(name="metadata", kind=StringMap(max_items=MAX_METADATA_PAIRS)),
        _boolean(
            "store",
            refusal=Refusal(
                because="must be false: nothing is stored here.", neutral=(False,), code="unsupported_value"
            ),
        ),
        Field(name="service_tier", kind=Enum(("auto", "default"), code="unsupported_value")),
        Field(
            name="modalities",
            kind=Strings(),
            refusal=Refusal(because='must be ["text"].', neutral=(["text"],), code="unsupported_value"),
        ),
        Field(name="prediction", kind=PREDICTION),
        Field(name="verbosity", kind=Enum(("low", "medium", "high"), code="unsupported_value")),
        Field(
            name="reasoning_effort",
            kind=Enum(("none", "minimal", "low", "medium", "high", "xhigh"), code="unsupported_value"),
        ),
        Field(name="prompt_cache_retention", kind=Enum(("in_memory", "in-memory", "24h"))),
        Field(name="prompt_cache_options", kind=FreeObject()),
        *(
            Field(name=name, kind=Anything(), refusal=not_here)
            for name in ("audio", "web_search_options", "moderation", "functions")
        ),
        Field(name="function_call", kind=Anything(), refusal=never(not_here.because, "none")),
    )


def _vllm_fields(config: ProtocolConfig) -> tuple[Field, ...]:
    """vLLM's fields that are known, and not served by every server."""
    not_here = never("is not supported by this server; leave it out.")
    names = (
        "prompt_embeds",
        "logprob_token_ids",
        "kv_transfer_params",
        "ec_transfer_params",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "vllm_xargs",
        "repetition_detection",
        "thinking_token_budget",
        "stream_interval",
        "watermarking",
        "session_id",
    )
    return (
        *(Field(name=name, kind=Anything(), refusal=not_here) for name in names),
        Field(
            name="priority",
            kind=Integer(),
            default=0,
            refusal=None
            if config.scheduling_policy == "priority"
            else never("must be 0 or absent: other values need --scheduling-policy priority.", 0),
        ),
        _boolean("include_reasoning", True, refusal=never("must be true or absent.", True)),
    )


def _common_fields(config: ProtocolConfig, *, add_special_tokens: bool) -> tuple[Field, ...]:
    return (
        *_prompt_fields(config, add_special_tokens=add_special_tokens),
        *_sampling_fields(config),
        *_stopping_fields(config),
        *_output_fields(config),
        *_structure_fields(config),
        *_openai_fields(),
        *_vllm_fields(config),
    )


def completion_table(config: ProtocolConfig) -> Table:
    """The body of `POST /v1/completions`."""
    return Table(
        (
            Field(name="model", kind=String(), required=True),
            Field(name="prompt", kind=PromptKind(vocab_size=config.vocab_size), required=True),
            Field(name="max_tokens", kind=Integer(minimum=0), default=DEFAULT_COMPLETION_TOKENS, null=None),
            Field(name="logprobs", kind=Integer(minimum=0, maximum=config.max_logprobs)),
            Field(
                name="suffix",
                kind=Anything(),
                refusal=never("is not supported: no model here fills in the middle."),
            ),
            *_common_fields(config, add_special_tokens=True),
        ),
        field_texts.COMPLETION,
    )


def _template_fields(config: ProtocolConfig) -> tuple[Field, ...]:
    off = never("is turned off on this server (--no-request-chat-template); leave it out.", {})
    refusal = None if config.request_chat_template else off
    return (
        _boolean("add_generation_prompt", True),
        _boolean("continue_final_message"),
        Field(name="documents", kind=DOCUMENTS),
        Field(name="tools", kind=TOOLS),
        Field(name="chat_template", kind=String(), refusal=refusal),
        Field(
            name="chat_template_kwargs",
            kind=FreeObject(reserved=RESERVED_TEMPLATE_KWARGS),
            refusal=refusal,
        ),
    )


def chat_table(config: ProtocolConfig) -> Table:
    """The body of `POST /v1/chat/completions`."""
    return Table(
        (
            Field(name="model", kind=String(), required=True),
            Field(name="messages", kind=MESSAGES, required=True),
            Field(name="max_tokens", kind=Integer(minimum=1)),
            Field(name="max_completion_tokens", kind=Integer(minimum=1)),
            _boolean("logprobs"),
            Field(name="top_logprobs", kind=Integer(minimum=0, maximum=config.max_logprobs), default=0),
            *_template_fields(config),
            Field(name="tool_choice", kind=TOOL_CHOICE),
            _boolean("parallel_tool_calls", True),
            *_common_fields(config, add_special_tokens=False),
        ),
        field_texts.CHAT,
    )


TOKENIZE_TEXT = Table(
    (
        Field(name="model", kind=String()),
        Field(name="prompt", kind=String(), required=True),
        _boolean("add_special_tokens", True),
        _boolean("return_token_strs"),
    ),
    field_texts.TOKENIZE_TEXT,
)


def tokenize_messages_table(config: ProtocolConfig) -> Table:
    """The body of `POST /tokenize` with a conversation."""
    return Table(
        (
            Field(name="model", kind=String()),
            Field(name="messages", kind=MESSAGES, required=True),
            *_template_fields(config),
            _boolean("add_special_tokens", False),
            _boolean("return_token_strs"),
        ),
        field_texts.TOKENIZE_MESSAGES,
    )


def detokenize_table(config: ProtocolConfig) -> Table:
    """The body of `POST /detokenize`."""
    tokens = TokenIds(vocab_size=config.vocab_size)
    return Table(
        (Field(name="model", kind=String()), Field(name="tokens", kind=tokens, required=True)),
        field_texts.DETOKENIZE,
    )
