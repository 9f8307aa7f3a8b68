"""Regexes: every text matches as Python sees it, and what cannot be honoured is refused."""

from __future__ import annotations

import json
import re

import pytest

from jaxserve.constraints.constraint import Constraint, ConstraintError, TooComplexError
from jaxserve.constraints.regex import choices_to_regex, translate_regex, translate_whitespace
from tests.constraint_walks import BYTE_COMPILER, texts_of

PATTERNS = [
    r"a+b*", r"^\d{3}-\d{4}$", r"[A-Z][a-z]{2,5}", r"(?i)yes|no", r"(foo|bar)+", r"\w+@\w+\.com", r"[^\W\d]+",
    r"[^\s]+", r"\S+", r"\D{2}", r"\W\w", r".{1,5}", r"[\[]]", r"[]a]+", r"[a\]-]+", r"a{,3}", r"a{2,}?", r"x{0}y",
    r"(?P<y>\d{4})-(?:0[1-9]|1[0-2])", "\\u00e9+", r"\x41\U0001F600", r"[é-ü]{2}", r"你好+", r"\.\*\{\}", r"a{x}",
    r"(?s:.)x", r"^(a|b)$", r"^a|b$", r"[&&a]+", r"[a~^|]+", r"[\w.-]+", r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?",
    r"#[0-9a-fA-F]{6}", r"((a|b)*c){2}", r"[\d\s]+", r"[^\d\s]+", r"(a*)*b", r"\t\n", r"\Aab\Z", r"(?P<n>a)(?#c)b",
    r"😀|👍🏽", r"(?i)é", r"a?", r"(b)?", r"|a", r"(?:a{10}){10}", r"(a|aa)*b{0,50}", r"[^a]", r"[^\n]{3}", r"\s\S",
    r"[\s\S]{1,4}", r"[\w\W]", r"[^\x20-\x7e]", r"(a|b|)(c|)", r"\\\"'", r"[\\\]\[]+", r"a|ab|abc", r"(ab?c?)+?",
    r"(?-i:x)y", r"((((((a))))))", r"\d{1,3}(\.\d{1,3}){3}", r"<(b|i)>[^<>]*</(b|i)>", r"[\t ]*x", r"\v\f\r",
    r"[b-d]{2}[^b-d]", r"\$\^\|\?", r"~!@#%&=;:,<>/`'\"", r"[\u4e00-\u9fa5]{1,3}", r"\u200d", r"x*", r"(?:y)*", r"\-\_",
    r"[!-/:-@]{3}", r"[a-c-]+", r"[-a]+", r"[a^]+", r"{", r"}", r"]", r"a{1", r"a{1,2", r"x{2,2}", r"(x{2}){3}",
    r"(?i:abc)d", r"(?s).{2}", r"\(\)\[\]", r"https?://[\w./-]+", r"([01]\d|2[0-3]):[0-5]\d", r"-?(0|[1-9]\d*)",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_text_matches_the_whole_pattern(pattern: str) -> None:
    texts = texts_of(Constraint(kind="regex", text=pattern), range(12))
    assert texts
    for text in texts:
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"\bword", "word boundaries"),
        (r"a\B", "word boundaries"),
        ("(?=a)", "look-around"),
        ("(?!a)b", "look-around"),
        ("(?<=a)b", "look-around"),
        ("(?<!a)b", "look-around"),
        (r"(a)\1", "back-references"),
        ("(?P<n>a)(?P=n)", "back-references"),
        (r"(?P<n>a)\k<n>", "back-references"),
        ("a\0b", "NUL"),
        (r"\0", "NUL"),
        (r"\x00", "NUL"),
        (r"\u0000", "NUL"),
        (r"[\x00-\x1f]", "NUL"),
        ("(", "not closed"),
        ("a)", "not opened"),
        ("[a", "not closed"),
        ("[]", "class is empty"),
        ("a**", "nothing to repeat"),
        ("*a", "nothing to repeat"),
        ("a|*", "nothing to repeat"),
        ("a++", "possessive"),
        ("(?>a)", "atomic"),
        ("(?x)a", "flags i and s"),
        ("(?m)^a$", "flags i and s"),
        ("a^b", r"\^ is only supported at the beginning"),
        ("a$b", r"\$ is only supported at the end"),
        ("(a$)*", r"\$ is only supported at the end|nothing"),
        ("[b-a]", "wrong way round"),
        ("a{3,2}", "wrong way round"),
        (r"[a-\d]", "ends with a class"),
        ("a\\", "ends with a backslash"),
        (r"\xg0", "hexadecimal"),
        (r"\ud800", "no character"),
        (r"\u{110000}", "no character"),
        (r"\y", "is not supported"),
    ],
)
def test_what_cannot_be_honoured_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(ConstraintError, match=words) as caught:
        translate_regex(pattern)
    assert caught.value.code == "invalid_constraint"


@pytest.mark.parametrize(
    "pattern",
    [
        "a{10001}",
        "a{99999999999999999999}",
        "(a{200}){51}",
        "((a{50}){50}){5}",
        "x" * 4097,
        "é" * 2049,
        "(" * 65 + ")" * 65,
    ],
)
def test_what_is_too_large_is_refused(pattern: str) -> None:
    with pytest.raises(TooComplexError):
        translate_regex(pattern)


def test_the_limits_themselves_are_taken() -> None:
    for pattern in ("a{10000}", "(a{200}){50}", "x" * 4096, "(" * 64 + "a" + ")" * 64):
        BYTE_COMPILER.compile(Constraint(kind="regex", text=pattern))


@pytest.mark.parametrize(
    ("pattern", "empty"),
    [
        ("[ ]?", True),
        ("", True),
        (r"[ \n]*", True),
        (r"\s*", True),
        (r"( |\t){0,4}", True),
        (r"\n?", True),
        (" ", False),
    ],
)
def test_a_whitespace_pattern_may_name_whitespace(pattern: str, empty: bool) -> None:
    assert translate_whitespace(pattern).may_be_empty is empty


@pytest.mark.parametrize("pattern", ["a", ".", "[^a]", r"\w", r"\d*", "[ -~]", r" |\u00a0", "(", r"\S"])
def test_a_whitespace_pattern_names_nothing_else(pattern: str) -> None:
    with pytest.raises(ConstraintError):
        translate_whitespace(pattern)


# --- choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choices",
    [
        ["positive", "negative"],
        ["a", "ab", "abc", "b"],
        ["", "a"][1:],
        [
            "a.b*c",
            "[x]",
            "(y)",
            "\\d",
            "^$",
            "{1}",
            "a|b",
            " lead",
            "trail ",
            "new\nline",
            "tab\t",
            '"q"',
            "it's",
        ],
        ["é", "你好", "😀", "👩‍👩‍👧", "e\u0301", "\u202e", "\x7f", "\ufeff"],
        [f"item {i}" for i in range(1000)],
    ],
    ids=["two", "prefixes", "one", "special", "unicode", "a thousand"],
)
def test_every_text_is_one_of_the_choices_and_each_can_be_reached(choices: list[str]) -> None:
    constraint = Constraint(kind="choice", text=json.dumps(choices))
    for text in texts_of(constraint, range(10)):
        assert text in choices
    compiled = BYTE_COMPILER.compile(constraint)
    for choice in choices[:50]:
        matcher = BYTE_COMPILER.matcher(compiled)
        assert all(matcher.accept(byte) for byte in choice.encode()), choice
        assert matcher.can_end
        longer = [other for other in choices if other != choice and other.startswith(choice)]
        assert matcher.is_complete is not bool(longer)


@pytest.mark.parametrize(
    ("choices", "words"),
    [([], "non-empty"), ([""], "non-empty"), ([1], "non-empty"), (["a", "a"], "distinct"), (["\0"], "NUL")],
)
def test_choices_that_are_none_are_refused(choices: list[object], words: str) -> None:
    with pytest.raises(ConstraintError, match=words):
        choices_to_regex(json.dumps(choices))


def test_too_many_choices_are_refused() -> None:
    with pytest.raises(TooComplexError, match="10,000"):
        choices_to_regex(json.dumps([str(i) for i in range(10001)]))
