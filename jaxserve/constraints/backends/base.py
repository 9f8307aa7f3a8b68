"""What every backend does."""

from __future__ import annotations

import random
from typing import ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from jaxserve.constraints.constraint import BackendName, CompiledConstraint, Constraint


class MatcherError(Exception):
    """A matcher cannot go on: its library hit a limit of its own. That request ends with an error."""


class DeadEndError(MatcherError):
    """No token of the model's vocabulary can continue the text: it lacks characters that the constraint needs."""

    def __init__(self) -> None:
        super().__init__("no token of the model's vocabulary can continue the text")


class Matcher(Protocol):
    """Where the text of one sequence is in its constraint. Not thread-safe; each sequence has its own.

    End-of-sequence ids are allowed exactly where the constraint can end, other special tokens never.
    """

    @property
    def can_end(self) -> bool:
        """Whether the text so far satisfies the constraint."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether, besides, nothing may follow: the sequence ends here, whatever else it was to do."""
        ...

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Write the packed mask of the tokens that may come next; bit i % 32 of word i // 32 is token i.

        Args:
            row: [ceil(V / 32)], contiguous.

        Raises:
            MatcherError: the library gave up, or no token at all fits.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Take the next token. False: the constraint does not allow it, and the matcher stays where it was.
        End-of-sequence ids are accepted where they are allowed, and change nothing."""
        ...

    def fork(self) -> Self:
        """An independent matcher at the same place: for beams and siblings."""
        ...


class Backend(Protocol):
    """A library, for one vocabulary."""

    name: ClassVar[BackendName]

    def compile(self, constraint: Constraint) -> CompiledConstraint:
        """Check and compile. Untrusted work: only in a worker that can be killed.

        Raises:
            ConstraintError: malformed, or this library cannot honour it exactly; the message names the place.
            TooComplexError: it hits a limit.
        """
        ...

    def matcher(self, compiled: CompiledConstraint) -> Matcher:
        """A matcher at the beginning of the text. Quick for what `compile` let pass.

        Raises:
            MatcherError: the library refuses it after all.
        """
        ...


def probe(matcher: Matcher, num_words: int, num_tokens: int) -> None:
    """Go some way into the constraint, always the same one: what grows with the text shows up here.

    Raises:
        MatcherError: the library gave up.
    """
    row = np.zeros(num_words, np.int32)
    chooser = random.Random(0)
    try:
        for _ in range(num_tokens):
            matcher.fill_mask(row)
            if matcher.is_complete:
                return
            allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
            while not matcher.accept(int(chooser.choice(allowed))):
                matcher.fill_mask(row)  # raises if the library has given up
    except DeadEndError:
        return  # elsewhere there may be a way
