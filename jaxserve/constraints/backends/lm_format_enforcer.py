"""lm-format-enforcer (an extra): choices and plain ASCII regexes.

The library works on characters, so tokens that are parts of characters are lost to it; its JSON leaves keywords out;
and its classes like `\\w` are narrower than everybody's. What remains exact is served, all else refused.
"""

from __future__ import annotations

import re
from typing import ClassVar

import interegular
import numpy as np
from lmformatenforcer import RegexParser, TokenEnforcer, TokenEnforcerTokenizerData
from numpy.typing import NDArray

from jaxserve.constraints.backends.base import DeadEndError
from jaxserve.constraints.constraint import BackendName, CompiledConstraint, Constraint, ConstraintError
from jaxserve.constraints.regex import choices_to_regex, translate_regex
from jaxserve.constraints.vocabulary import Vocabulary, pack

# literals, escaped punctuation, positive classes, groups, repetitions
PLAIN = re.compile(r"(?:\\[^\w\s]|\(\?:|\[(?!\^)|[^\\.\[(?]|\((?!\?)|(?<!\()\?)*", re.ASCII)


class LMFormatEnforcerBackend:
    """lm-format-enforcer for one vocabulary."""

    name: ClassVar[BackendName] = "lm-format-enforcer"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        texts = [
            (token_id, token.decode()) for token_id, token in enumerate(vocabulary.tokens) if token.isascii()
        ]
        self._data = TokenEnforcerTokenizerData(
            [(token_id, text, True) for token_id, text in texts if text],
            decoder=lambda ids: "".join(vocabulary.tokens[i].decode("utf-8", "replace") for i in ids),
            eos_token_id=vocabulary.size,  # it has no text; the real ones are added here
            use_bitmask=False,
            vocab_size=vocabulary.size,
        )

    def compile(self, constraint: Constraint) -> CompiledConstraint:
        if constraint.kind not in ("regex", "choice"):
            raise ConstraintError(
                f"lm-format-enforcer serves regexes and choices exactly, not {constraint.kind}."
            )
        if self._vocabulary.first_tokens:
            raise ConstraintError("lm-format-enforcer knows no tokens whose text differs at the beginning.")
        choice = constraint.kind == "choice"
        regex = choices_to_regex(constraint.text) if choice else translate_regex(constraint.text)
        if not regex.isascii() or not PLAIN.fullmatch(regex):
            raise ConstraintError(
                "lm-format-enforcer serves only plain ASCII regexes exactly: no dot, no negation."
            )
        compiled = CompiledConstraint(backend=self.name, source=regex)
        self.matcher(compiled).fill_mask(np.zeros(self._vocabulary.mask_words, np.int32))
        return compiled

    def matcher(self, compiled: CompiledConstraint) -> LMFormatEnforcerMatcher:
        try:
            parser = RegexParser(compiled.source)
        except (interegular.InvalidSyntax, interegular.Unsupported) as error:
            raise ConstraintError(f"The regex cannot be enforced: {str(error)[:200]}.") from error
        return LMFormatEnforcerMatcher(TokenEnforcer(self._data, parser), self._vocabulary, [])


class LMFormatEnforcerMatcher:
    """One text: its tokens; the library remembers where each beginning of it led."""

    def __init__(self, enforcer: TokenEnforcer, vocabulary: Vocabulary, token_ids: list[int]) -> None:
        self._enforcer = enforcer
        self._vocabulary = vocabulary
        self._token_ids = token_ids

    @property
    def can_end(self) -> bool:
        return self._vocabulary.size in self._allowed()

    @property
    def is_complete(self) -> bool:
        return self._allowed() == {self._vocabulary.size}

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        allowed = self._allowed()
        ends = self._vocabulary.eos_token_ids if self._vocabulary.size in allowed else ()
        row[:] = pack((*(allowed - {self._vocabulary.size}), *ends), len(row))
        if not row.any():
            raise DeadEndError

    def accept(self, token_id: int) -> bool:
        if token_id in self._vocabulary.eos_token_ids:
            return self.can_end
        if token_id == self._vocabulary.size or token_id not in self._allowed():
            return False
        self._token_ids.append(token_id)
        return True

    def fork(self) -> LMFormatEnforcerMatcher:
        return LMFormatEnforcerMatcher(self._enforcer, self._vocabulary, list(self._token_ids))

    def _allowed(self) -> set[int]:
        return set(self._enforcer.get_allowed_tokens(self._token_ids).allowed_tokens)
