"""llguidance: JSON schemas, regexes and grammars, exactly, with masks in microseconds. The default."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import llguidance
import llguidance.gbnf_to_lark
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from jaxserve.constraints.backends import base
from jaxserve.constraints.backends.base import DeadEndError, MatcherError
from jaxserve.constraints.constraint import (
    BackendName,
    CompiledConstraint,
    Constraint,
    ConstraintError,
    TooComplexError,
)
from jaxserve.constraints.grammar import check_grammar, to_lark
from jaxserve.constraints.json_schema import JSON_OBJECT, normalize_schema, parse_schema
from jaxserve.constraints.regex import choices_to_regex, translate_regex, translate_whitespace
from jaxserve.constraints.vocabulary import Vocabulary, pack, pack_bits, unpack

MAX_MESSAGE_CHARS = 300
MAX_LEXER_STATES = 50_000  # 1 to 2 kB each, in the engine's memory
PROBE_TOKENS = 48
# Where the text has only one continuation, the library would allow only its own choice of tokens for it; and a mask
# is to hold all tokens that fit.
OPTIONS = '%llguidance {"no_forcing": true}\n'
# in the grammar that is made here around a schema
PLACE = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")
# how the library says that it gave up
LIMIT_WORDS = re.compile(r"too (?:complex|large|many|big|deep)|limit|exceed|max is|fuel|size", re.IGNORECASE)


class LLGuidanceBackend:
    """llguidance for one vocabulary."""

    name: ClassVar[BackendName] = "llguidance"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokens = _Tokens.of(vocabulary)
        self._limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)

    def compile(self, constraint: Constraint) -> CompiledConstraint:
        compiled = CompiledConstraint(backend=self.name, source=self._grammar(constraint))
        try:
            matcher = self.matcher(compiled)
            matcher.fill_mask(np.zeros(self._tokens.vocabulary.mask_words, np.int32))
            base.probe(matcher, self._tokens.vocabulary.mask_words, PROBE_TOKENS)
        except MatcherError as error:
            raise _refused(str(error)) from error
        return compiled

    def matcher(self, compiled: CompiledConstraint) -> LLGuidanceMatcher:
        own = LLMatcher(self._tokens.tokenizer, compiled.source, log_level=0, limits=self._limits)
        if own.is_error():
            raise MatcherError(own.get_error())
        return LLGuidanceMatcher(own, self._tokens)

    def _grammar(self, constraint: Constraint) -> str:
        match constraint.kind:
            case "json_schema" | "json_object":
                schema = JSON_OBJECT if constraint.kind == "json_object" else parse_schema(constraint.text)
                whitespace = translate_whitespace(constraint.whitespace_pattern)
                if not whitespace.may_be_empty:
                    message = (
                        "The whitespace pattern must match the empty text, too, for the backend llguidance."
                    )
                    raise ConstraintError(message)
                normal = normalize_schema(schema, additional_properties=constraint.additional_properties)
                _check_near_zero(normal)
                return self._json_grammar(normal, whitespace.pattern)
            case "regex":
                return self._regex_grammar(translate_regex(constraint.text))
            case "choice":
                return self._regex_grammar(choices_to_regex(constraint.text))
            case "grammar":
                lark = to_lark(constraint.text)
                check_grammar(lark)
                return OPTIONS + lark

    @staticmethod
    def _json_grammar(schema: dict[str, Any], whitespace: str) -> str:
        flexible = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
        return f"{OPTIONS}start: %json {json.dumps({**schema, 'x-guidance': flexible})}"

    @staticmethod
    def _regex_grammar(regex: str) -> str:
        (grammar,) = json.loads(LLMatcher.grammar_from_regex(regex))["grammars"]
        return OPTIONS + str(grammar["lark_grammar"])


def _check_near_zero(schema: dict[str, Any]) -> None:
    """The library (1.9) lets 0 through an exclusive limit of 0 if the other limit is nearer to it than 1.

    Raises:
        ConstraintError: the schema may combine such limits.
    """
    for near, far in (("Minimum", "Maximum"), ("Maximum", "Minimum")):
        zero = f"exclusive{near}"
        others = (far.lower(), f"exclusive{far}")
        schemas = list(_subschemas(schema))
        at_zero = [s for s in schemas if _number(s.get(zero)) == 0]
        close = [s for s in schemas if any(0 < abs(_number(s.get(other))) < 1 for other in others)]
        merged = any(s.keys() & {"allOf", "anyOf", "oneOf", "$ref"} and len(s) > 1 for s in schemas)
        if any(s in close for s in at_zero) or (merged and at_zero and close):
            message = f"{zero} 0 cannot be enforced together with a {others[0]} between it and 1"
            raise ConstraintError(
                f"{message}.".replace("and 1.", "and -1." if near == "Maximum" else "and 1.")
            )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.inf


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object in the schema: values of enums, too, which does no harm."""
    stack = [schema]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _refused(message: str) -> ConstraintError:
    first = PLACE.sub("", message.strip().partition("\n")[0])[:MAX_MESSAGE_CHARS]
    if first.startswith("oneOf constraints are not supported"):
        return ConstraintError(
            "The keyword oneOf is only supported if no two of its branches can be valid at once."
        )
    kind = TooComplexError if LIMIT_WORDS.search(first) else ConstraintError
    return kind(f"The constraint cannot be enforced: {first.rstrip('.')}.")


class LLGuidanceMatcher:
    """One text. The library never sees real end-of-sequence ids: it has one of its own, behind the vocabulary."""

    def __init__(self, matcher: LLMatcher, tokens: _Tokens, num_accepted: int = 0) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._num_accepted = num_accepted
        self._mask: NDArray[np.int32] | None = None  # of the place where the text is

    @property
    def can_end(self) -> bool:
        return bool(self._matcher.is_accepting())

    @property
    def is_complete(self) -> bool:
        return self.can_end and not self._text_mask().any()

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        row[:] = self._text_mask()
        if self.can_end:
            row |= self._tokens.eos_mask
        if not row.any():
            raise DeadEndError

    def accept(self, token_id: int) -> bool:
        tokens = self._tokens
        if token_id in tokens.eos_ids:
            return self.can_end
        if not 0 <= token_id < tokens.vocabulary.size or not tokens.vocabulary.tokens[token_id]:
            return False
        if not self._num_accepted and tokens.first_ids is not None:
            token_id = int(tokens.first_ids[token_id])
        if self._matcher.try_consume_tokens([token_id]) != 1:
            return False
        self._num_accepted += 1
        self._mask = None
        return True

    def fork(self) -> LLGuidanceMatcher:
        return LLGuidanceMatcher(self._matcher.deep_copy(), self._tokens, self._num_accepted)

    def _text_mask(self) -> NDArray[np.int32]:
        """The tokens with a text that may come next."""
        if self._mask is None:
            self._mask = self._compute_mask()
        return self._mask

    def _compute_mask(self) -> NDArray[np.int32]:
        tokens, num_words = self._tokens, self._tokens.vocabulary.mask_words
        if self._matcher.is_stopped() and self.can_end:
            return np.zeros(num_words, np.int32)
        own = np.empty(tokens.num_words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(own.ctypes.data, own.nbytes)
        if self._matcher.is_error():
            raise MatcherError(self._matcher.get_error())
        if self._num_accepted or tokens.first_ids is None:
            return own[:num_words] & tokens.text_mask
        return pack_bits(unpack(own, tokens.num_ids)[tokens.first_ids], num_words) & tokens.text_mask


class _Tokens(NamedTuple):
    """The vocabulary as the library has it: V tokens, then those that differ at the beginning, then an end.

    Attributes:
        first_ids: [V], the library's id of each token as the first one; None if none differs.
    """

    vocabulary: Vocabulary
    tokenizer: LLTokenizer
    num_ids: int
    first_ids: NDArray[np.int64] | None
    text_mask: NDArray[np.int32]
    eos_mask: NDArray[np.int32]
    eos_ids: frozenset[int]

    @property
    def num_words(self) -> int:
        return -(-self.num_ids // 32)

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> _Tokens:
        first_ids = None
        if vocabulary.first_tokens:
            first_ids = np.arange(vocabulary.size)
            first_ids[list(vocabulary.first_tokens)] = vocabulary.size + np.arange(
                len(vocabulary.first_tokens)
            )
        library_tokens = _LibraryTokens([*vocabulary.tokens, *vocabulary.first_tokens.values()])
        eos = library_tokens.eos_token_id
        tokenizer = LLTokenizer(llguidance.TokenizerWrapper(library_tokens), n_vocab=eos + 1, eos_token=eos)
        has_text = np.fromiter((bool(token) for token in vocabulary.tokens), np.bool_, vocabulary.size)
        return cls(
            vocabulary,
            tokenizer,
            eos + 1,
            first_ids,
            pack_bits(has_text, vocabulary.mask_words),
            pack(vocabulary.eos_token_ids, vocabulary.mask_words),
            frozenset(vocabulary.eos_token_ids),
        )


class _LibraryTokens:
    """What the library wants of a tokenizer. It tokenizes nothing of ours."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.eos_token_id = len(tokens)
        self.tokens = [token or f"<{i}>".encode() for i, token in enumerate([*tokens, b""])]
        self.special_token_ids = [i for i, token in enumerate([*tokens, b""]) if not token]

    def __call__(self, text: bytes | str) -> list[int]:  # noqa: ARG002 - the library's signature
        return []
