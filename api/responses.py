"""Responses as OpenAI's clients expect them: whole objects, stream chunks, logprobs, usage.

A renderer turns `ChoiceDelta`s into JSON. It renders a delta the same way for a stream and for a whole
response, where it joins what it rendered; so the two cannot differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import orjson

from jaxserve.api.generation import MIN_LOGPROB, ChoiceDelta, Usage
from jaxserve.api.prompts import TokenizedPrompt
from jaxserve.api.protocol import OutputOptions
from jaxserve.api.tool_calls import Arguments, CallStart, Piece, Text, ToolCallParser
from jaxserve.api.tools import ToolUse
from jaxserve.messages import TopLogprobs
from jaxserve.tokenizer import Tokenizer

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def event(value: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@dataclass(frozen=True, kw_only=True)
class ResponseHead:
    """What all chunks of a response share.

    Attributes:
        id: with the API's own prefix.
        created: whole Unix seconds of the request's arrival.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str


@dataclass(frozen=True)
class TokenStrings:
    """How tokens are written in logprobs.

    Attributes:
        as_token_ids: `"token_id:<id>"` instead of text.
    """

    tokenizer: Tokenizer
    as_token_ids: bool = False

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_token_ids else self.tokenizer.token_str(token_id)


def completion_logprobs(
    ids: Sequence[int],
    logprobs: Sequence[TopLogprobs | None],
    k: int,
    offset: int,
    token_string: TokenStrings,
) -> tuple[Json, int]:
    """The four parallel arrays of `/v1/completions`, and where the next token's text begins.

    Args:
        logprobs: None for the first token of a prompt.
        k: the most likely tokens to show beside each.
    """
    offsets, tokens = [], []
    for token_id in ids:
        tokens.append(token_string(token_id))
        offsets.append(offset)
        offset += len(tokens[-1])
    arrays = {
        "text_offset": offsets,
        "token_logprobs": [entry and max(entry.logprob, MIN_LOGPROB) for entry in logprobs],
        "tokens": tokens,
        "top_logprobs": [
            entry and _top_by_string(token_id, entry, k, token_string)
            for token_id, entry in zip(ids, logprobs, strict=True)
        ],
    }
    return arrays, offset


def _top_by_string(token_id: int, entry: TopLogprobs, k: int, token_string: TokenStrings) -> dict[str, float]:
    """The most likely tokens and the sampled one; of two with the same string the likelier wins."""
    top: dict[str, float] = {}
    top_ids = entry.top_ids[:k]
    for top_id, logprob in zip(top_ids, entry.top_logprobs, strict=False):
        top.setdefault(token_string(top_id), max(logprob, MIN_LOGPROB))
    if token_id not in top_ids:
        top.setdefault(token_string(token_id), max(entry.logprob, MIN_LOGPROB))
    return top


def chat_logprobs(
    ids: Sequence[int], logprobs: Sequence[TopLogprobs], token_string: TokenStrings
) -> list[Json]:
    """The entries of `logprobs.content` of `/v1/chat/completions`."""
    return [
        {
            **_chat_token(token_id, entry.logprob, token_string),
            "top_logprobs": [
                _chat_token(top_id, logprob, token_string)
                for top_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
            ],
        }
        for token_id, entry in zip(ids, logprobs, strict=True)
    ]


def _chat_token(token_id: int, logprob: float, token_string: TokenStrings) -> Json:
    return {
        "token": token_string(token_id),
        "logprob": max(logprob, MIN_LOGPROB),
        "bytes": list(token_string.tokenizer.token_bytes(token_id)),
    }


def prompt_logprobs_json(
    ids: Sequence[int], logprobs: Sequence[TopLogprobs], k: int, tokenizer: Tokenizer
) -> list[Json | None]:
    """`prompt_logprobs` of a prompt: null for its first token, then one object a token.

    Args:
        logprobs: from the prompt's second token on.
        k: the most likely tokens to show beside each.
    """
    return [None] + [
        _prompt_token(token_id, entry, k, tokenizer)
        for token_id, entry in zip(ids[1:], logprobs, strict=True)
    ]


def _prompt_token(token_id: int, entry: TopLogprobs, k: int, tokenizer: Tokenizer) -> Json:
    """By id: the actual token, then the k most likely; k or k + 1 of them."""

    def described(member: int, logprob: float, rank: int) -> Json:
        return {
            "logprob": max(logprob, MIN_LOGPROB),
            "rank": rank,
            "decoded_token": tokenizer.token_str(member),
        }

    assert entry.rank is not None, "it is not known in beams alone"
    members = {str(token_id): described(token_id, entry.logprob, entry.rank)}
    rank = 1
    for place, (top_id, logprob) in enumerate(zip(entry.top_ids[:k], entry.top_logprobs, strict=False)):
        if place and logprob < entry.top_logprobs[place - 1]:
            rank = place + 1
        members.setdefault(str(top_id), described(top_id, logprob, rank))
    return members


@dataclass(slots=True)
class ChoiceState:
    """What a renderer knows of one choice: what it has rendered so far, for the joined response."""

    started: bool = False
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: Json | None = None
    text_offset: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Renderer(ABC):
    """JSON of one response.

    Args:
        prompts: in order; choice i belongs to prompt i // n.
    """

    object_name: str
    chunk_object_name: str
    _parses_text = False  # a choice's text is more than content

    def __init__(
        self,
        head: ResponseHead,
        tokenizer: Tokenizer,
        prompts: Sequence[TokenizedPrompt],
        n: int,
        options: OutputOptions,
    ) -> None:
        self.head = head
        self.prompts = prompts
        self.n = n
        self.options = options
        self.token_string = TokenStrings(tokenizer, options.return_tokens_as_token_ids)
        self.states = [ChoiceState() for _ in range(len(prompts) * n)]
        self._chunk_prefix = b"data: " + orjson.dumps(self._envelope(self.chunk_object_name))[:-1]
        # by choice: what is around the text of a plain chunk
        self._text_chunks: dict[int, tuple[bytes, bytes]] = {}

    # --- the whole response --------------------------------------------------------------------------------

    def collect(self, deltas: Sequence[ChoiceDelta]) -> None:
        """Keep a step's deltas for `response`."""
        for delta in deltas:
            state = self.states[delta.index]
            if not state.started:
                self._begin(delta)
            state.started = True
            state.texts.append(delta.text)
            state.token_ids += delta.token_ids
            state.finish_reason, state.stop_reason = delta.finish_reason, delta.stop_reason
            rendered = self._logprobs(delta)
            if rendered is not None:
                state.logprobs = rendered if state.logprobs is None else _joined(state.logprobs, rendered)

    def response(self, usage: Usage) -> bytes:
        """The object of everything collected."""
        choices = [self._choice(index, state) for index, state in enumerate(self.states)]
        body = self._envelope(self.object_name) | {"choices": choices, "usage": usage_json(usage)}
        return orjson.dumps(body | self._response_extras())

    # --- the stream ----------------------------------------------------------------------------------------

    @property
    def shows_usage(self) -> bool:
        """Whether every chunk does."""
        return self.options.include_usage and self.options.continuous_usage_stats

    def chunks(self, deltas: Sequence[ChoiceDelta], usage: Usage | None) -> bytes:
        """The events of one step, one after the other: each has one choice.

        Args:
            usage: so far; it may be None unless `shows_usage`.
        """
        written = bytearray()
        for delta in deltas:
            if self._is_plain(delta):
                before, behind = self._around_text(delta.index)
                written += before + orjson.dumps(delta.text) + behind
                continue
            suffix = self._chunk_suffix(usage)
            for choice, extras in self._chunk_choices(self.states[delta.index], delta):
                written += self._chunk(choice, extras + suffix)
        return bytes(written)

    def _is_plain(self, delta: ChoiceDelta) -> bool:
        """Whether nothing but the text tells the delta's only chunk from others of its choice."""
        shown = self.options
        return (
            delta.finish_reason is None
            and self.states[delta.index].started
            and shown.logprobs is None
            and not (shown.return_token_ids or shown.continuous_usage_stats)
            and not self._parses_text
        )

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        """A plain chunk of the choice, cut in two where its text goes; rendered like any other, but only once."""
        if index not in self._text_chunks:
            mark = f"text {uuid4().hex}"
            ((choice, extras),) = self._chunk_choices(self.states[index], ChoiceDelta(index, mark))
            before, behind = self._chunk(choice, extras + self._chunk_suffix(None)).split(orjson.dumps(mark))
            self._text_chunks[index] = before, behind
        return self._text_chunks[index]

    def _chunk(self, choice: Json, rest: bytes) -> bytes:
        return self._chunk_prefix + b',"choices":[' + orjson.dumps(choice) + b"]" + rest

    def last_chunks(self, usage: Usage) -> bytes:
        """The usage, if asked for, and the end of the stream."""
        if not self.options.include_usage:
            return DONE
        final = orjson.dumps(usage_json(usage))
        return self._chunk_prefix + b',"choices":[],"usage":' + final + b"}\n\n" + DONE

    def _chunk_suffix(self, usage: Usage | None) -> bytes:
        if not self.options.include_usage:
            return b"}\n\n"
        if usage is None or not self.shows_usage:
            return b',"usage":null}\n\n'
        return b',"usage":' + orjson.dumps(usage_json(usage)) + b"}\n\n"

    def _envelope(self, object_name: str) -> Json:
        return {
            "id": self.head.id,
            "object": object_name,
            "created": self.head.created,
            "model": self.head.model,
            "system_fingerprint": self.head.system_fingerprint,
        }

    def _prompt(self, index: int) -> TokenizedPrompt:
        return self.prompts[index // self.n]

    # --- what differs between the APIs ---------------------------------------------------------------------

    @abstractmethod
    def _begin(self, delta: ChoiceDelta) -> None:
        """Take what precedes a choice's first delta in the whole response."""

    @abstractmethod
    def _logprobs(self, delta: ChoiceDelta) -> Json | None:
        """The delta's logprobs; None if there are none to show."""

    @abstractmethod
    def _choice(self, index: int, state: ChoiceState) -> Json:
        """A member of the whole response's `choices`."""

    @abstractmethod
    def _response_extras(self) -> Json:
        """Further keys of the whole response."""

    @abstractmethod
    def _chunk_choices(self, state: ChoiceState, delta: ChoiceDelta) -> list[tuple[Json, bytes]]:
        """The `choices` members to send for a delta, each with further keys of its chunk (`,"key":value`)."""


def _joined(first: Json, second: Json) -> Json:
    for name, members in second.items():
        first[name] += members
    return first


class CompletionRenderer(Renderer):
    """`/v1/completions`."""

    object_name = chunk_object_name = "text_completion"

    def __init__(
        self,
        head: ResponseHead,
        tokenizer: Tokenizer,
        prompts: Sequence[TokenizedPrompt],
        n: int,
        options: OutputOptions,
    ) -> None:
        super().__init__(head, tokenizer, prompts, n, options)
        # by prompt, rendered once for all of its choices
        self._echoed_logprobs: dict[int, tuple[Json, int]] = {}
        self._prompt_logprobs: dict[int, orjson.Fragment] = {}

    def _begin(self, delta: ChoiceDelta) -> None:
        state = self.states[delta.index]
        state.logprobs = self._echo_logprobs(state, delta)
        asked, index = self.options.prompt_logprobs, delta.index // self.n
        if asked is not None and delta.prompt_logprobs is not None and index not in self._prompt_logprobs:
            rendered = prompt_logprobs_json(
                self.prompts[index].token_ids, delta.prompt_logprobs, asked, self.token_string.tokenizer
            )
            self._prompt_logprobs[index] = orjson.Fragment(orjson.dumps(rendered))

    def _echo_logprobs(self, state: ChoiceState, delta: ChoiceDelta) -> Json | None:
        """The arrays of the prompt, if they are to precede those of the choice that begins with `delta`."""
        k = self.options.logprobs
        if not self.options.echo or k is None or delta.prompt_logprobs is None:
            return None
        index = delta.index // self.n
        if index not in self._echoed_logprobs:
            ids = self.prompts[index].token_ids
            self._echoed_logprobs[index] = completion_logprobs(
                ids, [None, *delta.prompt_logprobs], k, 0, self.token_string
            )
        arrays, state.text_offset = self._echoed_logprobs[index]
        return {name: list(members) for name, members in arrays.items()}

    def _logprobs(self, delta: ChoiceDelta) -> Json | None:
        k = self.options.logprobs
        if k is None or not delta.logprobs:
            return None
        state = self.states[delta.index]
        arrays, state.text_offset = completion_logprobs(
            delta.token_ids, delta.logprobs, k, state.text_offset, self.token_string
        )
        return arrays

    def _choice(self, index: int, state: ChoiceState) -> Json:
        prompt = self._prompt(index)
        choice = {
            "index": index,
            "text": prompt.echo + "".join(state.texts),
            "logprobs": state.logprobs,
            "finish_reason": state.finish_reason,
            "stop_reason": state.stop_reason,
            "prompt_logprobs": self._prompt_logprobs.get(index // self.n),
        }
        if self.options.return_token_ids:
            choice |= {"token_ids": state.token_ids, "prompt_token_ids": prompt.token_ids}
        return choice

    def _response_extras(self) -> Json:
        return {}

    def _chunk_choices(self, state: ChoiceState, delta: ChoiceDelta) -> list[tuple[Json, bytes]]:
        choices = []
        if not state.started:
            echo, logprobs = self._prompt(delta.index).echo, self._echo_logprobs(state, delta)
            if echo or logprobs:
                choices.append(self._chunk_choice(state, ChoiceDelta(delta.index, echo), logprobs))
        choices.append(self._chunk_choice(state, delta, self._logprobs(delta)))
        return [(choice, b"") for choice in choices]

    def _chunk_choice(self, state: ChoiceState, delta: ChoiceDelta, logprobs: Json | None) -> Json:
        choice = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.options.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if not state.started:
                choice["prompt_token_ids"] = self._prompt(delta.index).token_ids
        state.started = True
        return choice


@dataclass(slots=True)
class CallStream:
    """One choice's text on its way to content and calls, in a stream.

    Attributes:
        token_ids, logprobs: of tokens whose text has not been decided about, or is part of no piece.
    """

    parser: ToolCallParser
    num_calls: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)

    def push(self, delta: ChoiceDelta) -> list[Json]:
        """What the delta adds to the message, each for a chunk of its own."""
        pieces = self.parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += self.parser.finish()
        return [self._message_delta(piece) for piece in pieces]

    def _message_delta(self, piece: Piece) -> Json:
        match piece:
            case Text(text):
                return {"content": text}
            case CallStart(name):
                self.num_calls += 1
                call = {"index": self.num_calls - 1, **new_call(name)}
                return {"tool_calls": [call]}
            case Arguments(text):
                return {"tool_calls": [{"index": self.num_calls - 1, "function": {"arguments": text}}]}


def new_call(name: str) -> Json:
    """A call of a function, without arguments yet."""
    return {"id": f"call_{uuid4().hex}", "type": "function", "function": {"name": name, "arguments": ""}}


def message_with_calls(text: str, parser: ToolCallParser) -> tuple[str, list[Json]]:
    """The content and the calls of a whole text."""
    content, calls = "", []
    for piece in [*parser.push(text), *parser.finish()]:
        match piece:
            case Text(text):
                content += text
            case CallStart(name):
                calls.append(new_call(name))
            case Arguments(text):
                calls[-1]["function"]["arguments"] += text
    return content, calls


class ChatRenderer(Renderer):
    """`/v1/chat/completions`.

    Args:
        role: of the generated message.
        tools: the functions that it may call.
    """

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(
        self,
        head: ResponseHead,
        tokenizer: Tokenizer,
        prompts: Sequence[TokenizedPrompt],
        n: int,
        options: OutputOptions,
        *,
        role: str,
        tools: ToolUse | None = None,
    ) -> None:
        super().__init__(head, tokenizer, prompts, n, options)
        self.role = role
        self._tools = tools
        self._parses_text = tools is not None
        self._call_streams: dict[int, CallStream] = {}  # by choice
        self._sent_prompt_ids = False
        self._prompt_logprobs: list[Json | None] | None = None

    def _begin(self, delta: ChoiceDelta) -> None:
        asked = self.options.prompt_logprobs
        if asked is not None and delta.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = prompt_logprobs_json(
                self.prompts[0].token_ids, delta.prompt_logprobs, asked, self.token_string.tokenizer
            )

    def _logprobs(self, delta: ChoiceDelta) -> Json | None:
        if self.options.logprobs is None or not delta.logprobs:
            return None
        return {"content": chat_logprobs(delta.token_ids, delta.logprobs, self.token_string)}

    def _choice(self, index: int, state: ChoiceState) -> Json:
        content = "".join(state.texts)
        calls: list[Json] = []
        parser = self._new_parser()
        if parser is not None:
            content, calls = message_with_calls(content, parser)
        content = self._prompt(index).echo + content
        message: Json = {"role": self.role, "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        choice = {
            "index": index,
            "message": message,
            "logprobs": state.logprobs,
            "finish_reason": self._finish_reason(state.finish_reason, state.stop_reason, len(calls)),
            "stop_reason": state.stop_reason,
        }
        if self.options.return_token_ids:
            choice["token_ids"] = state.token_ids
        return choice

    def _response_extras(self) -> Json:
        extras: Json = {"prompt_logprobs": self._prompt_logprobs}
        if self.options.return_token_ids:
            extras["prompt_token_ids"] = self.prompts[0].token_ids
        return extras

    def _chunk_choices(self, state: ChoiceState, delta: ChoiceDelta) -> list[tuple[Json, bytes]]:
        choices = []
        if not state.started:
            state.started = True
            choices.append(self._chunk_choice(delta.index, {"role": self.role, "content": ""}))
            if echo := self._prompt(delta.index).echo:
                choices.append(self._chunk_choice(delta.index, {"content": echo}))
        calls = self._calls_of(delta.index)
        choices += [self._delta_choice(delta)] if calls is None else self._piece_choices(calls, delta)
        return [(choice, self._prompt_ids()) for choice in choices]

    def _calls_of(self, index: int) -> CallStream | None:
        """What parses the choice's text; None if all of it is content."""
        if index not in self._call_streams:
            parser = self._new_parser()
            if parser is None:
                return None
            self._call_streams[index] = CallStream(parser)
        return self._call_streams[index]

    def _new_parser(self) -> ToolCallParser | None:
        return None if self._tools is None else self._tools.new_parser()

    def _piece_choices(self, calls: CallStream, delta: ChoiceDelta) -> list[Json]:
        """Tokens travel with the last chunk that has something of their text, or with the next one."""
        choices = [self._chunk_choice(delta.index, message_delta) for message_delta in calls.push(delta)]
        calls.token_ids += delta.token_ids
        logprobs = self._logprobs(delta)
        calls.logprobs += logprobs["content"] if logprobs else []
        if delta.finish_reason is not None:
            last = self._chunk_choice(delta.index, {})
            last["finish_reason"] = self._finish_reason(
                delta.finish_reason, delta.stop_reason, calls.num_calls
            )
            last["stop_reason"] = delta.stop_reason
            choices.append(last)
        if choices and (delta.finish_reason is not None or not calls.parser.is_holding_back):
            self._add_tokens(choices[-1], calls)
        return choices

    def _add_tokens(self, choice: Json, calls: CallStream) -> None:
        if self.options.return_token_ids:
            choice["token_ids"] = calls.token_ids
        if calls.logprobs:
            choice["logprobs"] = {"content": calls.logprobs}
        calls.token_ids, calls.logprobs = [], []

    def _finish_reason(self, reason: str | None, stop_reason: str | int | None, num_calls: int) -> str | None:
        """A choice that ended by itself with calls that the model chose says so."""
        chosen = self._tools is not None and self._tools.mode != "named"
        return "tool_calls" if chosen and num_calls and reason == "stop" and stop_reason is None else reason

    def _delta_choice(self, delta: ChoiceDelta) -> Json:
        shows_text = delta.text or delta.finish_reason is None
        content = {"content": delta.text} if shows_text else {}
        choice = self._chunk_choice(delta.index, content, delta.token_ids)
        choice["logprobs"] = self._logprobs(delta)
        choice["finish_reason"] = delta.finish_reason
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        return choice

    def _chunk_choice(self, index: int, delta: Json, token_ids: Sequence[int] = ()) -> Json:
        choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if self.options.return_token_ids:
            choice["token_ids"] = list(token_ids)
        return choice

    def _prompt_ids(self) -> bytes:
        if not self.options.return_token_ids or self._sent_prompt_ids:
            return b""
        self._sent_prompt_ids = True
        return b',"prompt_token_ids":' + orjson.dumps(self.prompts[0].token_ids)
