"""Conversations → text: Hugging Face chat templates, in Jinja's immutable sandbox.

The environment is the one that such templates are written for (transformers' own), made here because importing
transformers costs a second at every start.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from jaxserve.errors import ConfigError, RequestError

if TYPE_CHECKING:  # the worker that renders requests' own templates has no use for tokenizers
    from jaxserve.tokenizer import Tokenizer

MAX_ERROR_CHARS = 300
Message = Mapping[str, Any]

# what a template can raise while it runs; MemoryError is left to end the request as a failure of the server
TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RuntimeError,  # RecursionError, too
)
# where things are, here or in memory, is nobody's business
UNSPEAKABLE = (
    (re.compile(r" at 0x[0-9a-fA-F]+"), ""),
    (re.compile(r"/\S+\.py\b"), "…"),
    (re.compile(r"\b(?:jinja2|jaxserve)(?:\.\w+)*\.(\w+)"), r"\1"),
)
# put behind the last message's text to find its end in what the template makes of it
OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "


class TemplateRefusal(jinja2.TemplateError):
    """The template itself says no (`raise_exception`)."""


class ChatTemplate:
    """A compiled template.

    Args:
        special_tokens: variables like `bos_token`.
        trusted: False: to touch an unsafe attribute is an error, not just undefined as transformers has it.

    Raises:
        jinja2.TemplateSyntaxError: the source is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, trusted: bool = True) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = _environment(jinja2.sandbox.ImmutableSandboxedEnvironment if trusted else _Strict)
        self._template = environment.from_string(source)
        constants = environment.parse(source).find_all(jinja2.nodes.Const)
        self._names_developer = any(constant.value == "developer" for constant in constants)

    @property
    def names_developer(self) -> bool:
        """Whether the template itself says what to do with the role `developer`."""
        return self._names_developer

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        max_bytes: int | None = None,
    ) -> str:
        """The conversation as the model reads it.

        Args:
            variables: further ones for the template.
            continue_final_message: leave the last message open at its end.
            max_bytes: of text, in UTF-8.

        Raises:
            RequestError: the template refuses the conversation or fails (code `invalid_template`).
        """
        shown = [*messages[:-1], _with_open_end(messages[-1])] if continue_final_message else messages
        context = {
            **self._special_tokens,
            **(variables or {}),
            "messages": shown,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = "".join(_bounded(self._template.generate(context), max_bytes))
        except TEMPLATE_FAULTS as error:
            raise template_error(str(error) or type(error).__name__) from error
        return _cut_at_open_end(text, messages[-1]["content"]) if continue_final_message else text


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
        reason = f"line {error.lineno}: {error.message}"
        raise ConfigError(f"{where} is no Jinja template: {reason[:MAX_ERROR_CHARS]}.") from error


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
    return [_normalized(message, template) for message in messages]


def _normalized(message: Message, template: ChatTemplate) -> dict[str, Any]:
    # many templates ask whether a key is there, not what it is: null and none are one
    normalized = {key: value for key, value in message.items() if value is not None}
    if normalized.get("role") == "developer" and not template.names_developer:
        normalized["role"] = "system"
    content = normalized.get("content", "")
    if not isinstance(content, str):
        content = "\n".join(str(part[part["type"]]) for part in content)
    normalized["content"] = content
    calls = normalized.pop("tool_calls", None)
    if calls:
        normalized["tool_calls"] = [_parsed_call(call) for call in calls]
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


def _with_open_end(message: Message) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        raise template_error("continue_final_message needs a last message with text")
    return {**message, "content": content + OPEN_END}


def _cut_at_open_end(text: str, content: str) -> str:
    """Cut what the template put behind the last message's text, and the space there if it trimmed it."""
    end = text.rfind(OPEN_END.strip())
    if end < 0 or content.strip() not in text:
        raise template_error("continue_final_message needs a template that shows the last message as it is")
    return text[:end] if text.startswith(OPEN_END, end) else text[:end].rstrip()


def _bounded(chunks: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    size = 0
    for chunk in chunks:
        if max_bytes is not None:
            size += len(chunk) if chunk.isascii() else len(chunk.encode())
            if size > max_bytes:
                raise jinja2.TemplateError(f"it makes more than {max_bytes >> 20} MiB of text")
        yield chunk


def template_error(reason: str, *, param: str = "messages") -> RequestError:
    """The refusal of a request because of a template, in the template's own words, shortened."""
    reason = reason[: 10 * MAX_ERROR_CHARS].encode("utf-8", "replace").decode()
    for pattern, replacement in UNSPEAKABLE:
        reason = pattern.sub(replacement, reason)
    shown = reason if len(reason) <= MAX_ERROR_CHARS else reason[: MAX_ERROR_CHARS - 1] + "…"
    return RequestError(f"The chat template failed: {shown}", param=param, code="invalid_template")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant said, for training: here just its body."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a block with a scope of its own, as in transformers: what it sets does not leave it
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """A namespace that stores no names of Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without `self`, which may be a key
        namespace, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _check_public(name)
        jinja2.utils.Namespace.__init__(namespace, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace cannot store {name!r}: the name begins with an underscore"
        )


class _Strict(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox in which what is unsafe is an error even if nothing is done with it."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:  # noqa: ARG002 - the base class's signature
        raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} is unsafe")


def _environment(
    kind: type[jinja2.sandbox.ImmutableSandboxedEnvironment],
) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = kind(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
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


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002 - the name that templates use
    return datetime.now().strftime(format)  # noqa: DTZ005 - local time is what templates expect
