"""Prompts → token ids: template, tokenization, truncation, and whether prompt and output fit.

Everything here is synchronous and may take long on long prompts: run it in the server's executor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from jaxserve.api.protocol import (
    ChatPrompt,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    LengthOptions,
    check_min_tokens,
)
from jaxserve.api.tool_calls import HermesParser
from jaxserve.chat_template import ChatTemplate, normalize_messages
from jaxserve.errors import ContextLengthError, RequestError
from jaxserve.sampling_params import MAX_BAD_WORD_TOKENS
from jaxserve.template_worker import RenderJob, make_render_job
from jaxserve.tokenizer import Tokenizer

NO_TEMPLATE = (
    "This model has no chat template: give the server one with --chat-template or the request one in chat_template, "
    "or use /v1/completions."
)

# where a word's tokens are looked at: at the beginning of a text, behind a space, at the beginning of a line
WORD_ANCHORS = (("", ""), ("x", " "), ("\n", ""))
LONG_TEXT_CHARS = 64 << 10
Request = TypeVar("Request", bound=GenerationRequest)


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """One prompt, ready for the engine.

    Attributes:
        max_tokens: settled; 0 only with echo.
        echo: text that precedes the generated text; empty unless asked for.
    """

    token_ids: list[int]
    max_tokens: int
    echo: str = ""


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Makes token ids of what requests bring.

    Attributes:
        chat_template: None if neither the model nor the command line has one.
        template_kwargs: variables that every template gets (`--default-chat-template-kwargs`).
        max_model_len: L.
        response_role: role of generated messages.
        eos_token_ids: ids that end a sequence.
    """

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    max_model_len: int
    template_kwargs: Mapping[str, Any]
    response_role: str = "assistant"
    eos_token_ids: tuple[int, ...] = ()

    def with_bad_words(self, request: Request) -> Request:
        """The request with the token ids of its bad words.

        Raises:
            RequestError: a word has no tokens, they are too many, or no token would be left to generate.
        """
        banned = bad_word_tokens(request.bad_words, self.tokenizer) if request.bad_words else ()
        if sum(map(len, banned)) > MAX_BAD_WORD_TOKENS:
            message = f"bad_words may come to at most {MAX_BAD_WORD_TOKENS:,} tokens in all"
            raise RequestError(f"{message}, got {sum(map(len, banned)):,}.", param="bad_words")
        sampling = msgspec.structs.replace(request.sampling, bad_words_token_ids=banned)
        allowed = sampling.allowed_token_ids
        if allowed is not None:
            impossible = {sequence[0] for sequence in banned if len(sequence) == 1}
            if sampling.min_tokens:
                impossible.update(sampling.stop_token_ids)
                impossible.update(self.eos_token_ids if not sampling.ignore_eos else ())
            if impossible.issuperset(allowed):
                message = "allowed_token_ids leaves nothing to generate: bad_words or min_tokens rule out all of them."
                raise RequestError(message, param="allowed_token_ids")
        return replace(request, sampling=sampling)

    def with_shown_calls(self, request: ChatRequest) -> ChatRequest:
        """The request with a text for special tokens, if the marks of calls are such: else none would be found."""
        if request.tools is None or request.tools.parser != "hermes":
            return request
        marks = self.encode(HermesParser.OPEN, False) + self.encode(HermesParser.CLOSE, False)
        if self.tokenizer.special_token_ids.isdisjoint(marks):
            return request
        return replace(request, sampling=msgspec.structs.replace(request.sampling, skip_special_tokens=False))

    def completion(self, request: CompletionRequest) -> list[TokenizedPrompt]:
        """Every prompt of a completion request.

        Raises:
            RequestError: a prompt has no tokens.
            ContextLengthError: prompt and output do not fit.
        """
        several = len(request.prompts) > 1
        prompts = []
        for i, prompt in enumerate(request.prompts):
            is_text = isinstance(prompt, str)
            name = f"prompt {i}" if several else "the prompt"
            if isinstance(prompt, str):
                self._refuse_hopeless(prompt, request.length, param="prompt", name=name)
            all_ids = self.encode(prompt, request.add_special_tokens) if isinstance(prompt, str) else prompt
            ids, max_tokens = fit(all_ids, request.length, self.max_model_len, param="prompt", name=name)
            echo = ""
            if request.output.echo:
                as_sent = isinstance(prompt, str) and len(ids) == len(all_ids)
                echo = (
                    str(prompt)
                    if is_text and as_sent
                    else self.tokenizer.decode(ids, skip_special_tokens=False)
                )
            prompts.append(TokenizedPrompt(token_ids=ids, max_tokens=max_tokens, echo=echo))
        return prompts

    def chat(self, request: ChatRequest, text: str | None = None) -> TokenizedPrompt:
        """The conversation of a chat request.

        Args:
            text: the conversation as the template worker rendered it.

        Raises:
            RequestError: the template refuses the messages, there is no template, or there are no tokens.
            ContextLengthError: prompt and output do not fit.
        """
        text = self.render(request.prompt) if text is None else text
        at = {"param": "messages", "name": "the conversation"}
        self._refuse_hopeless(text, request.length, **at)
        all_ids = self.encode(text, request.add_special_tokens)
        ids, max_tokens = fit(all_ids, request.length, self.max_model_len, **at)
        echo = self._chat_echo(request.prompt) if request.output.echo else ""
        return TokenizedPrompt(token_ids=ids, max_tokens=max_tokens, echo=echo)

    def _refuse_hopeless(self, text: str, length: LengthOptions, *, param: str, name: str) -> None:
        """Refuse a long text that cannot fit before the seconds that its tokenization would take."""
        if len(text) < LONG_TEXT_CHARS or length.truncate_prompt_tokens is not None:
            return
        at_least = self.tokenizer.min_num_tokens(text)
        if at_least > longest_prompt(length, self.max_model_len):
            asked = 1 if length.max_tokens is None else length.max_tokens
            raise _too_long(
                at_least, asked, self.max_model_len, name, "the output", param, quantifier="at least "
            )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def render(self, prompt: ChatPrompt) -> str:
        """The conversation as the model reads it."""
        if self.chat_template is None:
            raise RequestError(NO_TEMPLATE, param="messages", code="invalid_template")
        messages = normalize_messages(prompt.messages, self.chat_template)
        return self.chat_template.render(messages, self._variables(prompt), **_render_options(prompt))

    def render_job(self, prompt: ChatPrompt) -> RenderJob:
        """The rendering of a conversation with what the request brings for it: work for the template worker.

        Raises:
            RequestError: that is too large, or there is no template at all.
        """
        return make_render_job(
            prompt.messages,
            source=prompt.chat_template,
            kwargs=prompt.chat_template_kwargs or {},
            model_template=self.chat_template,
            special_tokens=self.tokenizer.special_tokens,
            variables=self._variables(prompt),
            **_render_options(prompt),
        )

    def _variables(self, prompt: ChatPrompt) -> dict[str, Any]:
        if prompt.reasoning_effort is None:
            return dict(self.template_kwargs)
        return {**self.template_kwargs, "reasoning_effort": prompt.reasoning_effort}

    def role(self, prompt: ChatPrompt) -> str:
        """The role of the generated message."""
        if prompt.add_generation_prompt:
            return self.response_role
        return str(prompt.messages[-1]["role"])

    def _chat_echo(self, prompt: ChatPrompt) -> str:
        last = prompt.messages[-1]
        return message_text(last) if last["role"] == self.role(prompt) else ""


def _render_options(prompt: ChatPrompt) -> dict[str, Any]:
    return {
        "tools": prompt.tools,
        "documents": prompt.documents,
        "add_generation_prompt": prompt.add_generation_prompt,
        "continue_final_message": prompt.continue_final_message,
    }


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message; parts are joined with a line break."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part[part["type"]] for part in content)


def fit(
    token_ids: list[int], length: LengthOptions, max_model_len: int, *, param: str, name: str
) -> tuple[list[int], int]:
    """Truncate a prompt as asked and settle how many tokens may follow it.

    Returns:
        The prompt's ids (P of them) and max_tokens, with P + max_tokens ≤ L.

    Raises:
        RequestError: there are no tokens.
        ContextLengthError: nothing is clamped that was asked for explicitly.
    """
    token_ids = truncate(token_ids, length, max_model_len)
    if not token_ids:
        raise RequestError(f"{param} cannot be empty: {name} gives no tokens.", param=param)
    explicit = length.max_tokens_field is not None
    room = max_model_len - len(token_ids)
    asked = length.max_tokens
    if len(token_ids) > longest_prompt(length, max_model_len):
        raise _too_long(
            len(token_ids), 1 if asked is None else asked, max_model_len, name, "the output", param
        )
    field = length.max_tokens_field or "max_tokens"
    if asked is not None and asked > room and explicit:
        raise _too_long(len(token_ids), asked, max_model_len, name, field, field)
    max_tokens = room if asked is None else min(asked, room)
    check_min_tokens(length.min_tokens, max_tokens, field)
    return token_ids, max_tokens


def longest_prompt(length: LengthOptions, max_model_len: int) -> int:
    """Tokens that a prompt may have if at least one is to follow, where any is."""
    return max_model_len if length.max_tokens == 0 else max_model_len - 1


def truncate(token_ids: list[int], length: LengthOptions, max_model_len: int) -> list[int]:
    keep = length.truncate_prompt_tokens
    if keep is None:
        return token_ids
    if keep == -1:
        reserved = 1 if length.max_tokens is None else length.max_tokens
        if length.max_tokens_field is None:
            reserved = min(reserved, max_model_len - 1)
        keep = max(max_model_len - reserved, 1)
    if len(token_ids) <= keep:
        return token_ids
    return token_ids[-keep:] if length.truncation_side == "left" else token_ids[:keep]


def bad_word_tokens(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences that must not be completed, so that none of `words` is generated: each word as a model writes
    it at the beginning of a text or line and behind a space.

    A sequence that ends with another one is left out: it cannot be completed without the other.

    Raises:
        RequestError: a word has no tokens.
    """
    sequences: set[tuple[int, ...]] = set()
    for i, word in enumerate(words):
        found = {tuple(_tokens_behind(*anchor, word, tokenizer)) for anchor in WORD_ANCHORS} - {()}
        if not found:
            raise RequestError(f"bad_words[{i}] gives no tokens: {word[:100]!r}.", param="bad_words")
        sequences |= found
    return tuple(
        sequence
        for sequence in sorted(sequences, key=lambda ids: (len(ids), ids))
        if not any(sequence[start:] in sequences for start in range(1, len(sequence)))
    )


def _tokens_behind(before: str, space: str, word: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of `word` behind `before` and a space that may be part of its first token."""
    anchor = tokenizer.encode(before, add_special_tokens=False) if before else []
    ids = tokenizer.encode(before + space + word, add_special_tokens=False)
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    return tokenizer.encode(
        space + word, add_special_tokens=False
    )  # the word's beginning grew onto the anchor


def _too_long(
    num_tokens: int,
    asked: int,
    max_model_len: int,
    name: str,
    field: str,
    param: str,
    *,
    quantifier: str = "",
) -> ContextLengthError:
    message = (
        f"The model's context length is {max_model_len} tokens, but {name} has {quantifier}{num_tokens} and {field} "
        f"asks for {asked}: {quantifier}{num_tokens + asked} in all. Shorten the prompt or ask for fewer tokens."
    )
    return ContextLengthError(message, param=param)
