"""Regexes: what is refused, and one spelling for all libraries.

Clients write for Python, JavaScript, RE2 or Rust. What is emitted is Rust's syntax, in which each construct matches
what all of these agree on: `\\d` is 0-9, while `\\D` excludes every script's digits. A regex is for whole texts; in a
JSON schema `pattern` is searched for; it becomes one for the whole string, with what may surround it spelled out.
"""

from __future__ import annotations

import json
import re
import string
from typing import NamedTuple

from jaxserve.constraints.constraint import MAX_REGEX_BYTES, ConstraintError, TooComplexError

MAX_REPEAT = 10_000
MAX_GROUP_DEPTH = 64
MAX_CHOICES = 10_000
MAX_CODE_POINT = 0x10FFFF
SURROGATES = range(0xD800, 0xE000)

QUANTIFIER = re.compile(r"[*+?]|\{(?:\d+(?:,\d*)?|,\d+)\}")
NAMED_GROUP = re.compile(r"\(\?P?<[A-Za-z_]\w*>")
FLAGS = re.compile(r"\(\?([a-zA-Z]*)(-[a-zA-Z]+)?([:)])")
POSIX_CLASS = re.compile(r"\[:\^?[a-z]+:\]")
UNICODE_CLASS = re.compile(r"[pP](?:\{\^?[A-Za-z0-9_ =:.-]+\}|[A-Z])")
CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "a": 7}
# what all dialects agree to match, and what any of them matches, as the inside of a class
NARROW = {
    "d": "0-9",
    "w": r"[\p{L}\p{N}_&&\p{age=14.0}]",
    "s": r" \t\n\r\x0b\x0c",
}  # letters known since 2021
WIDE = {"d": r"\p{Nd}", "w": r"\w\p{N}", "s": r"\s\x1c-\x1f\x{feff}"}
ASCII_WORD = "0-9A-Za-z_"  # in JavaScript's, which JSON schemas use
WHITESPACE = " \t\n\r"
ANYTHING = "(?s:.*)"


class Whitespace(NamedTuple):
    """A whitespace pattern in Rust's syntax; empty if there is to be none."""

    pattern: str
    may_be_empty: bool


def translate_regex(pattern: str, *, searched: bool = False) -> str:
    """The regex in Rust's syntax.

    Args:
        searched: it need not match from the beginning to the end. The result does, and begins with ^ and ends
            with $ to say so.

    Raises:
        ConstraintError: malformed, or with something that cannot be honoured (look-around, back-references, `\\b`).
        TooComplexError: too long, or a repetition with too large a bound.
    """
    size = len(pattern.encode())
    if size > MAX_REGEX_BYTES:
        raise TooComplexError(f"A regex may have at most {MAX_REGEX_BYTES:,} bytes, got {size:,}.")
    return _Translator(pattern, searched).translate()


def translate_whitespace(pattern: str) -> Whitespace:
    """A whitespace pattern.

    Raises:
        ConstraintError, TooComplexError: it is no regex, or matches something that JSON has no room for.
    """
    translated = translate_regex(pattern).replace(NARROW["s"], r" \t\n\r")  # as JSON has it
    # every character that it names or could match is checked: a class or dot may stand for others
    bare = re.sub(r"\\x\{([0-9a-f]+)\}", lambda m: chr(int(m[1], 16)), translated)
    bare = re.sub(r"\\([tnr])", lambda m: {"t": "\t", "n": "\n", "r": "\r"}[m[1]], bare)
    bare = re.sub(r"\{[0-9,]+\}|\(\?:|[()\[\]|*+?]", "", bare)
    if set(bare) - set(WHITESPACE):
        raise ConstraintError(
            "The whitespace pattern may match only spaces, tabs, line feeds and carriage returns."
        )
    return Whitespace(translated, re.fullmatch(_for_python(translated), "") is not None)


def _for_python(translated: str) -> str:
    return re.sub(r"\\x\{([0-9a-f]+)\}", lambda m: f"\\U{int(m[1], 16):08x}", translated)


def choices_to_regex(text: str) -> str:
    """A JSON array of strings as one regex.

    Raises:
        ConstraintError: they are not distinct non-empty strings.
        TooComplexError: they are too many.
    """
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise ConstraintError("The choices must be a list of non-empty strings.")
    if len(choices) > MAX_CHOICES:
        raise TooComplexError(f"There may be at most {MAX_CHOICES:,} choices, got {len(choices):,}.")
    if len(set(choices)) < len(choices):
        raise ConstraintError("The choices must be distinct.")
    if any("\0" in choice for choice in choices):
        raise ConstraintError("A choice must not hold NUL.")
    return "(?:" + "|".join("".join(map(_literal, choice)) for choice in choices) + ")"


def _literal(character: str) -> str:
    if character.isalnum() or character in "_ \"'`<>=,:;/@!%":
        return character
    if character in string.punctuation:
        return "\\" + character
    return f"\\x{{{ord(character):x}}}" if ord(character) < 128 else character


class _Translator:
    """One pass over a pattern."""

    def __init__(self, pattern: str, searched: bool) -> None:
        self._text = pattern
        self._searched = searched
        self._at = 0
        self._out: list[str] = []
        self._alternatives: list[str] = []  # that are complete, of a regex that is searched for
        self._begins = self._ends = False  # what the current one is anchored to
        self._groups: list[bool] = []  # of each open group: whether nothing can precede what is in it
        self._first = True  # nothing precedes in this alternative
        self._repeatable = False  # the last item may be repeated
        # how often what is innermost is repeated by bounds, all nested ones together: of the last item, and at most
        # of those in each open group
        self._weight = 1
        self._weights = [1]

    def translate(self) -> str:
        while self._at < len(self._text):
            self._item()
        if self._groups:
            raise ConstraintError("The regex has a group that is not closed.")
        if not self._searched:
            return "".join(self._out)
        self._end_alternative()
        return f"^(?:{'|'.join(self._alternatives)})$"

    def _end_alternative(self) -> None:
        before, behind = "" if self._begins else ANYTHING, "" if self._ends else ANYTHING
        self._alternatives.append(f"{before}{''.join(self._out)}{behind}")
        self._out, self._begins, self._ends = [], False, False

    # --- items ----------------------------------------------------------------------------------------------

    def _item(self) -> None:
        character = self._text[self._at]
        if (quantifier := QUANTIFIER.match(self._text, self._at)) is not None:
            self._repeat(quantifier[0])
        elif character == "\\":
            self._at += 1
            self._escape()
        elif character == "[":
            self._emit(self._class())
        elif character == "(":
            self._open()
        elif character == ")":
            self._close()
        elif character == "|":
            self._at += 1
            if self._searched and not self._groups:
                self._end_alternative()
            else:
                self._out.append("|")
            self._first, self._repeatable = (self._groups[-1] if self._groups else True), False
        elif character in "^$":
            self._anchor(character)
        else:
            self._at += 1
            self._emit("." if character == "." else _literal(self._checked(character)))

    def _emit(self, item: str, weight: int = 1) -> None:
        self._out.append(item)
        self._first, self._repeatable, self._weight = False, True, weight

    def _checked(self, character: str) -> str:
        if character == "\0":
            raise ConstraintError(f"The regex must not hold NUL (at character {self._at}).")
        return character

    def _repeat(self, quantifier: str) -> None:
        if not self._repeatable:
            raise self._malformed(f"{quantifier!r} has nothing to repeat")
        self._at += len(quantifier)
        following = self._text[self._at : self._at + 1]
        if following == "+":
            raise self._malformed("possessive quantifiers are not supported")
        if following == "?":  # lazy: the set of whole matches is the same
            self._at += 1
        if quantifier.startswith("{"):
            low, comma, high = quantifier[1:-1].partition(",")
            bounds = [
                int(bound) if len(bound) < 9 else MAX_REPEAT + 1 for bound in (low or "0", high) if bound
            ]
            if max(bounds) > MAX_REPEAT:
                raise TooComplexError(
                    f"A repetition may have bounds up to {MAX_REPEAT:,}, got {quantifier[:40]}."
                )
            if len(bounds) == 2 and bounds[0] > bounds[1]:
                raise self._malformed(f"{quantifier} has its bounds the wrong way round")
            self._weight *= max(1, *bounds)
            if self._weight > MAX_REPEAT:
                raise TooComplexError(
                    f"Nested repetitions may come to at most {MAX_REPEAT:,}, got {self._weight:,}."
                )
            self._weights[-1] = max(self._weights[-1], self._weight)
            quantifier = f"{{{low or 0}{comma}{high}}}"
        self._out.append(quantifier)
        self._repeatable = False

    def _open(self) -> None:
        rest = self._text[self._at : self._at + 4]
        if rest.startswith(("(?=", "(?!", "(?<=", "(?<!")):
            raise self._malformed("look-around is not supported")
        if rest.startswith(("(?P=", "(?P>", "(?(")):
            raise self._malformed("back-references and conditions are not supported")
        if rest.startswith("(?>"):
            raise self._malformed("atomic groups are not supported")
        if rest.startswith("(?#"):
            end = self._text.find(")", self._at)
            if end < 0:
                raise self._malformed("a comment is not closed")
            self._at = end + 1
            return
        emitted = "(?:"
        if (named := NAMED_GROUP.match(self._text, self._at)) is not None:
            self._at += len(named[0])
        elif rest.startswith("(?"):
            flags = FLAGS.match(self._text, self._at)
            if flags is None or set(flags[1] + (flags[2] or "")) - set("isu-"):
                raise self._malformed(
                    "only the groups (…), (?:…), (?P<name>…) and the flags i and s are supported"
                )
            self._at += len(flags[0])
            on, off = flags[1].replace("u", ""), (flags[2] or "").replace("u", "")
            switches = on + (off if off != "-" else "")
            if flags[3] == ")":
                self._out.append(f"(?{switches})" if switches else "")
                return
            emitted = f"(?{switches}:"
        else:
            self._at += 1
        if len(self._groups) >= MAX_GROUP_DEPTH:
            raise TooComplexError(f"The regex has groups nested deeper than {MAX_GROUP_DEPTH}.")
        self._out.append(emitted)
        self._groups.append(self._first)
        self._weights.append(1)
        self._repeatable = False

    def _close(self) -> None:
        if not self._groups:
            raise self._malformed("a parenthesis is closed that was not opened")
        self._at += 1
        self._groups.pop()
        weight = self._weights.pop()
        self._weights[-1] = max(self._weights[-1], weight)
        self._emit(")", weight)

    def _anchor(self, character: str) -> None:
        self._at += 1
        self._repeatable = False
        if self._searched and self._groups:
            raise self._malformed("anchors inside groups are not supported")
        if character == "^" and not self._first:
            raise self._malformed("^ is only supported at the beginning")
        if character == "$" and not self._is_end():
            raise self._malformed("$ is only supported at the end")
        if character == "^":
            self._begins = True
        else:
            self._ends = True

    def _is_end(self) -> bool:
        """Whether what follows can only be the end of the text."""
        rest = self._text[self._at :].lstrip(")")
        closed = len(self._text) - self._at - len(rest)
        return not rest or (rest[0] == "|" and closed == len(self._groups))

    def _malformed(self, what: str) -> ConstraintError:
        return ConstraintError(f"The regex cannot be used: {what} (at character {self._at}).")

    # --- escapes --------------------------------------------------------------------------------------------

    def _escape(self) -> None:
        kind = self._text[self._at : self._at + 1]
        if kind in ("A", "Z", "z"):
            self._anchor("^" if kind == "A" else "$")
        elif kind and kind in "dws":
            self._at += 1
            self._emit(f"[{self._narrow(kind)}]")
        elif kind and kind in "DWS":
            self._at += 1
            self._emit(f"[^{WIDE[kind.lower()]}]")
        elif (unicode := UNICODE_CLASS.match(self._text, self._at)) is not None:
            self._at += len(unicode[0])
            self._emit("\\" + unicode[0])
        else:
            self._emit(_literal(chr(self._code_point())))

    def _narrow(self, kind: str) -> str:
        return ASCII_WORD if kind == "w" and self._searched else NARROW[kind]

    def _code_point(self) -> int:
        """The character that an escape stands for; the backslash has been read."""
        kind = self._text[self._at : self._at + 1]
        if not kind:
            raise self._malformed("it ends with a backslash")
        if kind in "bB":
            raise self._malformed(r"word boundaries (\b, \B) are not supported")
        if kind in "123456789" or kind in "kg":
            raise self._malformed("back-references are not supported")
        self._at += 1
        if kind in CONTROLS:
            return CONTROLS[kind]
        if kind in "xuU":
            return self._hexadecimal({"x": 2, "u": 4, "U": 8}[kind])
        if kind == "c" and self._text[self._at : self._at + 1] in tuple(string.ascii_letters):
            self._at += 1
            return ord(self._text[self._at - 1].upper()) - 64
        if kind == "0":
            raise ConstraintError("The regex must not hold NUL.")
        if kind in string.ascii_letters:
            raise self._malformed(f"\\{kind} is not supported")
        return ord(self._checked(kind))

    def _hexadecimal(self, digits: int) -> int:
        braced = re.compile(r"\{([0-9a-fA-F]{1,8})\}").match(self._text, self._at)
        exact = re.compile(rf"[0-9a-fA-F]{{{digits}}}").match(self._text, self._at)
        found = braced or exact
        if found is None:
            raise self._malformed("an escape lacks its hexadecimal digits")
        self._at += len(found[0])
        value = int(braced[1] if braced else found[0], 16)
        if value == 0:
            raise ConstraintError("The regex must not hold NUL.")
        if value > MAX_CODE_POINT or value in SURROGATES:
            raise self._malformed("an escape stands for no character")
        return value

    # --- classes --------------------------------------------------------------------------------------------

    def _class(self) -> str:
        start = self._at
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        members: list[str] = []
        while not self._text.startswith("]", self._at) or (not members and self._has_another_end()):
            if self._at >= len(self._text):
                self._at = start
                raise self._malformed("a class is not closed")
            members.append(self._member(negated))
        self._at += 1
        if not members:
            raise self._malformed("a class is empty")
        return f"[{'^' if negated else ''}{''.join(members)}]"

    def _has_another_end(self) -> bool:
        """`]` right at the beginning of a class is a member, as Python and RE2 have it."""
        return "]" in self._text[self._at + 1 :]

    def _member(self, negated: bool) -> str:
        if (posix := POSIX_CLASS.match(self._text, self._at)) is not None:
            self._at += len(posix[0])
            return posix[0]
        if self._text[self._at] == "\\":
            kind = self._text[self._at + 1 : self._at + 2]
            if kind and kind in "dwsDWS":
                self._at += 2
                # in a negated class the roles of narrow and wide are exchanged
                inside = WIDE[kind.lower()] if kind.isupper() != negated else self._narrow(kind.lower())
                return f"[^{inside}]" if kind.isupper() else inside
            if (unicode := UNICODE_CLASS.match(self._text, self._at + 1)) is not None:
                self._at += 1 + len(unicode[0])
                return "\\" + unicode[0]
        low = self._class_character()
        is_range = self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at)
        if not is_range:
            return _literal(chr(low))
        self._at += 1
        if re.compile(r"\\[dwsDWSpP]").match(self._text, self._at) or self._at >= len(self._text):
            raise self._malformed("a range ends with a class")
        high = self._class_character()
        if high < low:
            raise self._malformed("a range has its ends the wrong way round")
        return f"{_literal(chr(low))}-{_literal(chr(high))}"

    def _class_character(self) -> int:
        character = self._text[self._at]
        self._at += 1
        if character != "\\":
            return ord(self._checked(character))
        if self._text.startswith("b", self._at):  # a backspace here
            self._at += 1
            return 8
        return self._code_point()
