"""A constraint as a sequence carries it: the tokens that may come next are known before they are asked for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jaxserve.constraints.backends.base import Matcher, MatcherError


class TextConstraint:
    """One sequence's place in its constraint.

    Args:
        matcher: at the beginning of the text, and nobody else's.
        num_words: ceil(V / 32).

    Attributes:
        is_complete: the text satisfies the constraint and nothing may follow.
        mask: [num_words] int32; bit i % 32 of word i // 32: token i may come next.

    Raises:
        MatcherError: no text at all can be generated.
    """

    def __init__(self, matcher: Matcher, num_words: int) -> None:
        self._matcher = matcher
        self.mask: NDArray[np.int32] = np.zeros(num_words, np.int32)
        self.is_complete = False
        self._look_ahead()

    def accept(self, token_id: int) -> None:
        """Take the next token.

        Raises:
            MatcherError: the library gave up, or nothing can follow.
        """
        if not self._matcher.accept(token_id):
            raise MatcherError(f"token {token_id} was sampled, which the constraint does not allow")
        self._look_ahead()

    def fork(self) -> TextConstraint:
        """Another sequence's, at the same place."""
        other = object.__new__(TextConstraint)
        other._matcher = self._matcher.fork()
        other.mask = self.mask
        other.is_complete = self.is_complete
        return other

    def _look_ahead(self) -> None:
        self.is_complete = self._matcher.is_complete
        if not self.is_complete:
            self.mask = np.zeros_like(self.mask)  # forks may hold the old one
            self._matcher.fill_mask(self.mask)
