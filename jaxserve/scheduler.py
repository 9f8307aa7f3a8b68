"""Which sequences run how many tokens in the next step; preemption when blocks run out.

Continuous batching (Orca, OSDI '22) over a paged KV cache (PagedAttention, SOSP '23) with chunked prefill
(Sarathi-Serve, OSDI '24). By priority, then first come, first served: the most urgent sequence always makes progress,
and the least urgent is the one that is preempted, so nobody starves but by requests of higher priority.
"""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass, field

from jaxserve.block_manager import BlockCopy, BlockManager
from jaxserve.config import SchedulerConfig
from jaxserve.kernels.metadata import MAX_UNTILED_TOKENS
from jaxserve.sequence import Sequence, SequenceStatus
from jaxserve.waiting_queue import WaitingQueue, urgency

# what steps cost on a CPU, in tokens: one token takes 21 ms, 128 take 150 ms, 256 take 300 ms; and where attention has
# no tiles, a token of a prompt costs more by about one for each 500 tokens before it
STEP_COST = 20
UNTILED_CONTEXT = 500


class ScheduledRow:
    """The next `num_tokens` tokens of `sequence`, as of when they were scheduled.

    Attributes:
        start, end: positions of the tokens.
        samples: whether the last one is the sequence's last one, so that a new token follows from it.
        source_row: the row of the step before that samples the token, where the host does not know it yet.
        prompt_logprob_range: positions (first, end) of the tokens whose successors in the prompt are to be rated.
    """

    __slots__ = (
        "copies",
        "end",
        "num_tokens",
        "prompt_logprob_range",
        "samples",
        "sequence",
        "source_row",
        "start",
    )

    def __init__(self, sequence: Sequence, num_tokens: int, copies: list[BlockCopy]) -> None:
        self.sequence = sequence
        self.num_tokens = num_tokens
        self.copies = copies
        self.start = sequence.num_computed_tokens
        self.end = self.start + num_tokens
        is_last = num_tokens == sequence.num_uncomputed_tokens
        self.samples = is_last and not sequence.siblings and sequence.params.max_tokens > 0
        self.source_row = sequence.sampled_row
        self.prompt_logprob_range = (0, 0)
        if sequence.rates_prompt:
            first = max(self.start, sequence.num_rated_tokens - 1)
            self.prompt_logprob_range = first, min(self.end, sequence.num_prompt_tokens - 1)

    @property
    def rates(self) -> bool:
        """Whether tokens of the prompt are to be rated."""
        first, end = self.prompt_logprob_range
        return first < end

    @property
    def token_ids(self) -> list[int]:
        """The row's tokens; −1 − r stands for what row r of the step before samples."""
        known = self.sequence.token_ids[self.start : self.end]
        return known or [-1 - self.source_row]


@dataclass(slots=True)
class StepPlan:
    """What one step computes. `rows` are ordered: those of one token first.

    Attributes:
        first_scheduled: sequences that run for the first time in this step.
        num_held: sequences that cannot go on before this step's tokens are known to the host.
        num_drafts: rows of guessed tokens (`speculation.DraftRow`).
    """

    rows: list[ScheduledRow] = field(default_factory=list)
    first_scheduled: list[Sequence] = field(default_factory=list)
    num_held: int = 0
    num_drafts: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits for its results."""
        return any(row.sequence.status is not SequenceStatus.FINISHED for row in self.rows)


class Scheduler:
    """Owns the waiting queue and the running list, both with the most urgent first, and the parked beams."""

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        self.config = config
        self.block_manager = block_manager
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.num_preemptions = 0
        self._num_long_tokens = 0  # what the step has left for long prompts, while others decode

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence (with its siblings attached) in the waiting queue."""
        self.waiting.add(sequence)

    def schedule(self) -> StepPlan:
        """Decide the next step; takes blocks, and preempts where they run out. The plan counts as computed at once, so
        that the step after it can be decided before the device is done; it is empty if all wait for results."""
        rows: dict[Sequence, ScheduledRow] = {}
        self._make_way()
        self._num_long_tokens = self.config.long_prefill_token_threshold
        num_preemptions = self.num_preemptions
        budget = self._schedule_running(rows, self.config.max_num_batched_tokens)
        plan = StepPlan()
        if self.num_preemptions == num_preemptions or not rows:  # else blocks are short: no newcomers
            self._schedule_waiting(rows, budget, plan)
        if self.config.token_buckets and self.config.enable_chunked_prefill:
            self._cut_to_bucket(rows)
        plan.rows = sorted(rows.values(), key=lambda row: row.num_tokens > 1)
        for index, row in enumerate(plan.rows):
            plan.num_held += self._count_as_computed(index, row)
        return plan

    def finish(self, sequence: Sequence) -> None:
        """Take a finished sequence out; its blocks are free at once."""
        self._take_out(sequence)
        self.block_manager.free(sequence)

    def park(self, sequence: Sequence) -> None:
        """Take a beam out until its request's other beams are as far; it keeps its blocks, if it has not been preempted
        since its step began."""
        self._take_out(sequence)
        sequence.status = SequenceStatus.PARKED
        self.parked.append(sequence)

    def fork(self, parent: Sequence) -> Sequence:
        """A parked copy of a parked beam, sharing its blocks."""
        child = parent.fork()
        self.block_manager.fork(parent, child)
        self.parked.append(child)
        return child

    def resume(self, sequences: list[Sequence]) -> None:
        """Let parked beams go on: among the running, or in the queue if there is no room or if they have lost their
        blocks."""
        for sequence in sequences:
            self.parked.remove(sequence)
            if sequence.block_table and len(self.running) < self.config.max_num_seqs:
                self._start(sequence)
            else:
                sequence.status = SequenceStatus.WAITING
                self.waiting.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it is. If others still hang on it, the first of them takes its place."""
        if sequence.siblings:
            heir, *rest = sequence.siblings
            heir.siblings, sequence.siblings = rest, []
            self.waiting.add(heir)
        sequence.finish("abort")
        self.finish(sequence)

    def check_integrity(self) -> None:
        """Verify queues and blocks; called by tests after every step and by the idle engine.

        Raises:
            AssertionError: something is inconsistent.
        """
        assert all(s.status is SequenceStatus.RUNNING for s in self.running)
        assert all(s.status is SequenceStatus.WAITING for s in self.waiting)
        assert all(s.status is SequenceStatus.PARKED for s in self.parked)
        assert len(self.running) <= self.config.max_num_seqs
        assert sorted(self.running, key=urgency) == self.running
        assert sorted(self.waiting, key=urgency) == list(self.waiting)
        self.block_manager.check_integrity([*self.running, *self.waiting, *self.parked])

    # --- the two passes -------------------------------------------------------------------------------------

    def _schedule_running(self, rows: dict[Sequence, ScheduledRow], budget: int) -> int:
        """Rows of one token first, so that a long prompt never stalls a stream."""
        wanted = [(sequence.num_tokens_to_schedule, sequence) for sequence in self.running]
        for num_tokens, sequence in sorted(wanted, key=lambda entry: entry[0] > 1):
            num_tokens = min(self._paced(sequence, num_tokens), budget)
            if num_tokens == 0:
                continue
            while sequence.status is SequenceStatus.RUNNING:  # until it has blocks, or was preempted itself
                copies = self.block_manager.allocate(sequence, num_tokens)
                if copies is not None:
                    rows[sequence] = ScheduledRow(sequence, num_tokens, copies)
                    budget -= num_tokens
                    break
                victim = self._least_urgent_with_blocks()
                taken_back = rows.pop(victim, None)
                budget += taken_back.num_tokens if taken_back else 0
                self._preempt(victim)
        return budget

    def _schedule_waiting(self, rows: dict[Sequence, ScheduledRow], budget: int, plan: StepPlan) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting.first
            row = None if sequence.num_pending_tokens else self._admit(sequence, budget)
            if row is None:
                break
            self.waiting.remove(sequence)
            self._start(sequence)
            if sequence.scheduled_at is None:
                sequence.scheduled_at = time.monotonic()
                plan.first_scheduled.append(sequence)
            rows[sequence] = row
            budget -= row.num_tokens

    def _cut_to_bucket(self, rows: dict[Sequence, ScheduledRow]) -> None:
        """Leave the last tokens of the least urgent prompts to the next step, if this one would be mostly padding for
        their sake: 16 decodes and a prompt of 128 tokens would take as long as 256 tokens."""
        prompts = [row for row in rows.values() if row.num_tokens > 1]
        if any(row.rates for row in prompts):  # the largest program alone does that
            return
        total = sum(row.num_tokens for row in rows.values())
        full = max((bucket for bucket in self.config.token_buckets if bucket <= total), default=total)
        excess = total - full
        if not 0 < excess <= sum(row.num_tokens - 1 for row in prompts):
            return
        others = len(rows) - len(prompts)
        wanted = total - others
        context = max(row.end for row in prompts)
        cut = self._cost(others, wanted - excess, context) + self._cost(others, excess, context)
        if cut >= self._cost(others, wanted, context) + self._cost(others, 0, context):
            return
        for row in reversed(prompts):
            num_tokens = max(1, row.num_tokens - excess)
            excess -= row.num_tokens - num_tokens
            rows[row.sequence] = ScheduledRow(row.sequence, num_tokens, row.copies)

    def _cost(self, others: int, num_prompt_tokens: int, context: int) -> float:
        """Of a step of so many tokens, in tokens: about what its time is proportional to."""
        num_tokens = others + num_prompt_tokens
        if num_tokens == 0:
            return 0.0
        bucket = min(bucket for bucket in self.config.token_buckets if bucket >= num_tokens)
        untiled = num_prompt_tokens * context / UNTILED_CONTEXT if bucket <= MAX_UNTILED_TOKENS else 0.0
        return STEP_COST + bucket + untiled

    def _admit(self, sequence: Sequence, budget: int) -> ScheduledRow | None:
        """The first row of a waiting sequence, or None if it must wait. It starts only when there are blocks
        for all of its known tokens: starting earlier would only get it preempted halfway."""
        looked_up = not sequence.block_table
        num_cached = self.block_manager.take_cached_prefix(sequence) if looked_up else 0
        if sequence.siblings and sequence.num_tokens_to_schedule == 0:  # nothing left to compute together
            self._fork_siblings(sequence)
        if looked_up:
            sequence.num_prefix_tokens = num_cached
        wanted = self._paced(sequence, sequence.num_tokens_to_schedule)
        enough = self._make_room(sequence)
        if enough and wanted and (wanted <= budget or self.config.enable_chunked_prefill):
            copies = self.block_manager.allocate(sequence, min(wanted, budget))
            if copies is not None:
                if looked_up and sequence.scheduled_at is None:
                    sequence.num_cached_tokens = num_cached
                    self.block_manager.count_lookup(len(sequence), num_cached)
                return ScheduledRow(sequence, min(wanted, budget), copies)
        if num_cached:
            self.block_manager.free(sequence)  # it looks again when its turn comes
        return None

    def _paced(self, sequence: Sequence, num_tokens: int) -> int:
        """How many of a sequence's next tokens a step may compute: while others decode, only so many of prompts that
        take several steps anyway, which share them."""
        is_long = len(sequence) - sequence.num_prefix_tokens > self.config.max_num_batched_tokens
        if num_tokens <= 1 or not is_long or not self.config.long_prefill_token_threshold:
            return num_tokens
        if not any(s.num_tokens_to_schedule <= 1 for s in self.running):
            return num_tokens
        paced = min(num_tokens, self._num_long_tokens)
        self._num_long_tokens -= paced
        return paced

    def _count_as_computed(self, index: int, row: ScheduledRow) -> bool:
        """Move the sequence to the end of its row. Siblings join when the shared prompt is complete.

        Returns:
            Whether it cannot go on before the host knows the token that it samples. One that ends by its length does
            not go on; all others go on with a pending token.
        """
        sequence = row.sequence
        sequence.num_computed_tokens = row.end
        if row.rates:
            sequence.num_rated_tokens = row.prompt_logprob_range[1] + 1
        self.block_manager.publish_full_blocks(sequence)
        if sequence.siblings and sequence.num_tokens_to_schedule == 0:
            self._fork_siblings(sequence)
        if not row.samples or row.end + 1 >= sequence.max_len:
            return False
        if sequence.needs_values:
            return True
        sequence.num_pending_tokens += 1
        sequence.sampled_row = index
        return False

    def _start(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=urgency)

    def _take_out(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        elif not self.waiting.remove(sequence) and sequence in self.parked:
            self.parked.remove(sequence)

    # --- blocks ---------------------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence) -> bool:
        """Whether all known tokens of `sequence` fit. With nothing running they must: then forked sequences
        that only wait and parked beams give their blocks back."""
        while not self.block_manager.has_room_for(sequence):
            if self.running:
                return False
            parked = next((s for s in reversed(self.parked) if s.block_table), None)
            holder = self.waiting.last_holder(but=sequence) or parked
            if holder is None:
                return False
            self._preempt(holder)
        return True

    def _make_way(self) -> None:
        """Where seats or blocks are short, sequences of lower priority give theirs to the most urgent that waits.
        What they lose is computed again, mostly from the prefix cache."""
        while self.running and self.waiting:
            first = self.waiting.first
            is_full = len(self.running) >= self.config.max_num_seqs
            victim = self.running[-1] if is_full else self._least_urgent_with_blocks()
            if victim.order[0] <= first.order[0] or first.num_pending_tokens:
                return
            if not is_full and self.block_manager.has_room_for(first):
                return
            self._preempt(victim)

    def _least_urgent_with_blocks(self) -> Sequence:
        """Whom to preempt: of the lowest priority, one that waits with shared blocks, else the youngest that runs or is
        parked."""
        last = max((self.running[-1], *(s for s in self.parked if s.block_table)), key=lambda s: s.order)
        waiting = self.waiting.last_holder()
        return waiting if waiting is not None and waiting.order[0] >= last.order[0] else last

    def _preempt(self, sequence: Sequence) -> None:
        """Free the blocks; a running sequence goes back to its place in the queue. It is computed again."""
        self.block_manager.free(sequence)
        self.num_preemptions += sequence.status is not SequenceStatus.WAITING
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            sequence.status = SequenceStatus.WAITING
            self.waiting.add(sequence)

    def _fork_siblings(self, sequence: Sequence) -> None:
        """Let the siblings share what is computed, and queue them."""
        siblings, sequence.siblings = sequence.siblings, []
        for sibling in siblings:
            self.block_manager.fork(sequence, sibling)
            self.waiting.add(sibling)
