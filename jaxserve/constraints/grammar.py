"""Context-free grammars: Lark's notation, or GBNF, checked before a library sees them.

A grammar must have a rule `start` from which some finite text can be made; every name in it must be defined, and what
reaches beyond text (special tokens, embedded schemas, a library's own directives) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import llguidance.gbnf_to_lark

from jaxserve.constraints.constraint import ConstraintError, TooComplexError
from jaxserve.constraints.regex import MAX_REPEAT, translate_regex

MAX_RULES = 1_000
MAX_DEPTH = 64
START = "start"
# what Lark's own library calls common
COMMON = frozenset(
    {
        *(
            "DIGIT",
            "HEXDIGIT",
            "INT",
            "SIGNED_INT",
            "DECIMAL",
            "FLOAT",
            "SIGNED_FLOAT",
            "NUMBER",
            "SIGNED_NUMBER",
        ),
        *(
            "ESCAPED_STRING",
            "LCASE_LETTER",
            "UCASE_LETTER",
            "LETTER",
            "WORD",
            "CNAME",
            "WS_INLINE",
            "WS",
            "CR",
            "LF",
        ),
        *("NEWLINE", "SH_COMMENT", "CPP_COMMENT", "C_COMMENT", "SQL_COMMENT"),
    }
)

OWN_DIRECTIVE = re.compile(r"^%llguidance .*$", re.MULTILINE)
TOKEN = re.compile(
    r"""
      (?P<space> [ \t\r\f]+ | //[^\n]* | \#[^\n]* )
    | (?P<newline> \n )
    | (?P<string> "(?:\\.|[^"\\\n])*"i? )
    | (?P<regex> /(?!/)(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n\[])+/[imslux]* )
    | (?P<directive> %[a-z_]+ )
    | (?P<special> <[^\s<>]*> )
    | (?P<name> [!?]*[_A-Za-z][_A-Za-z0-9]* )
    | (?P<number> -?[0-9]+ )
    | (?P<operator> -> | \.\. | [:|()\[\]*+?~.,{}] )
    """,
    re.VERBOSE,
)


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


class _Node(NamedTuple):
    """A part of a rule: alternatives of sequences; a name; a terminal text (no names below); a repetition."""

    kind: str  # "choice", "sequence", "name", "text", "repeat"
    members: tuple[_Node, ...] = ()
    name: str = ""
    at_least: int = 1


def to_lark(text: str) -> str:
    """The grammar in Lark's notation; GBNF (`root ::= …`) is translated.

    Raises:
        ConstraintError: it is empty, or no grammar in GBNF.
    """
    if not text.strip():
        raise ConstraintError("The grammar is empty.")
    if "\0" in text:
        raise ConstraintError("The grammar must not hold NUL.")
    if "::=" not in text:
        return text
    try:
        lark = str(llguidance.gbnf_to_lark.any_to_lark(text))
    except Exception as error:  # the library raises the base class itself
        raise ConstraintError(f"The grammar cannot be read as GBNF: {str(error)[:200]}.") from error
    return OWN_DIRECTIVE.sub("", lark)  # clients may not use it


def check_grammar(lark: str) -> None:
    """Whether the grammar is one that can be enforced.

    Raises:
        ConstraintError: it cannot; the message names the line or the rule.
        TooComplexError: it has too many rules, or is nested too deeply.
    """
    rules = _Parser(lark).parse()
    if START not in rules:
        raise ConstraintError(f"The grammar has no rule {START!r}.")
    for name, rule in rules.items():
        for used in _names(rule):
            if used not in rules:
                raise ConstraintError(f"The grammar's rule {name!r} uses {used!r}, which is not defined.")
    finite: set[str] = set()
    while found := {name for name, rule in rules.items() if name not in finite and _is_finite(rule, finite)}:
        finite |= found
    for name in rules:
        if name not in finite:
            raise ConstraintError(f"The grammar's rule {name!r} never ends: it always leads back to itself.")


def _names(node: _Node) -> Iterator[str]:
    if node.kind == "name":
        yield node.name
    for member in node.members:
        yield from _names(member)


def _is_finite(node: _Node, finite: set[str]) -> bool:
    """Whether the node has a finite text, if just these rules have one."""
    match node.kind:
        case "name":
            return node.name in finite
        case "choice":
            return any(_is_finite(member, finite) for member in node.members)
        case "repeat" if node.at_least == 0:
            return True
    return all(_is_finite(member, finite) for member in node.members)


class _Parser:
    """Reads Lark's notation."""

    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._at = 0
        self._rules: dict[str, _Node] = {}

    def parse(self) -> dict[str, _Node]:
        while (token := self._peek()).kind != "end":
            if token.kind == "newline":
                self._next()
            elif token.kind == "directive":
                self._directive()
            elif token.kind == "name":
                self._rule()
            else:
                raise self._unexpected(token)
        return self._rules

    # --- statements -----------------------------------------------------------------------------------------

    def _rule(self) -> None:
        token = self._next()
        name = token.text.lstrip("!?")
        if self._take("."):
            self._expect_kind("number")  # a priority
        if (token := self._peek()).text in ("{", "["):
            raise self._refused("templates and attributes of rules are", token)
        if name in self._rules:
            raise ConstraintError(f"The grammar defines {name!r} twice (line {token.line}).")
        if len(self._rules) >= MAX_RULES:
            raise TooComplexError(f"The grammar has more than {MAX_RULES:,} rules.")
        self._expect(":")
        self._rules[name] = self._choice(0)
        self._end_of_statement()

    def _directive(self) -> None:
        token = self._next()
        match token.text:
            case "%ignore":
                self._choice(0)
            case "%import":
                self._import(token)
            case _:
                raise self._refused(f"{token.text} is", token)
        self._end_of_statement()

    def _import(self, token: _Token) -> None:
        """`%import common.X [-> Y]`, or `%import common (X, Y)`."""
        path = [self._expect_kind("name").text]
        while self._take("."):
            path.append(self._expect_kind("name").text)
        names = path[1:]
        if self._take("("):
            names = [self._expect_kind("name").text]
            while self._take(","):
                names.append(self._expect_kind("name").text)
            self._expect(")")
        if path[0] != "common" or not names or len(path) > 2:
            raise self._refused("imports from other modules than common are", token)
        for name in names:
            if name not in COMMON:
                raise ConstraintError(f"The grammar imports common.{name[:50]}, which does not exist.")
        if self._take("->"):
            names = [self._expect_kind("name").text]
        for name in names:
            self._rules[name] = _Node("text")

    def _end_of_statement(self) -> None:
        token = self._peek()
        if token.kind not in ("newline", "end"):
            raise self._unexpected(token)

    # --- expressions ----------------------------------------------------------------------------------------

    def _choice(self, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            raise TooComplexError(f"The grammar is nested deeper than {MAX_DEPTH}.")
        members = [self._sequence(depth)]
        while self._continues():
            members.append(self._sequence(depth))
        return _Node("choice", tuple(members))

    def _continues(self) -> bool:
        """Whether another alternative follows; it may stand on a line of its own."""
        at = self._at
        while self._tokens[at].kind == "newline":
            at += 1
        if self._tokens[at].text == "|" and self._tokens[at].kind == "operator":
            self._at = at + 1
            return True
        return False

    def _sequence(self, depth: int) -> _Node:
        members = []
        while True:
            token = self._peek()
            if token.kind in ("string", "regex", "name", "number", "special", "directive"):
                members.append(self._repeated(self._atom()))
            elif token.kind == "operator" and token.text in ("(", "["):
                members.append(self._repeated(self._group(depth)))
            else:
                break
        if self._take("->"):  # an alias
            self._expect_kind("name")
        return _Node("sequence", tuple(members))

    def _group(self, depth: int) -> _Node:
        opening = self._next()
        inner = self._choice(depth + 1)
        self._expect({"(": ")", "[": "]"}[opening.text])
        return inner if opening.text == "(" else _Node("repeat", (inner,), at_least=0)

    def _atom(self) -> _Node:
        token = self._next()
        if token.kind == "special":
            raise self._refused("special tokens are", token)
        if token.kind in ("number", "directive"):
            raise self._unexpected(token)
        if token.kind == "regex":
            try:
                translate_regex(token.text[1 : token.text.rindex("/")])
            except ConstraintError as error:
                raise type(error)(f"{str(error).rstrip('.')} (line {token.line}).") from None
        if token.kind == "string" and self._take(".."):
            self._expect_kind("string")
        if token.kind == "name":
            if self._peek().text == "{":
                raise self._refused("templates are", token)
            return _Node("name", name=token.text)
        return _Node("text")

    def _repeated(self, node: _Node) -> _Node:
        while self._peek().kind == "operator" and self._peek().text in ("*", "+", "?", "~"):
            operator = self._next().text
            if operator != "~":
                node = _Node("repeat", (node,), at_least=int(operator == "+"))
                continue
            low = high = self._bound()
            if self._take(".."):
                high = self._bound()
            if not 0 <= low <= high:
                raise ConstraintError(f"The grammar repeats something ~{low}..{high} times.")
            node = _Node("repeat", (node,), at_least=low)
        return node

    def _bound(self) -> int:
        token = self._expect_kind("number")
        bound = int(token.text) if len(token.text) < 9 else MAX_REPEAT + 1
        if bound > MAX_REPEAT:
            raise TooComplexError(f"A repetition may have bounds up to {MAX_REPEAT:,} (line {token.line}).")
        return bound

    # --- tokens ---------------------------------------------------------------------------------------------

    def _peek(self) -> _Token:
        return self._tokens[self._at]

    def _next(self) -> _Token:
        token = self._tokens[self._at]
        self._at += token.kind != "end"
        return token

    def _take(self, operator: str) -> bool:
        token = self._peek()
        taken = token.kind == "operator" and token.text == operator
        self._at += taken
        return taken

    def _expect(self, operator: str) -> None:
        if not self._take(operator):
            raise self._unexpected(self._peek())

    def _expect_kind(self, kind: str) -> _Token:
        token = self._next()
        if token.kind != kind:
            raise self._unexpected(token)
        return token

    @staticmethod
    def _unexpected(token: _Token) -> ConstraintError:
        shown = {"end": "its end", "newline": "the end of the line"}.get(token.kind, repr(token.text[:50]))
        return ConstraintError(f"The grammar is malformed: {shown} is not expected in line {token.line}.")

    @staticmethod
    def _refused(what: str, token: _Token) -> ConstraintError:
        return ConstraintError(f"The grammar cannot be used: {what} not supported (line {token.line}).")


def _tokens(text: str) -> Iterator[_Token]:
    at, line = 0, 1
    while at < len(text):
        found = TOKEN.match(text, at)
        if found is None:
            raise ConstraintError(f"The grammar is malformed: {text[at : at + 20]!r} in line {line}.")
        kind = str(found.lastgroup)
        if kind != "space":
            yield _Token(kind, found[0], line)
        line += kind == "newline"
        at = found.end()
    yield _Token("end", "", line)
