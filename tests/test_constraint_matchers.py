"""Matchers: masks over real vocabularies, ends, forks; every backend does the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from jaxserve.constraints.backends.base import DeadEndError
from jaxserve.constraints.compiler import Compiler
from jaxserve.constraints.constraint import BackendName, Constraint, ConstraintError, TooComplexError
from jaxserve.constraints.vocabulary import Vocabulary, pack, pack_bits, unpack
from jaxserve.tokenizer import load_tokenizer
from tests.constraint_walks import BYTE_COMPILER, BYTE_EOS, BYTES, allowed_tokens, walk
from tests.tiny_tokenizers import tokenizer_of

FAMILIES = ["byte level", "SentencePiece", "Unigram", "WordPiece"]
BACKENDS: list[BackendName] = ["llguidance", "outlines", "lm-format-enforcer"]


def vocabulary_of(family: str, padding: int = 5) -> Vocabulary:
    """For a model whose vocabulary is padded; token 1 ends a sequence."""
    tokenizer = tokenizer_of(family)
    return Vocabulary.of(tokenizer, tokenizer.vocab_size + padding, [1])


# --- vocabularies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "text"),
    [("regex", "[a-z ]{1,12}"), ("regex", "(the|dog|quick|a| )+"), ("choice", '["the dog", "the", "a cat"]')],
)
def test_the_text_of_the_tokens_is_what_satisfies_the_constraint(family: str, kind: str, text: str) -> None:
    tokenizer, vocabulary = tokenizer_of(family), vocabulary_of(family)
    compiler = Compiler(vocabulary)
    compiled = compiler.compile(Constraint(kind=kind, text=text))  # type: ignore[arg-type]
    ended = 0
    for seed in range(20):
        try:
            tokens, complete = walk(compiler.matcher(compiled), vocabulary, seed)
        except DeadEndError:
            assert family in ("Unigram", "WordPiece")  # which lack characters
            continue
        ended += complete
        if complete:
            decoded = tokenizer.decode(tokens, skip_special_tokens=False)
            wanted = re.fullmatch(text, decoded) if kind == "regex" else decoded in json.loads(text)
            assert wanted, (decoded, [vocabulary.tokens[t] for t in tokens])
    assert ended > 5


@pytest.mark.parametrize("family", ["byte level", "SentencePiece"])
def test_characters_of_several_tokens_can_be_written(family: str) -> None:
    tokenizer, vocabulary = tokenizer_of(family), vocabulary_of(family)
    compiler = Compiler(vocabulary)
    choices = ["🦜", "ﷺ漢", "👩‍👩‍👧 é", "e\u0301"]
    compiled = compiler.compile(Constraint(kind="choice", text=json.dumps(choices)))
    seen = set()
    for seed in range(40):
        tokens, ended = walk(compiler.matcher(compiled), vocabulary, seed)
        assert ended
        seen.add(tokenizer.decode(tokens, skip_special_tokens=False))
    assert seen == set(choices)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["choice", "regex", "json_schema", "grammar"])
def test_every_token_that_fits_is_allowed_also_where_the_text_is_given(family: str, kind: str) -> None:
    vocabulary = vocabulary_of(family)
    texts = {
        "choice": '["the dog"]',
        "regex": "the dog",
        "grammar": 'start: "the dog"',
        "json_schema": '{"const": 123}',
    }
    target = b"123" if kind == "json_schema" else b"the dog"
    compiler = Compiler(vocabulary)
    matcher = compiler.matcher(compiler.compile(Constraint(kind=kind, text=texts[kind])))  # type: ignore[arg-type]
    as_first = {**dict(enumerate(vocabulary.tokens)), **vocabulary.first_tokens}
    fitting = [token_id for token_id, text in sorted(as_first.items()) if text and target.startswith(text)]
    assert fitting
    assert allowed_tokens(matcher, vocabulary) == fitting


def test_a_space_that_is_not_in_the_text_costs_nothing() -> None:
    """SentencePiece's first token may carry one that the text does not show."""
    vocabulary = vocabulary_of("SentencePiece")
    compiler = Compiler(vocabulary)
    matcher = compiler.matcher(compiler.compile(Constraint(kind="regex", text="dog( dog)?")))
    with_space = vocabulary.tokens.index(b" dog")
    assert vocabulary.first_tokens[with_space] == b"dog"
    assert with_space in allowed_tokens(matcher, vocabulary)
    assert matcher.accept(with_space)
    assert matcher.can_end
    assert matcher.accept(with_space)
    assert matcher.is_complete


@pytest.mark.parametrize("family", ["suffixed", "replaced"])
def test_a_tokenizer_without_bytes_of_its_own_cannot_be_constrained(family: str) -> None:
    with pytest.raises(ValueError, match="no bytes of their own"):
        Vocabulary.of(tokenizer_of(family), tokenizer_of(family).vocab_size, [])


@pytest.mark.parametrize("family", FAMILIES)
def test_special_and_unknown_tokens_are_never_allowed(family: str) -> None:
    tokenizer, vocabulary = tokenizer_of(family), vocabulary_of(family)
    compiler = Compiler(vocabulary)
    matcher = compiler.matcher(compiler.compile(Constraint(kind="regex", text="(?s:.)*")))
    allowed = set(allowed_tokens(matcher, vocabulary))
    assert allowed & (tokenizer.special_token_ids | set(range(tokenizer.vocab_size, vocabulary.size))) == {1}
    for token_id in (0, 2, vocabulary.size - 1, vocabulary.size, -1, 10**9):
        assert not matcher.accept(token_id)
    assert matcher.accept(1)


def test_masks_are_packed_bit_by_bit() -> None:
    row = pack([0, 31, 32, 69], 3)
    assert row.tolist() == [-(2**31) + 1, 1, 32]
    assert np.flatnonzero(unpack(row, 70)).tolist() == [0, 31, 32, 69]
    assert pack_bits(unpack(row, 70), 3).tolist() == row.tolist()


# --- every backend ------------------------------------------------------------------------------------------


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> BackendName:
    name: BackendName = request.param
    return name


@pytest.mark.parametrize(
    "pattern",
    [
        "[a-c]{2,4}",
        "(foo|bar)+",
        "[0-9]{3}-[0-9]{2}",
        "(yes|no)!",
        "a?b*c+",
        r"x\.y",
        "[+-][0-9]+",
        "[a-z]{3}",
    ],
)
def test_texts_of_every_backend_match(backend: BackendName, pattern: str) -> None:
    compiled = BYTE_COMPILER.compile(Constraint(kind="regex", text=pattern, backend=backend))
    # the automata of outlines would not match some of these wholly
    assert compiled.backend == (
        "llguidance" if set(pattern) & set("|*?") and backend == "outlines" else backend
    )
    for seed in range(8):
        tokens, ended = walk(BYTE_COMPILER.matcher(compiled), BYTES, seed)
        assert not ended or re.fullmatch(pattern, bytes(tokens).decode())


def test_all_backends_allow_the_same(backend: BackendName) -> None:
    constraint = Constraint(kind="choice", text='["a", "ab", "abc", "b.d"]')
    theirs = BYTE_COMPILER.matcher(BYTE_COMPILER.compile(constraint))
    ours = BYTE_COMPILER.matcher(
        BYTE_COMPILER.compile(Constraint(kind="choice", text=constraint.text, backend=backend))
    )
    for byte in (None, *b"abc"):
        if byte is not None:
            assert ours.accept(byte)
            assert theirs.accept(byte)
        assert allowed_tokens(ours, BYTES) == allowed_tokens(theirs, BYTES)
        assert (ours.can_end, ours.is_complete) == (theirs.can_end, theirs.is_complete)


def test_a_token_that_is_not_allowed_changes_nothing(backend: BackendName) -> None:
    matcher = BYTE_COMPILER.matcher(
        BYTE_COMPILER.compile(Constraint(kind="regex", text="ab+", backend=backend))
    )
    assert not matcher.accept(BYTE_EOS)
    assert not matcher.accept(ord("b"))
    assert matcher.accept(ord("a"))
    assert not matcher.accept(ord("a"))
    assert matcher.accept(ord("b"))
    assert matcher.accept(BYTE_EOS)
    assert matcher.accept(ord("b"))  # an end that was not taken after all


def test_forks_go_their_own_ways(backend: BackendName) -> None:
    matcher = BYTE_COMPILER.matcher(
        BYTE_COMPILER.compile(Constraint(kind="regex", text="(ab|ac|[0-9]{2}x)*", backend=backend))
    )
    for byte in b"ab12xa":
        assert matcher.accept(byte)
    fork = matcher.fork()
    assert allowed_tokens(fork, BYTES) == allowed_tokens(matcher, BYTES) == list(b"bc")
    assert matcher.accept(ord("c"))
    assert matcher.accept(ord("1"))
    assert allowed_tokens(matcher, BYTES) == list(b"0123456789")
    assert allowed_tokens(fork, BYTES) == list(b"bc")
    assert not fork.can_end
    assert fork.accept(ord("b"))
    assert fork.can_end


def test_the_backend_that_was_asked_for_serves_what_it_can(backend: BackendName) -> None:
    text = '["ab", "cd", "e f!"]' if backend == "lm-format-enforcer" else '["ab", "cd😀", "你好"]'
    compiled = BYTE_COMPILER.compile(Constraint(kind="choice", text=text, backend=backend))
    assert compiled.backend == backend
    seen = {bytes(walk(BYTE_COMPILER.matcher(compiled), BYTES, seed)[0]).decode() for seed in range(20)}
    assert seen == set(json.loads(text))


def test_a_backend_that_cannot_is_replaced_by_one_that_can_or_refused() -> None:
    for backend in ("outlines", "lm-format-enforcer"):
        for constraint in (
            Constraint(kind="json_object", backend=backend),
            Constraint(kind="grammar", text='start: "a"', backend=backend),
        ):
            assert BYTE_COMPILER.compile(constraint).backend == "llguidance"
    for kind, text, backend in (
        ("json_object", "", "outlines"),
        ("regex", "a*(ab)?", "outlines"),
        ("regex", "a|ab", "outlines"),
        ("regex", "[é-ü]+", "outlines"),
        ("regex", "[^a]+", "outlines"),
        ("choice", '["ab", "abcd"]', "outlines"),
        ("regex", r"\w+", "lm-format-enforcer"),
        ("regex", "a.c", "lm-format-enforcer"),
        ("regex", "[^a]", "lm-format-enforcer"),
        ("regex", "é", "lm-format-enforcer"),
    ):
        constraint = Constraint(kind=kind, text=text, backend=backend, fallback=False)  # type: ignore[arg-type]
        with pytest.raises(ConstraintError, match=f"The backend {backend} cannot be used"):
            BYTE_COMPILER.compile(constraint)


def test_what_no_backend_can_do_is_refused_whatever_was_asked_for(backend: BackendName) -> None:
    text = json.dumps({"type": "array", "uniqueItems": True})
    with pytest.raises(ConstraintError, match="uniqueItems"):
        BYTE_COMPILER.compile(Constraint(kind="json_schema", text=text, backend=backend))


# --- the demo model's vocabulary ----------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "é", "😀"]}, "maxItems": 3},
        "when": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "tags", "when"],
    "additionalProperties": False,
}


@pytest.mark.model
def test_random_tokens_of_the_demo_model_make_valid_texts(demo_model_path: Path) -> None:
    tokenizer = load_tokenizer(demo_model_path)
    vocabulary = Vocabulary.of(tokenizer, 49152, tokenizer.eos_token_ids)
    assert not vocabulary.first_tokens
    compiler = Compiler(vocabulary)
    validator = jsonschema.Draft202012Validator(
        PERSON, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    checks = {
        Constraint(kind="json_schema", text=json.dumps(PERSON)): lambda text: validator.is_valid(
            json.loads(text)
        ),
        Constraint(kind="regex", text=r"[A-Z]\w{2,9} (is|was) [^\s]{1,5}\."): re.compile(
            r"[A-Z]\w{2,9} (is|was) [^\s]{1,5}\."
        ).fullmatch,
        Constraint(kind="choice", text='["positive", "negative", "neutral 😀"]'): (
            lambda text: text in ("positive", "negative", "neutral 😀")
        ),
    }
    for constraint, check in checks.items():
        compiled = compiler.compile(constraint)
        ended = 0
        for seed in range(6):
            tokens, complete = walk(compiler.matcher(compiled), vocabulary, seed)
            ended += complete
            assert not complete or check(tokenizer.decode(tokens, skip_special_tokens=False))
        assert ended

    with pytest.raises(TooComplexError):
        compiler.compile(Constraint(kind="regex", text="(.*[a-f].{0,90}){90}"))


@pytest.mark.parametrize("backend", ["llguidance", "outlines"])
@pytest.mark.parametrize("regex", ["", "()", "a{0}", "^$"])
def test_a_regex_of_only_the_empty_text_is_refused(regex: str, backend: BackendName) -> None:
    """There would be no token to generate."""
    with pytest.raises(ConstraintError, match="empty text"):
        BYTE_COMPILER.compile(Constraint(kind="regex", text=regex, backend=backend))


@pytest.mark.parametrize("grammar", ["start: ", 'start: ""', 'root ::= ""'])
def test_a_grammar_of_only_the_empty_text_is_refused(grammar: str) -> None:
    with pytest.raises(ConstraintError, match="empty text"):
        BYTE_COMPILER.compile(Constraint(kind="grammar", text=grammar))


def test_a_constraint_that_may_be_empty_is_served() -> None:
    assert BYTE_COMPILER.compile(Constraint(kind="regex", text="a?")).backend == "llguidance"
