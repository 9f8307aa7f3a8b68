"""Generated text → content and tool calls, piece by piece: however the text is cut, the joined result is the same.

Text that may be the beginning of a call is held back until that is decided. A call's arguments are shown as they
arrive once its beginning is complete; what turns out not to be a call is content.
"""

from __future__ import annotations

import ast
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

from jaxserve.config import ToolCallParserName


class Text(NamedTuple):
    """Content."""

    text: str


class CallStart(NamedTuple):
    """A call begins."""

    name: str


class Arguments(NamedTuple):
    """A piece of the last call's arguments, which are JSON text."""

    text: str


Piece = Text | CallStart | Arguments


class ToolCallParser(ABC):
    """Takes one choice's text."""

    @abstractmethod
    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain now."""

    @abstractmethod
    def finish(self) -> list[Piece]:
        """The text has ended, perhaps in the middle of a call: the remaining pieces."""

    @property
    @abstractmethod
    def is_holding_back(self) -> bool:
        """Whether text has come that may still be shown."""


def auto_parser(name: ToolCallParserName, names: Collection[str]) -> ToolCallParser:
    """The parser of that name for free text with calls of the functions `names`."""
    match name:
        case "hermes":
            return HermesParser(names)
        case "llama3_json":
            return Llama3JsonParser(names)
    return PythonicParser(names)


class NamedCallParser(ToolCallParser):
    """The whole text is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = False

    def push(self, text: str) -> list[Piece]:
        pieces = self.finish()
        return [*pieces, Arguments(text)] if text else pieces

    def finish(self) -> list[Piece]:
        if self._started:
            return []
        self._started = True
        return [CallStart(self._name)]

    @property
    def is_holding_back(self) -> bool:
        return False


class FirstCallOnly(ToolCallParser):
    """Drops all calls but the first."""

    def __init__(self, parser: ToolCallParser) -> None:
        self._parser = parser
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        return self._filtered(self._parser.push(text))

    def finish(self) -> list[Piece]:
        return self._filtered(self._parser.finish())

    @property
    def is_holding_back(self) -> bool:
        return self._parser.is_holding_back

    def _filtered(self, pieces: Sequence[Piece]) -> list[Piece]:
        kept = []
        for piece in pieces:
            self._num_calls += isinstance(piece, CallStart)
            if isinstance(piece, Text) or self._num_calls <= 1:
                kept.append(piece)
        return kept


# --- calls that are JSON objects ------------------------------------------------------------------------------

# the usual beginning of a call, up to its arguments, which begin with the last character
HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
BRACKETS = re.compile(r'["\\{}\[\]]')


class JsonScanner:
    """Finds where brackets of JSON text close.

    Args:
        depth: of brackets that are open already.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False  # the next character means nothing

    def until(self, depth: int, text: str) -> int | None:
        """Take text up to the bracket with which the depth falls to `depth`: the index behind it.

        Returns:
            None if all of the text was taken and that bracket is not in it.
        """
        start = 0
        if self._escaped and text:
            self._escaped, start = False, 1
        while match := BRACKETS.search(text, start):
            start = match.end()
            character = match[0]
            if character == "\\":
                if self._in_string and start == len(text):
                    self._escaped = True
                start += self._in_string
            elif character == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if character in "{[" else -1
                if self._depth <= depth and character in "}]":
                    return start
        return None


class CallObject:
    """One `{"name": …, "arguments": {…}}` (or "parameters") as it arrives.

    Args:
        names: functions that may be called.

    Attributes:
        state: "head": not known to be a call; "arguments", "tail": it is one; "done"; "failed": it is none.
        raw: all that it has taken, as long as it is not known to be a call.
        rest: the text behind its end, once it is done or has failed.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.state: Literal["head", "arguments", "tail", "done", "failed"] = "head"
        self.raw = ""
        self.rest = ""
        self._names = names
        self._scanner = JsonScanner()

    def push(self, text: str) -> list[Piece]:
        """Take text. Not to be called again once it is done or has failed."""
        pieces: list[Piece] = []
        if self.state == "head":
            taken = len(self.raw)
            self.raw += text
            head = HEAD.match(self.raw)
            if head is None or head[1] not in self._names:
                return self._scan_unknown(taken, text)
            self.state = "arguments"
            self._scanner = JsonScanner(1)
            pieces.append(CallStart(head[1]))
            text = self.raw[head.end() :]
        if self.state == "arguments":
            end = self._scanner.until(1, text)
            if text:
                pieces.append(Arguments(text if end is None else text[:end]))
            if end is None:
                return pieces
            self.state, text = "tail", text[end:]
        end = self._scanner.until(0, text)
        if end is not None:
            self.state, self.rest = "done", text[end:]
        return pieces

    def _scan_unknown(self, taken: int, text: str) -> list[Piece]:
        """Wait for the object's end, and look at it whole."""
        end = self._scanner.until(0, text)
        if end is None:
            return []
        end += taken
        self.raw, self.rest = self.raw[:end], self.raw[end:]
        call = self._whole_call()
        self.state = "done" if call else "failed"
        return call

    def _whole_call(self) -> list[Piece]:
        try:
            value = json.loads(self.raw)
        except (ValueError, RecursionError):
            return []
        arguments = value.get("arguments", value.get("parameters", {})) if isinstance(value, dict) else None
        if not isinstance(arguments, dict) or value.get("name") not in self._names:
            return []
        return [CallStart(value["name"]), Arguments(json.dumps(arguments, ensure_ascii=False))]


class CallArrayParser(ToolCallParser):
    """The whole text is a JSON array of calls, as a constraint makes it."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._object: CallObject | None = None

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if self._object is None:
                start = text.find("{")
                if start < 0:
                    break
                self._object, text = CallObject(self._names), text[start:]
            call = self._object
            pieces += call.push(text)
            if call.state not in ("done", "failed"):
                break
            self._object, text = None, call.rest
        return pieces

    def finish(self) -> list[Piece]:
        return []

    @property
    def is_holding_back(self) -> bool:
        return False


class _FreeTextParser(ToolCallParser):
    """What parsers of free text share: whitespace around calls belongs to nobody.

    Subclasses take from `_buffer` in `_step`, as long as there is something to decide.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._buffer = ""  # not yet decided
        self._after_call = False  # only whitespace has come since the last call

    def push(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    @abstractmethod
    def _step(self, pieces: list[Piece]) -> bool:
        """Decide about some of the buffer; False if that needs more text."""

    def _content(self, text: str) -> list[Piece]:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return []
        self._after_call = False
        return [Text(text)]

    def _take_content(self) -> list[Piece]:
        text, self._buffer = self._buffer, ""
        return self._content(text)


class HermesParser(_FreeTextParser):
    """Calls between `<tool_call>` and `</tool_call>`, as ChatML models write them; text around them is content."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._state: Literal["text", "open", "call", "close"] = "text"
        self._opening = ""  # the tag and the whitespace around it: content if no call follows
        self._call = CallObject(names)

    def _step(self, pieces: list[Piece]) -> bool:
        match self._state:
            case "text":
                return self._find_tag(pieces)
            case "open":
                return self._begin_call(pieces)
            case "call":
                return self._go_on_with_call(pieces)
        return self._close_call()

    def _find_tag(self, pieces: list[Piece]) -> bool:
        start = self._buffer.find(self.OPEN)
        if start >= 0:
            content = self._buffer[:start].rstrip()
            pieces += self._content(content)
            end = start + len(self.OPEN)
            self._opening, self._buffer = self._buffer[len(content) : end], self._buffer[end:]
            self._state = "open"
            return True
        content = self._without_beginning_of_tag(self._buffer).rstrip()
        pieces += self._content(content)
        self._buffer = self._buffer[len(content) :]
        return False

    def _without_beginning_of_tag(self, text: str) -> str:
        longest = min(len(self.OPEN) - 1, len(text))
        return next(
            (text[:-n] for n in range(longest, 0, -1) if text.endswith(self.OPEN[:n])),
            text,
        )

    def _begin_call(self, pieces: list[Piece]) -> bool:
        text = self._buffer.lstrip()
        self._opening += self._buffer[: len(self._buffer) - len(text)]
        self._buffer = text
        if not text:
            return False
        if text.startswith("{"):
            self._call, self._state = CallObject(self._names), "call"
        else:
            pieces += self._content(self._opening)
            self._opening, self._state = "", "text"
        return True

    def _go_on_with_call(self, pieces: list[Piece]) -> bool:
        text, self._buffer = self._buffer, ""
        if not text:
            return False
        pieces += self._call.push(text)
        if self._call.state == "failed":
            pieces += self._content(self._opening + self._call.raw)
            self._buffer, self._state = self._call.rest, "text"
        elif self._call.state == "done":
            self._buffer, self._state = self._call.rest, "close"
        return self._call.state in ("done", "failed")

    def _close_call(self) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(self.CLOSE):
            text = text[len(self.CLOSE) :]
        elif self.CLOSE.startswith(text):
            return False
        self._buffer, self._state, self._after_call = text, "text", True
        return True

    def finish(self) -> list[Piece]:
        match self._state:
            case "text":
                return self._take_content()
            case "open":
                return self._content(self._opening)
            case "call" if self._call.state == "head":
                return self._content(self._opening + self._call.raw)
        return []

    @property
    def is_holding_back(self) -> bool:
        if self._state == "call":
            return self._call.state == "head"
        return bool(self._buffer) or self._state == "open"


class _WholeAnswerParser(_FreeTextParser):
    """The answer is calls from its beginning, or content."""

    OPENING: str

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._state: Literal["start", "calls", "text"] = "start"

    def _step(self, pieces: list[Piece]) -> bool:
        match self._state:
            case "start":
                return self._look_at_the_beginning()
            case "calls":
                return self._next_call(pieces)
        pieces += self._take_content()
        return False

    def _look_at_the_beginning(self) -> bool:
        text = self._buffer.lstrip()
        if not text:
            return False
        self._state = "calls" if text.startswith(self.OPENING) else "text"
        return True

    @abstractmethod
    def _next_call(self, pieces: list[Piece]) -> bool:
        """Like `_step`, where calls may come."""

    def finish(self) -> list[Piece]:
        return self._take_content()

    @property
    def is_holding_back(self) -> bool:
        return bool(self._buffer)


class Llama3JsonParser(_WholeAnswerParser):
    """`{"name": …, "parameters": {…}}`, several with semicolons between them, as Llama 3 writes them."""

    OPENING = "{"
    TAG = "<|python_tag|>"  # where special tokens are shown
    BEGINNING = re.compile(r"\s*(?:<\|python_tag\|>)?\s*")
    BETWEEN = re.compile(r"[\s;]*")

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._call: CallObject | None = None
        self._opening = ""  # what precedes it: content if it is none

    def _look_at_the_beginning(self) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(self.TAG):
            self._state = "calls"
            return True
        return not self.TAG.startswith(text) and super()._look_at_the_beginning()

    def _next_call(self, pieces: list[Piece]) -> bool:
        if self._call is None and not self._begin_call():
            return False
        if self._call is None:
            return True
        text, self._buffer = self._buffer, ""
        if not text:
            return False
        pieces += self._call.push(text)
        if self._call.state == "failed":
            self._buffer, self._state = self._opening + self._call.raw + self._call.rest, "text"
        elif self._call.state == "done":
            self._buffer, self._after_call = self._call.rest, True
        else:
            return False
        self._call = None
        return True

    def _begin_call(self) -> bool:
        """Whether it is decided if another call comes."""
        opening = self.BETWEEN if self._after_call else self.BEGINNING
        match = opening.match(self._buffer)
        assert match is not None, "the pattern matches the empty text"
        start = match.end()
        if start == len(self._buffer):
            return False
        if self._buffer[start] == "{":
            self._opening, self._buffer = self._buffer[:start], self._buffer[start:]
            self._call = CallObject(self._names)
        else:
            self._state = "text"
        return True

    def finish(self) -> list[Piece]:
        if self._call is not None and self._call.state == "head":
            return self._content(self._opening + self._call.raw)
        if self._after_call and not self._buffer.strip(" \t\r\n;"):
            return []
        return self._take_content()

    @property
    def is_holding_back(self) -> bool:
        return bool(self._buffer) or (self._call is not None and self._call.state == "head")


class PythonicParser(_WholeAnswerParser):
    """`[f(a=1, b="x"), g()]`: calls as Python writes them, each shown when it is complete."""

    OPENING = "["
    SEPARATOR = re.compile(r"[\s,]*")
    CALL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\s*\(")
    PART_OF_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\s*\Z")
    MARKS = re.compile(r"[\"'\\()\[\]{}]")

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._opened = False  # the list's bracket has been taken, by the first complete call
        self._scanned = 0  # of the buffer
        self._depth = 0
        self._quote = ""

    def _next_call(self, pieces: list[Piece]) -> bool:
        start = self._start_of_call()
        text = self._buffer
        if start == len(text):
            return False
        if self._opened and text[start] == "]":
            self._buffer, self._state = text[start + 1 :], "text"
            return True
        if not self.CALL.match(text, start):
            if self.PART_OF_NAME.match(text, start):
                return False
            self._state = "text"
            return True
        end = self._end_of_call(start)
        if end is None:
            return False
        call = _parsed_call(text[start:end], self._names)
        if not call:
            self._state = "text"
            return True
        pieces += call
        self._buffer, self._opened, self._after_call = text[end:], True, True
        self._scanned, self._depth = 0, 0
        return True

    def _start_of_call(self) -> int:
        start = 0
        if not self._opened:
            start = len(self._buffer) - len(self._buffer.lstrip()) + 1
        separator = self.SEPARATOR.match(self._buffer, start)
        assert separator is not None, "the pattern matches the empty text"
        return separator.end()

    def _end_of_call(self, start: int) -> int | None:
        """Index behind the bracket that closes the call; None if it has not come."""
        at = max(self._scanned, start)
        while match := self.MARKS.search(self._buffer, at):
            at = match.end()
            mark = match[0]
            if self._quote:
                if mark == "\\":
                    if at == len(self._buffer):  # what it escapes has not come
                        at -= 1
                        break
                    at += 1
                elif mark == self._quote:
                    self._quote = ""
            elif mark in "\"'":
                self._quote = mark
            elif mark in "([{":
                self._depth += 1
            elif mark in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    return at
        else:
            at = len(self._buffer)
        self._scanned = at
        return None


JSON_NAMES = {"true": True, "false": False, "null": None}


def _parsed_call(source: str, names: Collection[str]) -> list[Piece]:
    """A call with keyword arguments that are literals; nothing if it is anything else."""
    try:
        call = ast.parse(source, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            return []
        arguments = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        if call.func.id not in names or None in arguments:
            return []
        return [
            CallStart(call.func.id),
            Arguments(json.dumps(arguments, ensure_ascii=False, allow_nan=False)),
        ]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in JSON_NAMES:
            return JSON_NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=members) | ast.Tuple(elts=members):
            return [_literal(member) for member in members]
        case ast.Dict(keys=keys, values=members):
            return {_key(key): _literal(member) for key, member in zip(keys, members, strict=True)}
    raise ValueError("no literal")


def _key(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(value=str() as key):
            return key
    raise ValueError("no key")
