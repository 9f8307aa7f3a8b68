"""Long prompts beside sequences that decode: one is computed at a time, and the others wait for it."""

from __future__ import annotations

from itertools import islice

from jaxserve.block_manager import BlockManager
from jaxserve.config import SchedulerConfig
from jaxserve.layered_prefill import LayeredPrefill
from jaxserve.sequence import Sequence
from jaxserve.step_plan import ScheduledRow
from jaxserve.waiting_queue import WaitingQueue

MAX_PASSED_OVER = 32  # long prompts in the queue that a step looks behind; each costs it 5 to 10 µs


class LongPrompts:
    """Decides which long prompt goes on in a step, and how far. Long is one of which more is left than a step computes,
    as long as others decode.

    By layers, or where a step has so many tokens for them (`long_prefill_token_threshold`); else none is held back.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager, layered: LayeredPrefill) -> None:
        self._config = config
        self._block_manager = block_manager
        self._layered = layered
        self._others_decode = False
        self._num_tokens_left = 0  # that the step has for them
        self._takes_over: Sequence | None = None  # for which all others stop

    def begin_step(self, *, others_decode: bool) -> None:
        """Forget the last step."""
        self._others_decode = others_decode
        self._num_tokens_left = self._config.long_prefill_token_threshold
        self._takes_over = None

    def includes(self, sequence: Sequence) -> bool:
        """Whether the rest of its prompt is to be held back for the sake of sequences that decode."""
        paces = self._config.num_layers or self._config.long_prefill_token_threshold
        if not (paces and self._others_decode and sequence.num_tokens_to_schedule > 1):
            return False
        must_be_cached = len(sequence) - self._config.max_num_batched_tokens
        if must_be_cached <= 0:
            return False
        if sequence.block_table:
            return sequence.num_prefix_tokens < must_be_cached
        return not self._block_manager.has_cached(sequence, must_be_cached)

    def affordable(self, sequence: Sequence, num_tokens: int, budget: int) -> int:
        """How many of the next `num_tokens` tokens of one the step may compute."""
        if self._takes_over not in (None, sequence):
            return 0
        if self._config.num_layers:  # the last token is left to a step of all layers, which samples from it
            return (
                0 if self._layered.is_under_way else min(num_tokens - 1, self._config.max_num_batched_tokens)
            )
        return min(num_tokens, budget, self._num_tokens_left)

    def place(self, row: ScheduledRow) -> bool:
        """Let the row of one be computed. Returns whether that is done by layers, and takes nothing of the step."""
        if self._config.num_layers:
            self._layered.begin(row)
            return True
        self._num_tokens_left -= row.num_tokens
        return False

    def first_to_start(self, waiting: WaitingQueue, running: list[Sequence]) -> Sequence | None:
        """The most urgent that waits, long or not, and is not held back: a long one is while a chunk is computed by
        layers, and beside another that is as urgent."""
        ahead = islice(waiting, MAX_PASSED_OVER)
        priority = self._priority_under_way(running)
        if priority is None:
            return next(ahead, None)
        is_busy = self._layered.is_under_way
        return next(
            (s for s in ahead if (s.order[0] < priority and not is_busy) or not self.includes(s)), None
        )

    def let_take_over(self, waiting: WaitingQueue, running: list[Sequence]) -> None:
        """If one that waits could start in this step and is more urgent than what is under way, all others stop for
        it."""
        priority = self._priority_under_way(running) if waiting else None
        if priority is None or self._layered.is_under_way or len(running) >= self._config.max_num_seqs:
            return
        ahead = islice(waiting, MAX_PASSED_OVER)
        first = next((s for s in ahead if s.order[0] < priority and self.includes(s)), None)
        if first and not first.num_pending_tokens and self._block_manager.has_room_for(first):
            self._takes_over = first

    def _priority_under_way(self, running: list[Sequence]) -> int | None:
        """Of the most urgent long prompt that has begun, if there is one."""
        return min((s.order[0] for s in running if self.includes(s)), default=None)
