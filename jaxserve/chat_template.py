"""Conversations → text: Hugging Face chat templates, in Jinja's immutable sandbox.

The environment is the one that such templates are written for (transformers' own), made here because importing
transformers costs a second at every start.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jaxserve.errors import ConfigError, RequestError
from jaxserve.tokenizer import Tokenizer

MAX_ERROR_CHARS = 300
Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template.

    Args:
        special_tokens: variables like `bos_token`.

    Raises:
        jinja2.TemplateSyntaxError: the source is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._template = _environment().from_string(source)

    @property
    def knows_developer(self) -> bool:
        """Whether the template itself says what to do with the role `developer`."""
        return "developer" in self.source

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The conversation as the model reads it.

        Args:
            continue_final_message: leave the last message open at its end.
            kwargs: further template variables.

        Raises:
            RequestError: the template refuses the conversation or fails (code `invalid_template`).
        """
        variables = {
            **self._special_tokens,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "documents": documents,
        }
        try:
            text = self._template.render(**variables, add_generation_prompt=add_generation_prompt)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            raise _failed(str(error) or type(error).__name__) from error
        return _open_last_message(text, messages[-1]) if continue_final_message else text


def load_chat_template(argument: str | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of `--chat-template` (a file, or the text itself), else the model's own, else None.

    Raises:
        ConfigError: it is neither a file nor a template.
    """
    source = tokenizer.chat_template
    if argument is not None:
        source = _read_argument(argument)
    if source is None:
        return None
    try:
        return ChatTemplate(source, tokenizer.special_tokens)
    except jinja2.TemplateSyntaxError as error:
        where = "--chat-template" if argument is not None else "The model's chat template"
        raise ConfigError(f"{where} is no Jinja template: line {error.lineno}: {error.message}.") from error


def _read_argument(argument: str) -> str:
    looks_like_text = "{" in argument or "\n" in argument
    try:
        if Path(argument).is_file():
            return Path(argument).read_text("utf-8")
    except (OSError, ValueError) as error:
        if not looks_like_text:
            raise ConfigError(f"--chat-template: {argument[:100]} cannot be read: {error}.") from error
    if not looks_like_text:
        raise ConfigError(
            f"--chat-template: {argument[:100]!r} is no file, and no template (there is no {{ in it)."
        )
    return argument


def normalize_messages(messages: Sequence[Message], template: ChatTemplate) -> list[dict[str, Any]]:
    """OpenAI's messages as templates expect them: text parts joined by line breaks, `developer` as `system`
    unless the template names it, the arguments of tool calls as objects where they are JSON."""
    normalized = []
    for message in messages:
        copy = dict(message)
        if copy.get("role") == "developer" and not template.knows_developer:
            copy["role"] = "system"
        content = copy.get("content")
        if isinstance(content, list):
            copy["content"] = "\n".join(part[part["type"]] for part in content)
        elif content is None:
            copy["content"] = ""
        if copy.get("tool_calls"):
            copy["tool_calls"] = [_parsed_call(call) for call in copy["tool_calls"]]
        normalized.append(copy)
    return normalized


def _parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = arguments
        function["arguments"] = parsed if isinstance(parsed, dict) else arguments
    return {**call, "function": function}


def _open_last_message(text: str, last: Message) -> str:
    """Cut what the template put behind the last message's text."""
    content = str(last.get("content") or "")
    core = content.strip()
    if not core or core not in text:
        raise _failed("continue_final_message needs a last message whose text the template shows as it is")
    start = text.rindex(core)
    with_space = content.lstrip()
    end = start + (len(with_space) if text.startswith(with_space, start) else len(core))
    return text[:end]


def _failed(reason: str) -> RequestError:
    shown = reason if len(reason) <= MAX_ERROR_CHARS else reason[: MAX_ERROR_CHARS - 1] + "…"
    return RequestError(f"The chat template failed: {shown}", param="messages", code="invalid_template")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant said, for training: here just its body."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML, which no model was trained on."""
    dumps: Callable[..., str] = json.dumps
    return dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - the name that templates use
    return datetime.now().strftime(format)  # noqa: DTZ005 - local time is what templates expect
