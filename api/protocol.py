"""Bodies → requests: OpenAI's requests as frozen dataclasses, and the rules that hold between their fields.

What one field may hold is in `request_tables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from jaxserve.api.constraints import RequestConstraint, requested_constraint
from jaxserve.api.errors import model_not_found
from jaxserve.api.fields import Table, UnknownFields, Values, shown
from jaxserve.api.request_tables import (
    TOKENIZE_TEXT,
    Prompt,
    ProtocolConfig,
    chat_table,
    completion_table,
    detokenize_table,
    tokenize_messages_table,
)
from jaxserve.api.tools import ToolUse, check_distinct_names, tool_use
from jaxserve.errors import ContextLengthError, RequestError
from jaxserve.sampling_params import SamplingParams

MAX_SEQUENCES = 1024  # prompts × max(n, best_of)
# fewer are left to the count of tokens, whatever the context: a template may leave some out
MANY_MESSAGES = 16_384

# values at which a sampling parameter leaves the distribution alone; beam search takes no others
BEAM_SEARCH_NEUTRAL: dict[str, tuple[float, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
}

TruncationSide = Literal["left", "right"]


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
        priority: the lower, the sooner it is served.
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
    priority: int = 0
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
            priority=values["priority"],
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
            priority=values["priority"],
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
