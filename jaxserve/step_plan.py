"""What one step computes: rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.block_manager import Copies
from jaxserve.sequence import Sequence, SequenceStatus

ALL_LAYERS = 0, (1 << 31) - 1
NO_POSITIONS = 0, 0


class ScheduledRow:
    """The next `num_tokens` tokens of `sequence`, as of when they were scheduled.

    Attributes:
        start, end: positions of the tokens.
        samples: whether the last one is the sequence's last one, so that a new token follows from it.
        source_row: the row of the step before that samples the token, where the host does not know it yet.
        rates: whether tokens of the prompt are to be rated.
        prompt_logprob_range: positions (first, end) of the tokens whose successors those are.
    """

    __slots__ = (
        "copies",
        "end",
        "num_tokens",
        "prompt_logprob_range",
        "rates",
        "samples",
        "sequence",
        "source_row",
        "start",
    )

    def __init__(self, sequence: Sequence, num_tokens: int, copies: Copies) -> None:
        self.sequence = sequence
        self.num_tokens = num_tokens
        self.copies = copies
        self.start = start = sequence.num_computed_tokens
        self.end = end = start + num_tokens
        is_last = end == len(sequence.token_ids) + sequence.num_pending_tokens
        params = sequence.params
        self.samples = is_last and not sequence.siblings and params.max_tokens > 0
        self.source_row = sequence.sampled_row
        self.rates, self.prompt_logprob_range = False, NO_POSITIONS
        if params.prompt_logprobs is not None and sequence.rates_prompt:
            first, stop = max(start, sequence.num_rated_tokens - 1), min(end, sequence.num_prompt_tokens - 1)
            if first < stop:
                self.rates, self.prompt_logprob_range = True, (first, stop)

    @property
    def token_ids(self) -> list[int]:
        """The row's tokens; −1 − r stands for what row r of the step before samples."""
        known = self.sequence.token_ids
        return known[self.start : self.end] if self.start < len(known) else [-1 - self.source_row]


@dataclass(slots=True)
class StepPlan:
    """What one step computes. `rows` are ordered: those of one token first.

    Attributes:
        first_scheduled: sequences that run for the first time in this step.
        num_held: sequences that cannot go on before this step's tokens are known to the host.
        num_drafts: rows of guessed tokens (`speculation.DraftRow`).
        layers: the first that it computes, and the one to stop before (`layered_prefill`).
    """

    rows: list[ScheduledRow] = field(default_factory=list)
    first_scheduled: list[Sequence] = field(default_factory=list)
    num_held: int = 0
    num_drafts: int = 0
    layers: tuple[int, int] = ALL_LAYERS

    @property
    def num_tokens(self) -> int:
        return sum([row.num_tokens for row in self.rows])

    @property
    def rates(self) -> bool:
        """Whether tokens of a prompt are to be rated."""
        return True in [row.rates for row in self.rows]

    @property
    def is_of_single_tokens(self) -> bool:
        """Whether no row has more than one."""
        return not self.rows or self.rows[-1].num_tokens == 1

    @property
    def is_layered(self) -> bool:
        """Whether it computes some layers of a prompt and samples nothing."""
        return self.layers != ALL_LAYERS

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits for its results."""
        return any(row.sequence.status is not SequenceStatus.FINISHED for row in self.rows)
