"""Prompts → token ids: template, tokenization, truncation, and whether prompt and output fit.

Everything here is synchronous and may take long on long prompts: run it in the server's executor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.api.protocol import ChatPrompt, ChatRequest, CompletionRequest, LengthOptions
from jaxserve.chat_template import ChatTemplate, normalize_messages
from jaxserve.errors import ContextLengthError, RequestError
from jaxserve.tokenizer import Tokenizer


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
    """

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    max_model_len: int
    template_kwargs: Mapping[str, Any]
    response_role: str = "assistant"

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
            all_ids = self.encode(prompt, request.add_special_tokens) if isinstance(prompt, str) else prompt
            name = f"prompt {i}" if several else "the prompt"
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

    def chat(self, request: ChatRequest) -> TokenizedPrompt:
        """The conversation of a chat request.

        Raises:
            RequestError: the template refuses the messages, there is no template, or there are no tokens.
            ContextLengthError: prompt and output do not fit.
        """
        all_ids = self.encode(self.render(request.prompt), request.add_special_tokens)
        ids, max_tokens = fit(
            all_ids, request.length, self.max_model_len, param="messages", name="the conversation"
        )
        echo = self._chat_echo(request.prompt) if request.output.echo else ""
        return TokenizedPrompt(token_ids=ids, max_tokens=max_tokens, echo=echo)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def render(self, prompt: ChatPrompt) -> str:
        """The conversation as the model reads it."""
        if self.chat_template is None:
            message = "This model has no chat template: give the server one with --chat-template"
            raise RequestError(
                f"{message}, or use /v1/completions.", param="messages", code="invalid_template"
            )
        kwargs = dict(self.template_kwargs)
        if prompt.reasoning_effort is not None:
            kwargs["reasoning_effort"] = prompt.reasoning_effort
        return self.chat_template.render(
            normalize_messages(prompt.messages, self.chat_template),
            documents=prompt.documents,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            **kwargs,
        )

    def role(self, prompt: ChatPrompt) -> str:
        """The role of the generated message."""
        if prompt.add_generation_prompt:
            return self.response_role
        return str(prompt.messages[-1]["role"])

    def _chat_echo(self, prompt: ChatPrompt) -> str:
        last = prompt.messages[-1]
        return message_text(last) if last["role"] == self.role(prompt) else ""


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
    if room < (0 if asked == 0 else 1):
        raise _too_long(
            len(token_ids), 1 if asked is None else asked, max_model_len, name, "the output", param
        )
    if asked is None:
        return token_ids, room
    if asked > room and explicit:
        field = length.max_tokens_field or "max_tokens"
        raise _too_long(len(token_ids), asked, max_model_len, name, field, field)
    return token_ids, min(asked, room)


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


def _too_long(
    num_tokens: int, asked: int, max_model_len: int, name: str, field: str, param: str
) -> ContextLengthError:
    message = (
        f"The model's context length is {max_model_len} tokens, but {name} has {num_tokens} and {field} asks "
        f"for {asked}: {num_tokens + asked} in all. Shorten the prompt or ask for fewer tokens."
    )
    return ContextLengthError(message, param=param)
