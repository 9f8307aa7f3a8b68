"""OpenAI's requests as types: every field declared once, bodies read into frozen dataclasses.

The tables below are the whole truth about what a body may hold.
"""

# ruff: noqa: ARG002  (every kind's `convert` takes the same arguments)

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

from jaxserve.api import field_texts
from jaxserve.api.constraints import RequestConstraint, requested_constraint
from jaxserve.api.errors import model_not_found
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
    shown,
    to_integers,
    token_id_schema,
    wrong_type,
)
from jaxserve.api.tools import ToolUse, check_distinct_names, tool_use
from jaxserve.config import GuidedBackend, ToolCallParserName
from jaxserve.errors import ContextLengthError, RequestError
from jaxserve.sampling_params import (
    INT64_MAX,
    INT64_MIN,
    MAX_CHOICES,
    MAX_LOGIT_BIASES,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

MAX_PROMPTS = 1024
MAX_SEQUENCES = 1024  # prompts × max(n, best_of)
MAX_BAD_WORDS, MAX_BAD_WORD_CHARS = 128, 256
MAX_TOOLS = 128
MAX_ROLE_CHARS = 64
MANY_MESSAGES = (
    16_384  # fewer are left to the count of tokens, whatever the context: a template may leave some out
)
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

# values at which a sampling parameter leaves the distribution alone; beam search takes no others
BEAM_SEARCH_NEUTRAL: dict[str, tuple[float, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
}

Prompt = str | list[int]
TruncationSide = Literal["left", "right"]


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


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """How long prompt and output may be.

    Attributes:
        max_tokens: tokens to generate at most; None: as many as fit beside the prompt.
        max_tokens_field: the name that the client used for it; None if it is the default.
        truncate_prompt_tokens: keep this many prompt tokens, −1: as many as fit; None: all.
        truncation_side: the end that is cut off.
        min_tokens: tokens to generate at least; checked against what max_tokens turns out to be.
    """

    max_tokens: int | None
    max_tokens_field: str | None
    truncate_prompt_tokens: int | None = None
    truncation_side: TruncationSide = "left"
    min_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What the response shows.

    Attributes:
        logprobs: None, or how many top logprobs beside the sampled token's.
        prompt_logprobs: likewise for every token of the prompt.
    """

    stream: bool = False
    include_usage: bool = False
    continuous_usage_stats: bool = False
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What completion and chat requests have in common.

    Attributes:
        sampling: what the engine is asked for, which may be more logprobs than `output` shows. Its `max_tokens` is
            settled by `length` once the prompt's tokens are known, its `bad_words_token_ids` by `bad_words`.
        bad_words: texts that must not be generated.
        constraint: what the text must be.
        request_id: the client's choice for the id of the response.
        ignored_fields: paths of unknown fields that were dropped.
    """

    sampling: SamplingParams
    length: LengthOptions
    output: OutputOptions
    add_special_tokens: bool
    bad_words: tuple[str, ...] = ()
    constraint: RequestConstraint | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    ignored_fields: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """A body of `POST /v1/completions`. Each prompt is text or token ids, none empty."""

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """Messages and what the chat template needs beside them.

    Attributes:
        chat_template: used instead of the model's.
        chat_template_kwargs: further variables for the template.
        tools: functions, as the client described them.
    """

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    documents: list[dict[str, str]] | None = None
    reasoning_effort: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def brings_template(self) -> bool:
        """Whether rendering runs what the request brings: it must not run in this process."""
        return self.chat_template is not None or bool(self.chat_template_kwargs)


@dataclass(frozen=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """A body of `POST /v1/chat/completions`.

    Attributes:
        tools: None if there are none.
    """

    prompt: ChatPrompt
    tools: ToolUse | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """A body of `POST /tokenize`: a text or a conversation."""

    prompt: str | ChatPrompt
    add_special_tokens: bool
    return_token_strs: bool
    ignored_fields: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DetokenizeRequest:
    """A body of `POST /detokenize`."""

    tokens: list[int]
    ignored_fields: tuple[str, ...] = ()


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


def _vllm_fields() -> tuple[Field, ...]:
    """vLLM's fields that are known and not served."""
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
            refusal=never("must be 0 or absent: all requests are equal here.", 0),
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
        *_vllm_fields(),
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


# Bodies → requests


class Protocol:
    """Parses and validates bodies for one model and one set of flags.

    Every method takes a parsed JSON object and raises `RequestError` (400) or `HttpError` (404: unknown
    model). They are pure and thread-safe; run them off the event loop, because a body may be megabytes.
    """

    def __init__(self, config: ProtocolConfig) -> None:
        self.config = config

    @cached_property
    def _completion(self) -> Table:
        return completion_table(self.config)

    @cached_property
    def _chat(self) -> Table:
        return chat_table(self.config)

    @cached_property
    def _tokenize_messages(self) -> Table:
        return tokenize_messages_table(self.config)

    @cached_property
    def _detokenize(self) -> Table:
        return detokenize_table(self.config)

    def completion(self, body: dict[str, Any]) -> CompletionRequest:
        """A body of `POST /v1/completions`."""
        values, ignored = self._read(self._completion, body)
        prompts = tuple(values["prompt"])
        _check_choices(values, num_prompts=len(prompts))
        if values["max_tokens"] == 0 and not values["echo"]:
            raise RequestError(
                "max_tokens must be at least 1 (0 is for echo alone), got 0.", param="max_tokens"
            )
        field = "max_tokens" if "max_tokens" in values.given else None
        length = self._length(values, field)
        output = self._output(values, logprobs=values["logprobs"])
        # tokens of an echoed prompt are shown like generated ones
        asked = (output.prompt_logprobs, output.logprobs if output.echo else None)
        prompt_logprobs = max((count for count in asked if count is not None), default=None)
        return CompletionRequest(
            prompts=prompts,
            sampling=self._sampling(values, logprobs=output.logprobs, prompt_logprobs=prompt_logprobs),
            length=length,
            output=output,
            add_special_tokens=values["add_special_tokens"],
            bad_words=tuple(values["bad_words"] or ()),
            constraint=requested_constraint(values),
            cache_salt=values["cache_salt"],
            request_id=values["request_id"],
            ignored_fields=ignored,
        )

    def chat(self, body: dict[str, Any]) -> ChatRequest:
        """A body of `POST /v1/chat/completions`."""
        self._refuse_endless_conversation(body)
        values, ignored = self._read(self._chat, body)
        _check_choices(values, num_prompts=1)
        if values["top_logprobs"] and not values["logprobs"]:
            raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        logprobs = values["top_logprobs"] if values["logprobs"] else None
        both = ("max_completion_tokens", "max_tokens")
        field = next((name for name in both if name in values.given), None)
        length = self._length(values, field)
        output = self._output(values, logprobs=logprobs)
        prompt = _chat_prompt(values, reasoning_effort=values["reasoning_effort"])
        tools = tool_use(values, self.config.tool_call_parser)
        constraint = requested_constraint(values, None if tools is None else tools.asked)
        if tools is not None and tools.asked is None and constraint is not None:
            tools = replace(tools, parser=None)  # the text is what the constraint says, and no call
        return ChatRequest(
            prompt=prompt,
            tools=tools,
            sampling=self._sampling(values, logprobs=logprobs, prompt_logprobs=output.prompt_logprobs),
            length=length,
            output=output,
            add_special_tokens=values["add_special_tokens"],
            bad_words=tuple(values["bad_words"] or ()),
            constraint=constraint,
            cache_salt=values["cache_salt"],
            request_id=values["request_id"],
            ignored_fields=ignored,
        )

    def _refuse_endless_conversation(self, body: dict[str, Any]) -> None:
        """Before any work on its messages: each is a token or more, so that such a one cannot fit."""
        messages, longest = body.get("messages"), max(MANY_MESSAGES, self.config.max_model_len)
        if isinstance(messages, list) and len(messages) > longest:
            message = (
                f"The model's context length is {self.config.max_model_len} tokens, but the conversation has "
                f"{len(messages):,} messages. Send its last ones."
            )
            raise ContextLengthError(message, param="messages")

    def tokenize(self, body: dict[str, Any]) -> TokenizeRequest:
        """A body of `POST /tokenize`: exactly one of `prompt` and `messages`."""
        text, messages = (body.get(name) is not None for name in ("prompt", "messages"))
        if text and messages:
            raise RequestError("Give either prompt or messages, not both.", param="messages")
        if not text and not messages:
            message = "One of prompt and messages is required."
            raise RequestError(message, param="prompt", code="missing_required_parameter")
        body = {name: value for name, value in body.items() if name != ("messages" if text else "prompt")}
        values, ignored = self._read(TOKENIZE_TEXT if text else self._tokenize_messages, body)
        return TokenizeRequest(
            prompt=values["prompt"] if text else _chat_prompt(values),
            add_special_tokens=values["add_special_tokens"],
            return_token_strs=values["return_token_strs"],
            ignored_fields=ignored,
        )

    def detokenize(self, body: dict[str, Any]) -> DetokenizeRequest:
        """A body of `POST /detokenize`."""
        values, ignored = self._read(self._detokenize, body)
        return DetokenizeRequest(tokens=values["tokens"], ignored_fields=ignored)

    def _read(self, table: Table, body: dict[str, Any]) -> tuple[Values, tuple[str, ...]]:
        """Schema, then model, then values: the order in which faults are reported."""
        unknown = UnknownFields(ignore=self.config.ignore_unknown_fields)
        values = table.convert(body, "", unknown)
        if values["model"] is not None and values["model"] not in self.config.model_names:
            raise model_not_found(values["model"])
        table.check(values, "")
        return values, tuple(unknown.ignored)

    def _sampling(
        self, values: Values, *, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        beams = values["use_beam_search"]
        best_of = values["best_of"]
        if values["max_tokens"] == 0:  # echo alone: there is nothing to choose from
            beams, best_of = False, None
        elif best_of == values["n"] and not beams:
            best_of = None
        if best_of is not None and not beams and logprobs is None:
            logprobs = 0  # candidates are ranked by them
        stop, allowed, top_k = values["stop"] or (), values["allowed_token_ids"], values["top_k"]
        biases = {int(key): float(bias) for key, bias in (values["logit_bias"] or {}).items()}
        return SamplingParams(
            n=values["n"],
            best_of=best_of,
            use_beam_search=beams,
            length_penalty=float(values["length_penalty"]) if beams else 1.0,
            early_stopping=values["early_stopping"] if beams else False,
            temperature=0.0 if beams else float(values["temperature"]),
            top_p=1.0 if beams else float(values["top_p"]),
            top_k=-1 if beams or not 0 < top_k < self.config.vocab_size else top_k,
            min_p=0.0 if beams else float(values["min_p"]),
            presence_penalty=float(values["presence_penalty"]),
            frequency_penalty=float(values["frequency_penalty"]),
            repetition_penalty=float(values["repetition_penalty"]),
            logit_bias=tuple(biases.items()),
            allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
            seed=None if values["seed"] == -1 else values["seed"],
            max_tokens=self.config.max_model_len,
            min_tokens=values["min_tokens"],
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(values["stop_token_ids"]),
            include_stop_str_in_output=values["include_stop_str_in_output"],
            ignore_eos=values["ignore_eos"],
            skip_special_tokens=values["skip_special_tokens"],
            spaces_between_special_tokens=values["spaces_between_special_tokens"],
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _length(self, values: Values, field: str | None) -> LengthOptions:
        """Raise if min_tokens asks for more than max_tokens allows, whatever the prompt's length."""
        max_tokens = values[field or "max_tokens"]
        limit = self.config.max_model_len if max_tokens is None else max_tokens
        check_min_tokens(values["min_tokens"], limit, field or "max_tokens")
        return LengthOptions(
            max_tokens=max_tokens,
            max_tokens_field=field,
            truncate_prompt_tokens=values["truncate_prompt_tokens"],
            truncation_side=values["truncation_side"],
            min_tokens=values["min_tokens"],
        )

    def _output(self, values: Values, *, logprobs: int | None) -> OutputOptions:
        stream, options = values["stream"], values["stream_options"]
        if options is not None and not stream:
            raise RequestError("stream_options needs stream to be true.", param="stream_options")
        if stream and values["prompt_logprobs"] is not None:
            message = "prompt_logprobs are not served in streams; leave out one of the two."
            raise RequestError(message, param="prompt_logprobs", code="unsupported_parameter")
        include_usage = stream and (
            self.config.force_include_usage or bool(options and options["include_usage"])
        )
        continuous = bool(options and options["continuous_usage_stats"])
        if continuous and not include_usage:
            param = "stream_options.continuous_usage_stats"
            raise RequestError(f"{param} needs stream_options.include_usage to be true.", param=param)
        return OutputOptions(
            stream=stream,
            include_usage=include_usage,
            continuous_usage_stats=continuous,
            echo=values["echo"],
            logprobs=logprobs,
            prompt_logprobs=values["prompt_logprobs"],
            return_tokens_as_token_ids=values["return_tokens_as_token_ids"],
            return_token_ids=values["return_token_ids"],
        )


@lru_cache(maxsize=4)
def protocol_for(config: ProtocolConfig) -> Protocol:
    """The protocol of a configuration, its tables built once."""
    return Protocol(config)


def _check_choices(values: Values, *, num_prompts: int) -> None:
    n, best_of = values["n"], values["best_of"]
    if best_of is not None and best_of < n:
        raise RequestError(f"best_of must be at least n ({n}), got {best_of}.", param="best_of")
    if values["use_beam_search"]:
        _check_beam_search(values)
    else:
        _check_no_beam_search(values)
        if best_of is not None and best_of > n and values["stream"]:
            message = "best_of greater than n cannot be streamed: the best are known only at the end."
            raise RequestError(message, param="best_of", code="unsupported_parameter")
    _check_total(num_prompts, "n" if best_of is None else "best_of", n if best_of is None else best_of)


def _check_beam_search(values: Values) -> None:
    for name, neutral in BEAM_SEARCH_NEUTRAL.items():
        if name in values.given and values[name] not in neutral:
            allowed = " or ".join(map(str, neutral))
            message = f"{name} must be {allowed} when using beam search, got {shown(values[name])}."
            raise RequestError(message, param=name)
    width = values["n"] if values["best_of"] is None else values["best_of"]
    if width < 2:
        message = f"best_of (the width of the beam search, n by default) must be at least 2, got {width}."
        raise RequestError(message, param="best_of")
    if values["stream"]:
        message = "stream must be false when using beam search: its results are known only at the end."
        raise RequestError(message, param="stream", code="unsupported_parameter")


def _check_no_beam_search(values: Values) -> None:
    for name, neutral in (("length_penalty", 1), ("early_stopping", False)):
        if values[name] != neutral:
            raise RequestError(f"{name} works only with use_beam_search: true.", param=name)


def _check_total(num_prompts: int, name: str, count: int) -> None:
    total = num_prompts * count
    if total > MAX_SEQUENCES:
        message = (
            f"{num_prompts} prompts with {name} = {count} are {total} sequences; "
            f"at most {MAX_SEQUENCES} are served at once."
        )
        raise RequestError(message, param=name)


def check_min_tokens(min_tokens: int, max_tokens: int, field: str) -> None:
    """Raise `RequestError` unless min_tokens tokens may be generated; `field` is the client's name for the limit."""
    if min_tokens > max_tokens:
        message = f"min_tokens must be at most {field} ({max_tokens}), got {min_tokens}."
        raise RequestError(message, param="min_tokens")


def _chat_prompt(values: Values, *, reasoning_effort: str | None = None) -> ChatPrompt:
    if values["continue_final_message"] and values["add_generation_prompt"]:
        message = "continue_final_message needs add_generation_prompt to be false (it is true by default)."
        raise RequestError(message, param="continue_final_message")
    messages: Sequence[Values] = values["messages"]
    tools: Sequence[Values] | None = values["tools"]
    check_distinct_names(tools or ())
    return ChatPrompt(
        messages=[message.as_sent() for message in messages],
        add_generation_prompt=values["add_generation_prompt"],
        continue_final_message=values["continue_final_message"],
        documents=values["documents"],
        reasoning_effort=reasoning_effort,
        chat_template=values["chat_template"],
        chat_template_kwargs=values["chat_template_kwargs"],
        tools=None if tools is None else [tool.as_sent() for tool in tools],
    )
