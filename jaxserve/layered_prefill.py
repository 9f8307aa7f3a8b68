"""A long prompt beside sequences that decode: a few layers of a chunk at a time, between their steps.

However few tokens of a long prompt a step takes, they attend to all that lie before them, so behind a long context even
a small chunk takes many times as long as a decode step. A layer of a chunk does not. So chunks stay as large as they
are efficient, and each is computed in as many steps as it takes for none to be longer than a decode step. What comes
out of a step's last layer, the chunk's residual stream, stays on the device (`step.Pools.hidden`).

Prompts by layers instead of by tokens: Lee et al., "From Tokens to Layers" (2025).
"""

from __future__ import annotations

from jaxserve.kernels.metadata import QUERY_TILE
from jaxserve.sequence import Sequence
from jaxserve.step_plan import NO_POSITIONS, ScheduledRow, StepPlan

SHARE = 0.7  # of the duration of a decode step, for what comes between two of them
WEIGHT = 0.3  # of one step's duration in the mean


class LayeredPrefill:
    """Owns the chunk that is under way, and knows how long steps take.

    Args:
        num_layers: of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._row: ScheduledRow | None = None
        self._next_layer = 0
        self._had_turn = False
        self._decode_s: float | None = None  # of steps of single tokens
        self._tile_s: float | None = None  # of one layer of QUERY_TILE tokens

    @property
    def is_under_way(self) -> bool:
        """Whether there is a chunk."""
        return self._row is not None

    @property
    def is_due(self) -> bool:
        """Whether it is the chunk's turn: its steps alternate with those of all others."""
        return self.is_under_way and not self._had_turn

    def holds(self, sequence: Sequence) -> bool:
        """Whether the chunk is this sequence's."""
        return self._row is not None and self._row.sequence is sequence

    def begin(self, row: ScheduledRow) -> None:
        """Take a chunk over, while there is none. The token that its sequence samples from is not in it."""
        assert self._row is None
        assert not row.samples
        self._row, self._next_layer = row, 0

    def give_way(self) -> None:
        """It is the others' turn."""
        self._had_turn = False

    def drop(self, sequence: Sequence) -> None:
        """Forget the chunk if it is this sequence's, which loses its blocks."""
        if self.holds(sequence):
            self._row = None

    def fill(self, plan: StepPlan, *, num_decoding: int, num_prompts: int) -> None:
        """Make an empty plan one of the chunk's next layers; with the last of them the chunk is no longer under way.

        A step takes less than a decode step, so that a prompt does no more than double what streams wait. Where more
        sequences wait for their prompts than decode, it takes as many times longer: they wait, too. All layers that are
        left come at once if nobody decodes.
        """
        chunk = self._row
        assert chunk is not None
        first = self._next_layer
        stop = self._num_layers
        if num_decoding:
            stop = min(first + self._count(chunk, SHARE * max(1.0, num_prompts / num_decoding)), stop)
        row = ScheduledRow(chunk.sequence, chunk.num_tokens, () if first else chunk.copies)
        if stop < self._num_layers:
            row.rates, row.prompt_logprob_range = False, NO_POSITIONS
        self._next_layer, self._had_turn = stop, True
        if stop == self._num_layers:
            self._row = None
        plan.rows, plan.layers = [row], (first, stop)

    def _count(self, chunk: ScheduledRow, share: float) -> int:
        """Layers that take this share of a decode step; at least one, and one before anything is known."""
        if self._decode_s is None or self._tile_s is None:
            return 1
        return max(1, int(share * self._decode_s / (self._tile_s * _num_tiles(chunk))))

    def settle(self, plan: StepPlan, seconds: float) -> None:
        """A step has taken so long."""
        if plan.is_layered:
            first, stop = plan.layers
            self._tile_s = seconds / ((stop - first) * _num_tiles(plan.rows[0]))
        elif plan.is_of_single_tokens:
            mean = seconds if self._decode_s is None else self._decode_s
            self._decode_s = mean + WEIGHT * (seconds - mean)


def _num_tiles(row: ScheduledRow) -> int:
    return -(-row.num_tokens // QUERY_TILE)
