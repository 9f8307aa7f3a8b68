"""Which library serves a constraint."""

from __future__ import annotations

import importlib.util
from functools import cached_property

from jaxserve.constraints.backends.base import Backend, Matcher, MatcherError
from jaxserve.constraints.backends.llguidance import LLGuidanceBackend
from jaxserve.constraints.constraint import (
    BackendName,
    CompiledConstraint,
    Constraint,
    ConstraintError,
    TooComplexError,
    check_size,
)
from jaxserve.constraints.vocabulary import Vocabulary


class Compiler:
    """All backends for one vocabulary; each is loaded when it is first needed.

    Used by the worker (`compile`) and by the engine (`matcher`).
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def prepare(self) -> None:
        """Make now what the first constraint would have to wait for."""
        _ = self._llguidance

    def compile(self, constraint: Constraint) -> CompiledConstraint:
        """Check and compile, with the backend that was asked for, or else with one that honours all of it.

        Raises:
            ConstraintError, TooComplexError: the constraint is refused; the message says why.
        """
        check_size(constraint)
        compiled = self._compiled(constraint)
        if self.matcher(compiled).is_complete:  # a sequence has at least one token
            raise ConstraintError(f"Only the empty text satisfies the {constraint.kind}.")
        return compiled

    def _compiled(self, constraint: Constraint) -> CompiledConstraint:
        if constraint.backend == "auto" or constraint.backend == "llguidance":
            return self._llguidance.compile(constraint)
        try:
            return self._backend(constraint.backend).compile(constraint)
        except TooComplexError:
            raise
        except ConstraintError as error:
            if not constraint.fallback:
                raise ConstraintError(f"The backend {constraint.backend} cannot be used: {error}") from error
            return self._llguidance.compile(constraint)

    def matcher(self, compiled: CompiledConstraint) -> Matcher:
        """A matcher at the beginning of the text.

        Raises:
            MatcherError: the backend refuses what it let pass before.
        """
        try:
            return self._backend(compiled.backend).matcher(compiled)
        except ConstraintError as error:
            raise MatcherError(str(error)) from error

    def _backend(self, name: BackendName) -> Backend:
        match name:
            case "llguidance":
                return self._llguidance
            case "outlines":
                return self._outlines
        return self._lm_format_enforcer

    @cached_property
    def _llguidance(self) -> LLGuidanceBackend:
        return LLGuidanceBackend(self._vocabulary)

    @cached_property
    def _outlines(self) -> Backend:
        from jaxserve.constraints.backends.outlines import OutlinesBackend

        return OutlinesBackend(self._vocabulary)

    @cached_property
    def _lm_format_enforcer(self) -> Backend:
        if importlib.util.find_spec("lmformatenforcer") is None:
            raise ConstraintError("lm-format-enforcer is not installed.")
        from jaxserve.constraints.backends.lm_format_enforcer import LMFormatEnforcerBackend

        return LMFormatEnforcerBackend(self._vocabulary)
