"""Prompt-lookup speculative decoding: what a sequence says next is guessed from what it has said before, and one step
checks several guesses.

A guess (draft) is a row of its own: one token, in the blocks of its sequence, that attends to the drafts before it. So
the step and its programs know nothing of drafts. Each row samples what follows its token, and since a draw is a
function of seed, choice, position and logits, a draft that equals what was sampled before it is what would have come
anyway, and so is what its row samples. The first draft that does not, and all behind it, are passed over: results are
those without speculation, greedy or sampled.

Lookup: Saxena, "Prompt Lookup Decoding" (2023). Checking several tokens in one step: Leviathan et al. (ICML 2023).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from jaxserve.block_manager import BlockManager
from jaxserve.config import SchedulerConfig, SpeculativeConfig
from jaxserve.sequence import Sequence
from jaxserve.step_plan import NO_POSITIONS, ScheduledRow, StepPlan
from jaxserve.step_shapes import StepShape

HASH_FACTOR, HASH_MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
MANY_TOKENS = 64  # from here on numpy is the faster way to look at them

# how often drafts are right
FIRST_RATE = 0.7  # before anything is known
RATE_WEIGHT = 0.3  # of one draft in its sequence's rate
COMMON_RATE_WEIGHT = 0.05  # and in that of all, which new sequences begin with
HIGHEST_RATE = 0.98
STEP_WEIGHT = 0.1  # of one step in the mean of how many of its drafts are right

# whether they pay
MIN_GAIN = 1.05  # they must promise so many times the speed
PROBE_RATE = 0.8  # assumed now and then, to find out whether a sequence repeats itself by now
PROBE_PAUSE = 16  # steps between two such attempts
MAX_CREDIT = 3.0  # steps that may be lost with drafts before they have gained anything
CREDIT_A_STEP = 0.01  # share of the time that may be lost in the long run
MAX_DRAFTING = 16  # steps with drafts in a row; then comes one without, to see how long it takes
FIRST_STEPS = 3  # of a kind, of which the shortest counts
# of a step's duration in the mean of its kind: what delays a step now and then is to count little
FALLING_WEIGHT, RISING_WEIGHT, MAX_RISE = 0.5, 0.1, 1.5
# the mean with drafts falls while there are none: one that was too long is tried again
FORGOTTEN_A_STEP = 0.001


class DraftRow(ScheduledRow):
    """A guessed token of a sequence, behind the row of its last token or of the draft before.

    Attributes:
        accepted: whether it was the right one.
    """

    __slots__ = ("accepted", "token_id")

    def __init__(self, before: ScheduledRow, token_id: int) -> None:
        self.sequence = before.sequence
        self.start, self.end, self.num_tokens = before.end, before.end + 1, 1
        self.copies = ()
        self.samples = True
        self.source_row = 0
        self.rates, self.prompt_logprob_range = False, NO_POSITIONS
        self.token_id = token_id
        self.accepted = False

    @property
    def token_ids(self) -> list[int]:
        return [self.token_id]

    def accept(self) -> bool:
        """Whether the token is what the sequence has said there; then it counts as computed."""
        sequence = self.sequence
        if len(sequence) == self.end and sequence.token_ids[-1] == self.token_id:
            sequence.num_computed_tokens = self.end
            self.accepted = True
        return self.accepted


class NgramIndex:
    """Where each run of `shortest` … `longest` tokens of a growing text was seen last.

    A run is known by a 64-bit hash alone: if two are ever confused, a draft is wrong, which does no harm.
    """

    def __init__(self, longest: int, shortest: int) -> None:
        self._longest = longest
        self._shortest = shortest
        self._behind: dict[int, int] = {}  # hash of a run → position behind it
        self._num_seen = 0

    def propose(self, token_ids: list[int], *, skip: int, count: int) -> tuple[int, list[int]]:
        """What may follow the text.

        Args:
            token_ids: the text of the last time, longer by some tokens.
            skip: tokens behind the text that are on their way already.
            count: tokens to guess behind those.

        Returns:
            (length of the run at the text's end that was seen before, its continuation there); (0, []) without any.
        """
        self._see(token_ids)
        length = len(token_ids)
        for n, key in reversed(list(enumerate(self._keys(token_ids, length - 1), self._shortest))):
            behind = self._behind.get(key)
            if behind is not None:  # a continuation that reaches the text's end goes round
                period = length - behind
                return n, [token_ids[behind + (skip + i) % period] for i in range(count)]
        return 0, []

    def _see(self, token_ids: list[int]) -> None:
        """Take in all runs that something follows."""
        stop = len(token_ids) - 1
        if self._num_seen == 0 and stop > MANY_TOKENS:
            self._see_many(token_ids, stop)
        else:
            for last in range(self._num_seen, stop):
                self._behind.update(dict.fromkeys(self._keys(token_ids, last), last + 1))
        self._num_seen = stop

    def _keys(self, token_ids: list[int], last: int) -> Iterator[int]:
        """Hashes of the runs that end with token `last`, the shortest first."""
        key = 0
        for n in range(1, min(self._longest, last + 1) + 1):
            key = (key * HASH_FACTOR + token_ids[last - n + 1] + 1) & HASH_MASK
            if n >= self._shortest:
                yield key

    def _see_many(self, token_ids: list[int], stop: int) -> None:
        """Likewise for a text from its beginning."""
        tokens = np.asarray(token_ids[:stop], np.uint64) + np.uint64(1)
        keys = tokens
        for n in range(1, min(self._longest, stop) + 1):
            if n > 1:  # unsigned numbers wrap around
                keys = keys[1:] * np.uint64(HASH_FACTOR) + tokens[: stop - n + 1]
            if n >= self._shortest:
                self._behind.update(zip(keys.tolist(), range(n, stop + 1), strict=True))


class Proposal(NamedTuple):
    """Drafts that may follow a row.

    Attributes:
        rate: how likely each is right if those before it are.
        is_long: they follow from a run of the largest length.
    """

    row: ScheduledRow
    token_ids: list[int]
    rate: float
    is_long: bool


class StepTimes:
    """How long steps of rows of one token take: a mean for each shape, with drafts and without."""

    def __init__(self, shapes: list[StepShape]) -> None:
        self.shapes = shapes
        self._seconds: dict[tuple[StepShape, bool], float] = {}
        self._counts: dict[tuple[StepShape, bool], int] = defaultdict(int)

    def shape(self, num_rows: int) -> StepShape:
        """Of a step of so many rows."""
        return next(s for s in self.shapes if s.fits(num_rows, num_rows, prompt_logprobs=False))

    def plain(self, num_rows: int) -> float | None:
        """Seconds of a step of rows without drafts; None if there were too few to tell."""
        key = self.shape(num_rows), False
        return self._seconds[key] if self._counts[key] >= FIRST_STEPS else None

    def drafting(self, shape: StepShape, num_rows: int, plain: float) -> float:
        """Seconds of a step of this shape in which rows have drafts that would take `plain` without them. If there was
        none of the shape yet, by the largest smaller one that is known: tokens cost about as much as their root."""
        known, known_tokens = plain, self.shape(num_rows).num_tokens
        for smaller in self.shapes:
            seconds = self._seconds.get((smaller, True)) or self._seconds.get((smaller, False))
            if seconds is not None and known_tokens <= smaller.num_tokens <= shape.num_tokens:
                known, known_tokens = seconds, smaller.num_tokens
        return known * math.sqrt(shape.num_tokens / known_tokens)

    def add(self, num_rows: int, num_drafts: int, seconds: float) -> float:
        """Take in a step; returns its seconds, or less if something has delayed it."""
        key = self.shape(num_rows + num_drafts), num_drafts > 0
        self._counts[key] += 1
        known = self._seconds.setdefault(key, seconds)
        seconds = min(seconds, MAX_RISE * known)
        if self._counts[key] <= FIRST_STEPS:
            self._seconds[key] = min(known, seconds)
        else:
            self._seconds[key] += (FALLING_WEIGHT if seconds < known else RISING_WEIGHT) * (seconds - known)
        if not num_drafts:
            for shape, drafting in self._seconds:
                self._seconds[shape, drafting] *= 1 - FORGOTTEN_A_STEP * drafting
        return seconds


class Payoff:
    """Decides how many drafts are worth their time, by how long steps have taken so far.

    Whatever it hopes for, it keeps an account of what drafts have gained and lost, in steps: without credit there are
    none, and credit comes back slowly. That bounds what texts lose on which drafts fail; one that keeps changing
    between copying and not can lose more (0.91 × in a model of it), because it earns its credit back.
    """

    def __init__(self, shapes: list[StepShape]) -> None:
        self._times = StepTimes(shapes)
        self._credit = MAX_CREDIT
        self._steps_since_probe = PROBE_PAUSE
        self._num_drafting = 0  # steps in a row

    def is_open(self, num_rows: int) -> bool:
        """Whether there may be drafts in the next step, of so many rows, at all."""
        has_room = any(shape.num_rows > num_rows for shape in self._times.shapes)
        return has_room and self._credit > 0.0 and self._num_drafting < MAX_DRAFTING

    def choose(self, num_rows: int, proposals: list[Proposal], max_drafts: int) -> list[int]:
        """How many drafts of each proposal the next step, of `num_rows` rows, should check; at most `max_drafts`."""
        none = [0] * len(proposals)
        plain = self._times.plain(num_rows)
        if plain is None:
            return none
        counts, _ = self._best(num_rows, proposals, max_drafts, plain)
        self._steps_since_probe += 1
        if not any(counts) and self._steps_since_probe > PROBE_PAUSE:
            hopeful = [p._replace(rate=max(p.rate, PROBE_RATE) if p.is_long else p.rate) for p in proposals]
            counts, seconds = self._best(num_rows, hopeful, max_drafts, plain)
            if (seconds - plain) / plain > self._credit:
                return none
            if any(counts):
                self._steps_since_probe = 0
        return counts

    def settle(self, num_rows: int, num_drafts: int, accepted: list[float], seconds: float) -> None:
        """A step of `num_rows` rows and, beside them, `num_drafts` drafts has taken so long; of the drafts of each
        sequence that had any, so many a step have been right lately. (A step by itself says little: seven right ones in
        every other step are worth 3.5 in each.)"""
        seconds = self._times.add(num_rows, num_drafts, seconds)
        plain = self._times.plain(num_rows)
        gained = CREDIT_A_STEP
        if num_drafts and plain is not None:
            saved = sum(1.0 - 1.0 / (1 + count) for count in accepted) / num_rows  # as in `_savings`
            gained = 1.0 - (1.0 - saved) * seconds / plain
        self._credit = min(self._credit + gained, MAX_CREDIT)
        self._num_drafting = self._num_drafting + 1 if num_drafts else 0

    def _best(
        self, num_rows: int, proposals: list[Proposal], max_drafts: int, plain: float
    ) -> tuple[list[int], float]:
        """Drafts that promise the highest speed, and the seconds of their step.

        Speed is that of a token on average over sequences: a draft counts by the share of a step that it saves its
        sequence. Tokens a second would have many wait for a few that repeat themselves: those would be done soon, and
        the whole late.
        """
        savings = [
            (saving, index)
            for index, proposal in enumerate(proposals)
            for saving in _savings(proposal.rate, len(proposal.token_ids))
        ]
        savings.sort(key=lambda entry: -entry[0])
        best_count, best_seconds, best_speed = 0, plain, MIN_GAIN / plain
        for shape in self._times.shapes:
            count = min(shape.num_rows - num_rows, len(savings), max_drafts)
            if count <= 0 or shape is not self._times.shape(num_rows + count):
                continue
            seconds = self._times.drafting(shape, num_rows, plain)
            saved = sum(saving for saving, _ in savings[:count]) / num_rows
            speed = 1.0 / ((1.0 - saved) * seconds)
            if speed > best_speed:
                best_count, best_seconds, best_speed = count, seconds, speed
        counts = [0] * len(proposals)
        for _, index in savings[:best_count]:
            counts[index] += 1
        return counts, best_seconds


def _savings(rate: float, num_drafts: int) -> list[float]:
    """What share of a step each further draft of a sequence saves it for each of its tokens, if each is right at this
    rate once those before it are."""
    tokens = list(itertools.accumulate((rate**n for n in range(1, num_drafts + 1)), initial=1.0))
    return [1.0 / fewer - 1.0 / more for fewer, more in itertools.pairwise(tokens)]


class Drafter:
    """A sequence's index, how often its drafts have been right, and how many of a step's were on average."""

    __slots__ = ("index", "mean_accepted", "num_steps", "rate")

    def __init__(self, index: NgramIndex, rate: float) -> None:
        self.index = index
        self.rate = rate
        self.mean_accepted = 0.0
        self.num_steps = 0

    def count_step(self, num_accepted: int) -> None:
        """Of those that its step checked, so many were right."""
        self.num_steps += 1
        self.mean_accepted += max(1 / self.num_steps, STEP_WEIGHT) * (num_accepted - self.mean_accepted)


class Speculation:
    """Adds drafts to plans, and draws the conclusions when their results are there.

    Args:
        shapes: of the steps that can be run, as the model runner looks through them.

    Attributes:
        num_drafts, num_draft_tokens, num_accepted_tokens: running totals.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        limits: SchedulerConfig,
        block_manager: BlockManager,
        shapes: list[StepShape],
    ) -> None:
        self._config = config
        self._max_tokens = limits.max_num_batched_tokens
        self._block_manager = block_manager
        self._drafters: WeakKeyDictionary[Sequence, Drafter] = WeakKeyDictionary()
        self._rate = FIRST_RATE
        self.payoff = Payoff(shapes)
        # rows, drafts, and how many of each sequence have been right lately
        self._settled: tuple[int, int, list[float]] | None = None
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def add_drafts(self, plan: StepPlan) -> None:
        """Put draft rows behind the rows that they follow, if the step computes single tokens alone and they promise to
        pay. Whoever has drafts cannot go on before the host knows which of them are right.

        Drafts take free blocks, and what is left of the token budget; nobody is preempted for them.
        """
        if not self.payoff.is_open(len(plan.rows)) or not _only_decodes(plan):
            return
        proposals = [proposal for row in plan.rows if (proposal := self._propose(row)) is not None]
        if not proposals:
            return
        counts = self.payoff.choose(len(plan.rows), proposals, self._max_tokens - len(plan.rows))
        rows_behind = {
            p.row: self._draft(p.row, p.token_ids[:n]) for p, n in zip(proposals, counts, strict=True) if n
        }
        if not any(rows_behind.values()):
            return
        for row, drafts in rows_behind.items():
            if drafts:
                row.sequence.num_pending_tokens -= 1  # it does not go on by itself
                plan.num_held += 1
                self.num_drafts += 1
                plan.num_drafts += len(drafts)
        self.num_draft_tokens += plan.num_drafts
        plan.rows = [r for row in plan.rows for r in (row, *rows_behind.get(row, ()))]
        for index, row in enumerate(plan.rows):
            row.sequence.sampled_row = index

    def settle(self, plan: StepPlan) -> None:
        """The plan's results have been taken."""
        self._settled = None
        if not _only_decodes(plan):
            return
        accepted: list[float] = []
        for sequence, rows in itertools.groupby(plan.rows, key=lambda row: row.sequence):
            drafts = [row for row in rows if isinstance(row, DraftRow)]
            if drafts:
                self._learn(sequence, [draft.accepted for draft in drafts])
                accepted.append(self._drafters[sequence].mean_accepted)
        self._settled = len(plan.rows) - plan.num_drafts, plan.num_drafts, accepted

    def count_time(self, seconds: float) -> None:
        """The plan that was settled last took so long, from when it was the next one to be done until the one behind it
        was: behind drafts the device waits for the host, which is part of what they cost."""
        if self._settled is not None:
            self.payoff.settle(*self._settled, seconds)

    def _propose(self, row: ScheduledRow) -> Proposal | None:
        """None if nothing is to be guessed, or if what the row's logits are changed by cannot be told ahead."""
        sequence = row.sequence
        params = sequence.params
        room = min(self._config.num_speculative_tokens, sequence.max_len - 1 - row.end)
        is_long_enough = row.end - sequence.num_prompt_tokens >= params.min_tokens
        if not row.samples or sequence.needs_values or room <= 0 or not is_long_enough:
            return None
        drafter = self._drafters.get(sequence)
        if drafter is None:
            index = NgramIndex(self._config.prompt_lookup_max, self._config.prompt_lookup_min)
            drafter = self._drafters[sequence] = Drafter(index, self._rate)
        skip = row.end - len(sequence)
        length, token_ids = drafter.index.propose(sequence.token_ids, skip=skip, count=room)
        if not token_ids:
            return None
        is_long = length == self._config.prompt_lookup_max
        return Proposal(row, token_ids, min(drafter.rate, HIGHEST_RATE), is_long)

    def _draft(self, row: ScheduledRow, token_ids: list[int]) -> list[DraftRow]:
        """Draft rows behind `row`, with blocks; none if there are no blocks. What `row` writes into is the sequence's
        own already, so there is nothing to copy."""
        if self._block_manager.allocate(row.sequence, len(token_ids)) is None:
            return []
        drafts: list[DraftRow] = []
        for token_id in token_ids:
            drafts.append(DraftRow(drafts[-1] if drafts else row, token_id))
        return drafts

    def _learn(self, sequence: Sequence, accepted: list[bool]) -> None:
        """Which drafts of a step were right. The first that was not gives back the blocks of those behind."""
        num_accepted = sum(accepted)
        self.num_accepted_tokens += num_accepted
        drafter = self._drafters[sequence]
        drafter.count_step(num_accepted)
        if sequence.finish_reason is None and num_accepted < len(accepted):
            self._block_manager.trim(sequence)
            accepted = accepted[: num_accepted + 1]
        else:
            accepted = accepted[:num_accepted]
        for right in accepted:
            drafter.rate += RATE_WEIGHT * (right - drafter.rate)
            self._rate += COMMON_RATE_WEIGHT * (right - self._rate)


def _only_decodes(plan: StepPlan) -> bool:
    """Whether each row is the next token of an output: then the step's cost depends on their number alone."""
    return not plan.is_layered and all(
        row.num_tokens == 1 and row.start >= row.sequence.num_prompt_tokens for row in plan.rows
    )
