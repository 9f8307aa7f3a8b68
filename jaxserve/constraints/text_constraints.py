"""The engine's side of constraints: where each sequence's text is in its own."""

from __future__ import annotations

from jaxserve.constraints.backends.base import MatcherError
from jaxserve.constraints.compiler import Compiler
from jaxserve.constraints.constraint import CompiledConstraint
from jaxserve.constraints.text_constraint import TextConstraint
from jaxserve.constraints.vocabulary import WORD_BITS, Vocabulary
from jaxserve.errors import RequestError
from jaxserve.tokenizer import Tokenizer


class TextConstraints:
    """Begins constraints for one model.

    Args:
        tokenizer: None: constraints are refused.
        vocab_size: V.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._compilers: dict[tuple[int, ...], Compiler] = {}

    def begin(self, constraint: CompiledConstraint, eos_token_ids: tuple[int, ...]) -> TextConstraint:
        """A constraint at the beginning of a text.

        Raises:
            RequestError: it cannot be used.
        """
        try:
            matcher = self.compiler(eos_token_ids).matcher(constraint)
            return TextConstraint(matcher, -(-self._vocab_size // WORD_BITS))
        except MatcherError as error:
            raise RequestError(
                f"The constraint cannot be used: {error}.", code="invalid_constraint"
            ) from error

    def compiler(self, eos_token_ids: tuple[int, ...]) -> Compiler:
        """For texts that end with these ids; made once.

        Raises:
            RequestError: this model's text cannot be constrained.
        """
        compiler = self._compilers.get(eos_token_ids)
        if compiler is None:
            if self._tokenizer is None:
                message = "Constraints need a tokenizer in the engine."
                raise RequestError(message, code="invalid_constraint")
            try:
                vocabulary = Vocabulary.of(self._tokenizer, self._vocab_size, eos_token_ids)
            except ValueError as error:
                message = f"This model's text cannot be constrained: {error}."
                raise RequestError(message, code="invalid_constraint") from error
            compiler = self._compilers[eos_token_ids] = Compiler(vocabulary)
        return compiler
