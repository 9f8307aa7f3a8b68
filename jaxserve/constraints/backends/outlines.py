"""outlines (its core): choices and simple regexes as automata over the vocabulary.

It has no JSON of its own that is exact (its strings know few escapes, and most keywords are left out without a word)
and no grammars. Its automata (core 0.2) forget the ways that lead on from where a text may end, unless each next byte
is an end again: of `ab|abcd`, `abcd` cannot be reached. What is exact all the same: choices none of which begins
another, and ASCII characters and classes of which only the last is repeated without a fixed number. An automaton takes
long to make, so it travels, made once.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import ClassVar

import numpy as np
import outlines_core
from numpy.typing import NDArray

from jaxserve.constraints.backends.base import DeadEndError, MatcherError
from jaxserve.constraints.constraint import (
    BackendName,
    CompiledConstraint,
    Constraint,
    ConstraintError,
    TooComplexError,
)
from jaxserve.constraints.regex import choices_to_regex, translate_regex
from jaxserve.constraints.vocabulary import Vocabulary, pack

MAX_ARTIFACT_BYTES = 32 << 20
_ITEM = r"(?:\\[^\w\s]|\[(?!\^)(?:\\[^\w\s]|[^\]\[\\])+\]|[^\\.\[\](){}|*+?^$])"
SIMPLE = re.compile(
    rf"(?:{_ITEM}(?:\{{[1-9][0-9]*\}})?)*{_ITEM}(?:\+|\{{[1-9][0-9]*(?:,[0-9]*)?\}})?", re.ASCII
)


class OutlinesBackend:
    """outlines-core for one vocabulary."""

    name: ClassVar[BackendName] = "outlines"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        # the library wants an end-of-sequence id, which must have no text: one behind the vocabulary
        self._eos = vocabulary.size

    def compile(self, constraint: Constraint) -> CompiledConstraint:
        if constraint.kind not in ("regex", "choice"):
            raise ConstraintError(f"outlines serves regexes and choices exactly, not {constraint.kind}.")
        if self._vocabulary.first_tokens:
            raise ConstraintError("outlines knows no tokens whose text differs at the beginning.")
        regex = self._regex(constraint)
        by_bytes: dict[bytes, list[int]] = {}
        for token_id, token in enumerate(self._vocabulary.tokens):
            if token:
                by_bytes.setdefault(token, []).append(token_id)
        try:
            index = outlines_core.Index(regex, outlines_core.Vocabulary(self._eos, by_bytes))
        except ValueError as error:
            raise ConstraintError(f"The regex cannot be enforced: {str(error)[:200]}.") from error
        _, (artifact,) = index.__reduce__()
        if len(artifact) > MAX_ARTIFACT_BYTES:
            raise TooComplexError("The automaton of the regex is too large.")
        return CompiledConstraint(backend=self.name, source=regex, artifact=bytes(artifact))

    @staticmethod
    def _regex(constraint: Constraint) -> str:
        if constraint.kind == "choice":
            regex = choices_to_regex(constraint.text)
            choices = sorted(json.loads(constraint.text))
            if any(longer.startswith(choice) for choice, longer in pairwise(choices)):
                raise ConstraintError("outlines serves exactly only choices none of which begins another.")
            return regex
        regex = translate_regex(constraint.text)
        if not regex.isascii() or not SIMPLE.fullmatch(regex):
            raise ConstraintError(
                "outlines serves exactly only ASCII characters and classes, the last one repeated."
            )
        return regex

    def matcher(self, compiled: CompiledConstraint) -> OutlinesMatcher:
        try:
            index = outlines_core.Index.from_binary(list(compiled.artifact))
        except ValueError as error:
            raise MatcherError(str(error)) from error
        return OutlinesMatcher(index, self._vocabulary, index.get_initial_state())


class OutlinesMatcher:
    """One text: the state of the automaton that it is in."""

    def __init__(self, index: outlines_core.Index, vocabulary: Vocabulary, state: int) -> None:
        self._index = index
        self._vocabulary = vocabulary
        self._state = state

    @property
    def can_end(self) -> bool:
        return bool(self._index.is_final_state(self._state))

    @property
    def is_complete(self) -> bool:
        return self.can_end and not self._allowed()

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        ends = self._vocabulary.eos_token_ids if self.can_end else ()
        row[:] = pack((*self._allowed(), *ends), len(row))
        if not row.any():
            raise DeadEndError

    def accept(self, token_id: int) -> bool:
        if token_id in self._vocabulary.eos_token_ids:
            return self.can_end
        state = self._index.get_next_state(self._state, token_id)
        if state is None or token_id >= self._vocabulary.size:
            return False
        self._state = state
        return True

    def fork(self) -> OutlinesMatcher:
        return OutlinesMatcher(self._index, self._vocabulary, self._state)

    def _allowed(self) -> list[int]:
        allowed = self._index.get_allowed_tokens(self._state) or []
        return [token_id for token_id in allowed if token_id < self._vocabulary.size]
