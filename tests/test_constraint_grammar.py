"""Grammars: every text parses as `lark` sees it, and what never ends or reaches beyond text is refused."""

from __future__ import annotations

import re

import lark
import pytest

from jaxserve.constraints.constraint import Constraint, ConstraintError, TooComplexError
from jaxserve.constraints.grammar import check_grammar, to_lark
from tests.constraint_walks import BYTE_COMPILER, texts_of

GRAMMARS = [
    'start: "a" | "b" start',
    'start: WORD " " NUMBER\n%import common.WORD\n%import common.NUMBER',
    '?start: expr\n?expr: term (("+"|"-") term)*\n?term: f (("*"|"/") f)*\nf: N | "(" expr ")"\nN: /[0-9]+/',
    'start: pair ("," pair)*\npair: KEY "=" v -> p\nKEY: /[a-z]+/\nv: INT | LETTER\n%import common (INT, LETTER)',
    'start: "x"~2..4 ["y"]',
    'start: "x"~3',
    'start: "select"i _W NAME ";"?\n_W: " "+\nNAME: /[a-z_]+/',
    'start: "é" | "😀" | /[一-龥]{2}/',
    'start: a\n    | b\na: "1"\nb: "2"  // a comment\n',
    'start: D+\nD: "0".."9"',
    'start: S\nS: "a" S2 "b"\nS2: "x"+',
    'start: NL "a"\nNL: /\\n/',
    'start: "\\n\\t\\u00e9\\""',
    'start: STR\nSTR: /"[^"]*"/',
    'start: (A | B)+\nA: "a"\nB: "b"',
    'start: open close\nopen: "<" NAME ">"\nclose: "</" NAME ">"\nNAME: /[a-z]{1,5}/',
    '!start: "yes" | "no"',
    'start: item+\nitem: "-" " " /[^\\n]{1,9}/ "\\n"',
    'start: list\nlist: "[" [v ("," v)*] "]"\nv: list | INT\nINT: /0|[1-9][0-9]*/',
    'start: "(" start ")" | "()"',
    'start: SIGNED_INT ("," SIGNED_INT)*\n%import common.SIGNED_INT',
    # as far as Lark and the library mean the same
    'start: "SELECT" WS (COL ("," COL)* | "*") WS "FROM" WS COL\nCOL: /[a-z]{1,8}/\n%import common.WS_INLINE -> WS',
    'start: "a"? "b"* "c"+',
    "start: /(?i:abc)/ | /x{2,3}/i",
    'start: DAY ", " MONTH\nDAY: "Mon" | "Tue"\nMONTH: "Jan" | "Feb"',
    'start: (("a" "b") | "c")~1..3',
    'start: CNAME "(" [CNAME ("," CNAME)*] ")"\n%import common.CNAME',
    "start: HEXDIGIT+\n%import common.HEXDIGIT",
]


@pytest.mark.parametrize("text", GRAMMARS, ids=lambda text: text[:40])
def test_every_text_is_a_sentence_of_the_grammar(text: str) -> None:
    parser = lark.Lark(text, parser="earley")
    sentences = texts_of(Constraint(kind="grammar", text=text), range(15))
    assert sentences
    for sentence in sentences:
        parser.parse(sentence)


@pytest.mark.parametrize(
    ("text", "equal"),
    [
        ('root ::= "a" | "b" root', r"b*a"),
        ('root ::= [0-9]+ ("," [a-z]*)?', r"[0-9]+(,[a-z]*)?"),
        ('root ::= "yes" | "no"\n', r"yes|no"),
        ('root ::= item item\nitem ::= [^"\\n] "\\n"', r'([^"\n]\n){2}'),
        ('root ::= ws "x"\nws ::= [ \\t]*', r"[ \t]*x"),
    ],
)
def test_gbnf_is_understood(text: str, equal: str) -> None:
    sentences = texts_of(Constraint(kind="grammar", text=text), range(15))
    assert sentences
    for sentence in sentences:
        assert re.fullmatch(equal, sentence), sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ('x: "a"', "no rule 'start'"),
        ("start: foo", "'start' uses 'foo', which is not defined"),
        ("start: FOO", "'FOO', which is not defined"),
        ("start: start", "'start' never ends"),
        ('start: "a" start', "'start' never ends"),
        ('start: "a" | x\nx: y\ny: x', "'x' never ends|'y' never ends"),
        ('start: ("a" start)+', "never ends"),
        ("start: <|im_end|>", "special tokens are not supported"),
        ("start: <[2]>", "special tokens are not supported"),
        ('start: %json {"type": "object"}', "malformed"),
        ('%llguidance {}\nstart: "a"', "%llguidance is not supported"),
        ('%declare X\nstart: "a"', "%declare is not supported"),
        ("%import os.X\nstart: X", "other modules than common"),
        ("%import common.NOPE\nstart: NOPE", "common.NOPE, which does not exist"),
        ('start{x}: "a"', "templates and attributes"),
        ('start[capture]: "a"', "templates and attributes"),
        ('start: a{b}\na: "a"\nb: "b"', "templates"),
        ('start: "a"\nstart: "b"', "'start' twice"),
        ('start: ("a"', "malformed"),
        ('start: "a', "malformed"),
        ("start: /a", "malformed"),
        ("start: /(?=a)b/", "look-around"),
        ("start: /(/", "not closed"),
        ('start: "a" $', "malformed"),
        ('start "a"', "malformed"),
        ('start: "a"~3..2', "repeats"),
        ('start: "a\0"', "NUL"),
        ("root ::= foo", "foo"),
        ("root ::= root", "never ends"),
        ('root ::= ("a"', "GBNF"),
    ],
)
def test_what_cannot_be_honoured_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConstraintError, match=words) as caught:
        check_grammar(to_lark(text))
    assert caught.value.code == "invalid_constraint"


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f'r{i}: "a" r{i + 1}' for i in range(5000)) + '\nr5000: "z"\nstart: r0',
        "\n".join(f'r{i}: "a"' for i in range(1000)) + "\nstart: r0",
        "start: " + "(" * 65 + '"a"' + ")" * 65,
        'start: "a"~10001',
        "start: /a{10001}/",
    ],
    ids=["chain of 5,000 rules", "1,001 rules", "nesting", "repetition", "regex"],
)
def test_what_is_too_large_is_refused(text: str) -> None:
    with pytest.raises(TooComplexError):
        BYTE_COMPILER.compile(Constraint(kind="grammar", text=text))
