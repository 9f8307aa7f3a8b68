"""Which sequences run how many tokens in the next step; preemption when blocks run out.

Continuous batching (Orca, OSDI '22) over a paged KV cache (PagedAttention, SOSP '23) with chunked prefill
(Sarathi-Serve, OSDI '24). By priority, then first come, first served: the most urgent sequence always makes progress,
but a long prompt beside streams while a chunk of another is computed, and the least urgent is the one that is
preempted, so nobody starves but by requests of higher priority.
"""

from __future__ import annotations

import time
from bisect import insort

from jaxserve.block_manager import BlockManager
from jaxserve.config import SchedulerConfig
from jaxserve.layered_prefill import LayeredPrefill
from jaxserve.long_prompts import MAX_PASSED_OVER, LongPrompts
from jaxserve.padding import cut_to_bucket
from jaxserve.sequence import Sequence, SequenceStatus
from jaxserve.step_plan import ScheduledRow, StepPlan
from jaxserve.waiting_queue import WaitingQueue, urgency


class Scheduler:
    """Owns the waiting queue and the running list, both with the most urgent first, and the parked beams."""

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        self.config = config
        self.block_manager = block_manager
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.layered = LayeredPrefill(config.num_layers)
        self._long_prompts = LongPrompts(config, block_manager, self.layered)
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence (with its siblings attached) in the waiting queue."""
        self.waiting.add(sequence)

    def schedule(self) -> StepPlan:
        """Decide the next step; takes blocks, and preempts where they run out. The plan counts as computed at once, so
        that the step after it can be decided before the device is done; it is empty if all wait for results."""
        plan = StepPlan() if self.layered.is_due else self._schedule_tokens()
        if self.layered.is_under_way and not plan.rows:
            num_decoding = self._num_decoding()
            num_prompts = len(self.running) - num_decoding + len(self.waiting)
            self.layered.fill(plan, num_decoding=num_decoding, num_prompts=num_prompts)
            if plan.layers[1] == self.config.num_layers:
                self._count_as_computed(0, plan.rows[0])
        return plan

    def _schedule_tokens(self) -> StepPlan:
        """A step of all layers."""
        self.layered.give_way()
        rows: dict[Sequence, ScheduledRow] = {}
        wanted = [(sequence.num_tokens_to_schedule, sequence) for sequence in self.running]
        prompts = [entry for entry in wanted if entry[0] > 1]
        self._long_prompts.begin_step(others_decode=len(prompts) < len(wanted))
        self._make_way()
        if len(wanted) - len(prompts) < self.config.max_num_batched_tokens:
            self._long_prompts.let_take_over(self.waiting, self.running)
        num_preemptions = self.num_preemptions
        wanted = [entry for entry in wanted if entry[0] == 1] + prompts
        budget = self._schedule_running(wanted, rows, self.config.max_num_batched_tokens)
        plan = StepPlan()
        if self.num_preemptions == num_preemptions or not rows:  # else blocks are short: no newcomers
            self._schedule_waiting(rows, budget, plan)
        if self.config.token_buckets and self.config.enable_chunked_prefill:
            cut_to_bucket(rows, self.config.token_buckets)
        plan.rows = [row for row in rows.values() if row.num_tokens == 1]
        plan.rows += [row for row in rows.values() if row.num_tokens > 1]
        plan.num_held = sum([self._count_as_computed(index, row) for index, row in enumerate(plan.rows)])
        return plan

    def finish(self, sequence: Sequence) -> None:
        """Take a finished sequence out; its blocks are free at once."""
        self._take_out(sequence)
        self.layered.drop(sequence)
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
        assert not self.layered.is_under_way or any(map(self.layered.holds, self.running))
        assert sorted(self.running, key=urgency) == self.running
        assert sorted(self.waiting, key=urgency) == list(self.waiting)
        self.block_manager.check_integrity([*self.running, *self.waiting, *self.parked])

    # --- the two passes -------------------------------------------------------------------------------------

    def _schedule_running(
        self, wanted: list[tuple[int, Sequence]], rows: dict[Sequence, ScheduledRow], budget: int
    ) -> int:
        """As many of the tokens that sequences want as the budget is for, those of single ones first, so that a long
        prompt never stalls a stream; returns what is left of it."""
        allocate, running = self.block_manager.allocate, SequenceStatus.RUNNING
        for num_wanted, sequence in wanted:
            num_tokens = 1 if num_wanted == 1 and budget else self._affordable(sequence, num_wanted, budget)
            if num_tokens == 0:
                continue
            while sequence.status is running:  # until it has blocks, or was preempted itself
                copies = allocate(sequence, num_tokens)
                if copies is not None:
                    row = ScheduledRow(sequence, num_tokens, copies)
                    if num_wanted > 1:
                        budget -= self._place(row, rows)
                    else:
                        rows[sequence] = row
                        budget -= 1
                    break
                victim = self._least_urgent_with_blocks()
                taken_back = rows.pop(victim, None)
                budget += taken_back.num_tokens if taken_back else 0
                self._preempt(victim)
        return budget

    def _schedule_waiting(self, rows: dict[Sequence, ScheduledRow], budget: int, plan: StepPlan) -> None:
        """The most urgent first. A long prompt that is held back by another one is passed over and stays in the queue:
        it takes no seat and no blocks meanwhile, and finds what the other leaves in the prefix cache."""
        num_passed = 0
        while budget > 0 and len(self.running) < self.config.max_num_seqs:
            if num_passed == min(len(self.waiting), MAX_PASSED_OVER):
                break
            sequence = self.waiting[num_passed]
            wanted = sequence.num_tokens_to_schedule or 1  # 0: a prompt of one token, for siblings to compute
            if not self._affordable(sequence, wanted, budget):
                num_passed += 1
                continue
            row = None if sequence.num_pending_tokens else self._admit(sequence, budget)
            if row is None:
                break
            self.waiting.remove(sequence)
            self._start(sequence)
            if sequence.scheduled_at is None:
                sequence.scheduled_at = time.monotonic()
                plan.first_scheduled.append(sequence)
            budget -= self._place(row, rows)

    def _admit(self, sequence: Sequence, budget: int) -> ScheduledRow | None:
        """The first row of a waiting sequence, or None if it must wait. It starts only when there are blocks
        for all of its known tokens: starting earlier would only get it preempted halfway."""
        looked_up = not sequence.block_table
        num_cached = self.block_manager.take_cached_prefix(sequence) if looked_up else 0
        if sequence.siblings and sequence.num_tokens_to_schedule == 0:  # nothing left to compute together
            self._fork_siblings(sequence)
        if looked_up:
            sequence.num_prefix_tokens = num_cached
        wanted = sequence.num_tokens_to_schedule
        num_tokens = self._affordable(sequence, wanted, budget)
        fits = num_tokens == wanted or self.config.enable_chunked_prefill
        if num_tokens and fits and self._make_room(sequence):
            copies = self.block_manager.allocate(sequence, num_tokens)
            if copies is not None:
                if looked_up and sequence.scheduled_at is None:
                    sequence.num_cached_tokens = num_cached
                    self.block_manager.count_lookup(len(sequence), num_cached)
                return ScheduledRow(sequence, num_tokens, copies)
        if num_cached:
            self.block_manager.free(sequence)  # it looks again when its turn comes
        return None

    def _affordable(self, sequence: Sequence, num_tokens: int, budget: int) -> int:
        """How many of a sequence's next tokens a step may compute. While others decode, prompts that take several steps
        anyway are computed a chunk at a time and by layers, or share so many tokens of each step."""
        if self.layered.holds(sequence):
            return 0
        if num_tokens > 1 and self._long_prompts.includes(sequence):
            return self._long_prompts.affordable(sequence, num_tokens, budget)
        return min(num_tokens, budget)

    def _place(self, row: ScheduledRow, rows: dict[Sequence, ScheduledRow]) -> int:
        """Let the row be computed in this step, or by layers; returns what that takes of the budget."""
        if self._long_prompts.includes(row.sequence) and self._long_prompts.place(row):
            return 0
        rows[row.sequence] = row
        return row.num_tokens

    def _num_decoding(self) -> int:
        return sum(sequence.num_tokens_to_schedule <= 1 for sequence in self.running)

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
        if row.end >= (sequence.num_published_blocks + 1) * self.config.block_size:
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
        """Where seats or blocks are short, sequences of lower priority give theirs to the most urgent that waits and
        can start. What they lose is computed again, mostly from the prefix cache."""
        while self.running and self.waiting:
            first = self._long_prompts.first_to_start(self.waiting, self.running)
            if first is None or first.num_pending_tokens:
                return
            is_full = len(self.running) >= self.config.max_num_seqs
            victim = self.running[-1] if is_full else self._least_urgent_with_blocks()
            if victim.order[0] <= first.order[0]:
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
        self.layered.drop(sequence)
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
