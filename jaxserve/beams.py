"""Beams as sequences: who is forked, parked, resumed and dropped when a beam search has chosen."""

from __future__ import annotations

from jaxserve.beam_search import BeamSearch, Candidates, Continuation, Hypothesis
from jaxserve.detokenizer import Detokenizer
from jaxserve.messages import NO_TOKEN_POSSIBLE, SequenceOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.sequence import Sequence
from jaxserve.tokenizer import Tokenizer


class Beams:
    """Owns the searches of the live requests."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._searches: dict[str, BeamSearch] = {}

    def begin(self, sequence: Sequence, tokenizer: Tokenizer | None) -> None:
        """Search from the end of this sequence's prompt on."""
        self._searches[sequence.request_id] = BeamSearch(sequence, _stop_finder(sequence.params, tokenizer))

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._searches.pop(request_id, None)

    def advance(
        self, sequence: Sequence, candidates: Candidates
    ) -> tuple[list[Sequence], list[SequenceOutput]]:
        """Take a beam's candidates. When those of all beams of its request are there, the survivors go on, each in a
        sequence of its own: the parent's own for one of them, a fork for each other.

        Returns:
            The request's live sequences, and its results once there are none.
        """
        search = self._searches[sequence.request_id]
        self._scheduler.park(sequence)
        if not search.offer(sequence, candidates):
            return [beam.sequence for beam in search.beams], []
        survivors = search.advance()
        if survivors:
            return self._fork(search, survivors), []
        for beam in search.beams:
            beam.sequence.finish("stop")
            self._scheduler.finish(beam.sequence)
        self.forget(sequence.request_id)
        return [], _outputs(sequence, search.results)

    def _fork(self, search: BeamSearch, survivors: list[Continuation]) -> list[Sequence]:
        heirs = {survivor.parent: survivor for survivor in reversed(survivors)}  # the best one takes over
        sequences = [
            s.parent.sequence if heirs[s.parent] is s else self._scheduler.fork(s.parent.sequence)
            for s in survivors
        ]
        for beam in search.beams:
            if beam not in heirs:
                self._scheduler.finish(beam.sequence)
        search.beams = [search.take(s, own) for s, own in zip(survivors, sequences, strict=True)]
        self._scheduler.resume(sequences)
        return sequences


def _stop_finder(params: SamplingParams, tokenizer: Tokenizer | None) -> Detokenizer | None:
    if not params.stop or tokenizer is None:
        return None
    return Detokenizer(
        tokenizer,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
        stop=params.stop,
        min_tokens=params.min_tokens,
    )


def _outputs(sequence: Sequence, results: list[Hypothesis]) -> list[SequenceOutput]:
    """The results whole. If fewer than n texts are possible at all, the last one stands for the rest."""
    request_id, n = sequence.request_id, sequence.params.n
    if not results:
        error = NO_TOKEN_POSSIBLE
        return [SequenceOutput(request_id, i, [], finish_reason="error", error=error) for i in range(n)]
    return [
        SequenceOutput(
            request_id,
            index,
            hypothesis.token_ids,
            finish_reason=hypothesis.finish_reason,
            stop_reason=hypothesis.stop_reason,
            logprobs=hypothesis.logprobs,
            num_cached_tokens=sequence.num_cached_tokens,
        )
        for index, hypothesis in enumerate(results + results[-1:] * (n - len(results)))
    ]
