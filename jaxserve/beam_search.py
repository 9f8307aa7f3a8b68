"""Beam search as Hugging Face's `generate(num_beams=…)` defines it, one search a request.

Everything here is decided on the host from the candidates that a step returns; `Engine` forks, drops and resumes the
sequences. A hypothesis' score is the sum of its tokens' log-probabilities divided by their number to the power of
`length_penalty` (Wu et al. 2016, without its constant).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxserve.constraints.backends.base import MatcherError
from jaxserve.detokenizer import Detokenizer
from jaxserve.messages import FinishReason, TopLogprobs
from jaxserve.sequence import Sequence


class Candidates(NamedTuple):
    """The likeliest continuations of one beam, descending.

    Attributes:
        scores: processed log-probabilities, [C] float32.
        logprobs: what is reported of them, [C] float32.
        top: ids and log-probabilities of the most likely tokens at this position, if they are reported.
    """

    token_ids: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    logprobs: npt.NDArray[np.float32]
    top: TopLogprobs | None


class Hypothesis(NamedTuple):
    """A finished sequence."""

    token_ids: list[int]
    score: float
    finish_reason: FinishReason
    stop_reason: int | str | None
    logprobs: list[TopLogprobs] | None


@dataclass(eq=False, slots=True)
class Beam:
    """A live hypothesis.

    Attributes:
        sum_logprobs: of its output tokens, as processed.
        text: finds stop strings; None if there are none.
        candidates: its continuations once they are computed.
    """

    sequence: Sequence
    sum_logprobs: float
    logprobs: list[TopLogprobs] | None
    text: Detokenizer | None
    candidates: Candidates | None = None


class Continuation(NamedTuple):
    """A beam with one more token."""

    parent: Beam
    rank: int  # among the parent's candidates
    sum_logprobs: float

    @property
    def token_id(self) -> int:
        assert self.parent.candidates is not None
        return int(self.parent.candidates.token_ids[self.rank])


class _End(NamedTuple):
    finish_reason: FinishReason
    stop_reason: int | str | None = None


class BeamSearch:
    """The beams of one request.

    Attributes:
        beams: live, best first.
        results: the n best, best first; empty until the search is over.
    """

    def __init__(self, sequence: Sequence, text: Detokenizer | None) -> None:
        params = sequence.params
        self.beams = [Beam(sequence, 0.0, None if params.logprobs is None else [], text)]
        self.results: list[Hypothesis] = []
        self._params = params
        self._width = params.num_sequences
        self._eos_token_ids = () if params.ignore_eos else sequence.eos_token_ids
        self._max_tokens = sequence.max_len - sequence.num_prompt_tokens
        self._finished: list[Hypothesis] = []  # best first

    def offer(self, sequence: Sequence, candidates: Candidates) -> bool:
        """Take a beam's candidates; returns whether those of all beams are there."""
        next(beam for beam in self.beams if beam.sequence is sequence).candidates = candidates
        return all(beam.candidates is not None for beam in self.beams)

    def advance(self) -> list[Continuation]:
        """Choose among all candidates: the continuations that live on, best first; none if the search is over."""
        length = self.beams[0].sequence.num_output_tokens + 1
        survivors: list[Continuation] = []
        for rank, continuation in enumerate(self._best(2 * self._width)):
            try:
                end = self._end_of(continuation, length)
            except MatcherError:
                continue  # its constraint has no way on from there
            if end is None:
                survivors.append(continuation)
            elif rank < self._width:
                self._finish(continuation, end, length)
        survivors = survivors[: self._width]
        if not survivors or self._is_over(survivors[0].sum_logprobs, length):
            self.results = self._finished[: self._params.n]
            return []
        return survivors

    def take(self, continuation: Continuation, sequence: Sequence) -> Beam:
        """The beam that a continuation becomes; `sequence` has its tokens but for the last, which is added."""
        parent, token_id = continuation.parent, continuation.token_id
        text = parent.text
        if text is not None:
            text = text.fork()
            text.push([token_id])
        logprobs = self._logprobs(continuation)
        sequence.token_ids.append(token_id)
        if sequence.constraint is not None:
            sequence.constraint.accept(token_id)
        return Beam(sequence, continuation.sum_logprobs, logprobs, text)

    # --- one choice -----------------------------------------------------------------------------------------

    def _best(self, count: int) -> list[Continuation]:
        """The `count` best continuations of all beams; of equal ones those of the better beam."""
        ranked = []
        for beam in self.beams:
            assert beam.candidates is not None, "advance comes when all candidates are there"
            sums = beam.sum_logprobs + beam.candidates.scores[:count].astype(np.float64)
            ranked.append([Continuation(beam, i, float(s)) for i, s in enumerate(sums) if s > -np.inf])
        return list(heapq.merge(*ranked, key=lambda c: -c.sum_logprobs))[:count]

    def _end_of(self, continuation: Continuation, length: int) -> _End | None:
        token_id = continuation.token_id
        if token_id in self._eos_token_ids:
            return _End("stop")
        if token_id in self._params.stop_token_ids:
            return _End("stop", token_id)
        constraint = continuation.parent.sequence.constraint
        if constraint is not None:
            constraint = constraint.fork()
            constraint.accept(token_id)
            if constraint.is_complete:
                return _End("stop")
        if continuation.parent.text is not None:
            stopped = continuation.parent.text.fork().push([token_id]).stopped
            if stopped is not None:
                return _End("stop", stopped)
        return _End("length") if length >= self._max_tokens else None

    def _finish(self, continuation: Continuation, end: _End, length: int) -> None:
        sequence = continuation.parent.sequence
        hypothesis = Hypothesis(
            token_ids=[*sequence.token_ids[sequence.num_prompt_tokens :], continuation.token_id],
            score=self._score(continuation.sum_logprobs, length),
            finish_reason=end.finish_reason,
            stop_reason=end.stop_reason,
            logprobs=self._logprobs(continuation),
        )
        self._finished.append(hypothesis)
        self._finished.sort(key=lambda h: -h.score)  # stable: of equal ones the older
        del self._finished[self._width :]

    def _logprobs(self, continuation: Continuation) -> list[TopLogprobs] | None:
        parent = continuation.parent
        if parent.logprobs is None:
            return None
        assert parent.candidates is not None
        assert parent.candidates.top is not None
        top = parent.candidates.top
        logprob = float(parent.candidates.logprobs[continuation.rank])
        own = TopLogprobs(logprob, _rank(continuation.token_id, top), top.top_ids, top.top_logprobs)
        return [*parent.logprobs, own]

    def _score(self, sum_logprobs: float, length: int) -> float:
        try:
            power: float = float(length) ** self._params.length_penalty
            return sum_logprobs / power
        except (OverflowError, ZeroDivisionError):  # a power beyond doubles: as if it were at their end
            return 0.0 if self._params.length_penalty > 0 else math.copysign(math.inf, sum_logprobs)

    def _is_over(self, best_sum: float, length: int) -> bool:
        """Whether no live beam can still change the result, by the request's own notion of "can"."""
        if len(self._finished) < self._width:
            return False
        if self._params.early_stopping is True:
            return True
        attainable = length
        if self._params.early_stopping == "never" and self._params.length_penalty > 0:
            attainable = self._max_tokens
        return self._score(best_sum, attainable) <= self._finished[-1].score


def _rank(token_id: int, top: TopLogprobs) -> int | None:
    """1 + the number of likelier tokens, as far as the most likely ones tell."""
    if token_id not in top.top_ids:
        return None
    own = top.top_logprobs[top.top_ids.index(token_id)]
    return 1 + sum(logprob > own for logprob in top.top_logprobs)
