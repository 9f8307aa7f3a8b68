"""The engine: schedule → run → update → outputs, one step ahead of the device. In-process and
single-threaded, without sockets or text."""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from jaxserve.beam_search import Candidates
from jaxserve.beams import Beams
from jaxserve.block_manager import BlockManager
from jaxserve.config import EngineConfig, SchedulerConfig
from jaxserve.constraints.backends.base import MatcherError
from jaxserve.constraints.text_constraints import TextConstraints
from jaxserve.errors import RequestError
from jaxserve.messages import (
    NO_TOKEN_POSSIBLE,
    AbortRequest,
    AddRequest,
    EngineInfo,
    EngineStats,
    SequenceOutput,
    StepOutputs,
    TopLogprobs,
)
from jaxserve.model_runner import ModelRunner, StepResult
from jaxserve.request_check import check_request
from jaxserve.sampler import NO_TOKEN
from jaxserve.sampling_params import INT64_MAX
from jaxserve.scheduler import Scheduler
from jaxserve.sequence import Sequence
from jaxserve.speculation import DraftRow, Speculation
from jaxserve.step_plan import ScheduledRow, StepPlan
from jaxserve.tokenizer import Tokenizer

MIN_SHARE_AHEAD = 4  # of so many sequences one may sit out a step that is begun before its token is known


class StepUnderWay(NamedTuple):
    """What the device has been given."""

    plan: StepPlan
    result: StepResult


class Engine:
    """Owns the live sequences and the steps under way; `step` moves all of them forward.

    Args:
        limits: what to schedule under; the model runner's own if None.
        seed: seeds requests that bring no seed.
        tokenizer: for constraints, and for stop strings of beams; without it they are refused.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        limits: SchedulerConfig | None = None,
        *,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.model_runner = model_runner
        self.tokenizer = tokenizer
        self.text_constraints = TextConstraints(tokenizer, model_runner.model_config.vocab_size)
        self.limits = limits or model_runner.limits
        self.block_manager = BlockManager(self.limits)
        self.scheduler = Scheduler(self.limits, self.block_manager)
        self.speculation = (
            Speculation(self.limits.speculation, self.limits, self.block_manager, model_runner.shapes)
            if self.limits.speculation
            else None
        )
        self._requests: dict[str, list[Sequence]] = {}
        self._under_way: deque[StepUnderWay] = deque()
        self._beams = Beams(self.scheduler)
        self._arrivals = itertools.count()
        self._seeds = random.Random(seed)
        self._last_plan: StepPlan | None = None  # whose time is not known yet
        self._waiting_since = 0.0
        self._last_step_s = 0.0
        self._last_num_tokens = 0

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        report: Callable[[str], None] = lambda _: None,
        tokenizer: Tokenizer | None = None,
    ) -> Engine:
        """Load the model and compile everything; `report` takes lines for the start-up log.

        Raises:
            ConfigError, ModelLoadError: the model or a flag is wrong.
        """
        return cls(ModelRunner(config, report), seed=config.seed, tokenizer=tokenizer)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add_request(self, request: AddRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: it cannot be served; nothing was queued.
        """
        if request.request_id in self._requests:
            message = f"A request with the id {request.request_id!r} is running already."
            raise RequestError(message, param="request_id")
        runner = self.model_runner
        check_request(
            request,
            max_model_len=self.limits.max_model_len,
            vocab_size=runner.model_config.vocab_size,
            max_logprobs=runner.config.max_logprobs,
            has_tokenizer=self.tokenizer is not None,
            scheduling_policy=self.limits.scheduling_policy,
        )
        seed = self._seeds.randint(0, INT64_MAX) if request.params.seed is None else request.params.seed
        params, order = request.params, (request.priority, next(self._arrivals))
        sequences = [
            Sequence(
                request.request_id,
                index,
                request.prompt_token_ids,
                params,
                seed=seed,
                max_model_len=self.limits.max_model_len,
                eos_token_ids=request.eos_token_ids,
                cache_salt=request.cache_salt,
                order=order,
            )
            for index in range(1 if params.use_beam_search else params.num_sequences)
        ]
        sequences[0].siblings = sequences[1:]
        if request.constraint is not None:
            first = self.text_constraints.begin(request.constraint, request.eos_token_ids)
            for sequence in sequences:
                sequence.constrain(first if sequence is sequences[0] else first.fork())
        self._requests[request.request_id] = sequences
        if params.use_beam_search:
            self._beams.begin(sequences[0], self.tokenizer)
        self.scheduler.add(sequences[0])

    def abort_request(self, request: AbortRequest) -> None:
        """End sequences without an answer; their blocks are free at once. Unknown ones are none of our business:
        they have ended in the meantime."""
        for sequence in list(self._requests.get(request.request_id, [])):
            if request.indices is None or sequence.index in request.indices:  # all beams have index 0
                self._abort(sequence)

    def step(self) -> StepOutputs:
        """Give the device what it can compute next, then wait for the oldest step that it has."""
        started = time.monotonic()
        self._run_ahead()
        self._count_time()
        plan, result = self._under_way.popleft()
        result.wait()  # also for what samples nothing, or its time would be counted with the next step's
        outputs = self._update(plan, result)
        self._last_plan = plan
        done = plan.layers[1] >= self.limits.num_layers  # a chunk counts with its last layer
        self._last_step_s, self._last_num_tokens = time.monotonic() - started, plan.num_tokens * done
        if self.speculation is not None:
            self.speculation.settle(plan)
        if not self.has_work:  # it may be long before the next one
            self._count_time()
        return StepOutputs(outputs=outputs, stats=self.stats())

    def stats(self) -> EngineStats:
        """Gauges and totals as of now."""
        spec = self.speculation
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_cache_usage=self.block_manager.usage,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.block_manager.num_lookup_tokens,
            prefix_cache_hits=self.block_manager.num_hit_tokens,
            xla_compilations=self.model_runner.compilations.count,
            num_tokens=self._last_num_tokens,
            step_s=self._last_step_s,
            spec_decode_drafts=spec.num_drafts if spec else 0,
            spec_decode_draft_tokens=spec.num_draft_tokens if spec else 0,
            spec_decode_accepted_tokens=spec.num_accepted_tokens if spec else 0,
        )

    def info(self) -> EngineInfo:
        """What others must know about this engine."""
        runner = self.model_runner
        return EngineInfo(
            max_model_len=self.limits.max_model_len,
            vocab_size=runner.model_config.vocab_size,
            max_num_seqs=self.limits.max_num_seqs,
            max_num_batched_tokens=self.limits.max_num_batched_tokens,
            block_size=self.limits.block_size,
            num_blocks=self.limits.num_blocks,
            kv_cache_dtype=str(runner.dtype),
            platform=runner.platform,
            summary=[line for line in (runner.describe_attention(), runner.describe_kv_cache()) if line],
        )

    def _run_ahead(self) -> None:
        """Begin steps until the device has one more than it computes, or none can begin before results are there."""
        while self._under_way and not self._under_way[0].plan.is_wanted:
            self._under_way.popleft()
        depth = 2 if self.limits.async_scheduling else 1
        while len(self._under_way) < depth and not (
            self._under_way and self._must_wait(self._under_way[-1].plan)
        ):
            plan = self.scheduler.schedule()
            if not plan.rows and not self._under_way:  # all were preempted, and can begin again now
                plan = self.scheduler.schedule()
            if not plan.rows:
                return
            if self.speculation is not None:
                self.speculation.add_drafts(plan)
            self._under_way.append(StepUnderWay(plan, self.model_runner.run(plan)))

    @staticmethod
    def _must_wait(plan: StepPlan) -> bool:
        """Sequences whose next mask depends on this step's tokens sit out the next one if it begins at once, and run
        only every other step: a few may, so that all others need not wait for the host. Drafts are worth the wait."""
        return plan.num_drafts > 0 or plan.num_held * MIN_SHARE_AHEAD > len(plan.rows)

    def _count_time(self) -> None:
        """Of the last step, from when the device had it and the host waited until the same is true of the next one."""
        now = time.monotonic()
        plan, self._last_plan = self._last_plan, None
        if plan is not None:
            self.scheduler.layered.settle(plan, now - self._waiting_since)
            if self.speculation is not None:
                self.speculation.count_time(now - self._waiting_since)
        self._waiting_since = now

    # --- one step's aftermath -------------------------------------------------------------------------------

    def _update(self, plan: StepPlan, result: StepResult) -> list[SequenceOutput]:
        """Who has ended in the meantime (aborted, or by the token before) is passed over."""
        outputs = [
            SequenceOutput(
                s.request_id, s.index, [], num_cached_tokens=s.num_cached_tokens, scheduled_at=s.scheduled_at
            )
            for s in plan.first_scheduled
            if s.finish_reason is None
        ]
        rated = self._rate_prompts(plan, result) if plan.rates else {}
        for index, row in enumerate(plan.rows):
            sequence = row.sequence
            if sequence.finish_reason is not None:
                continue
            if isinstance(row, DraftRow):
                if row.accept():
                    outputs[-1] = outputs[-1].followed_by(self._advance(sequence, index, result))
                continue
            if sequence in rated:
                outputs.append(
                    SequenceOutput(sequence.request_id, sequence.index, [], prompt_logprobs=rated[sequence])
                )
            if not row.samples:
                outputs += self._finish_prompt(row)
            elif sequence.params.use_beam_search:
                outputs += self._advance_beam(sequence, result.candidates(index, sequence.params))
            else:
                outputs.append(self._advance(sequence, index, result))
        return outputs

    def _rate_prompts(self, plan: StepPlan, result: StepResult) -> dict[Sequence, list[TopLogprobs]]:
        """Prompt logprobs that the step brought, in the order in which `pack_step` asked for them."""
        rated: dict[Sequence, list[TopLogprobs]] = {}
        offset = 0
        for row in (row for row in plan.rows if row.rates):
            first, end = row.prompt_logprob_range
            count = row.sequence.params.prompt_logprobs
            if count is not None:
                rated[row.sequence] = [result.prompt_logprobs(offset + i, count) for i in range(end - first)]
                offset += end - first
        return rated

    def _finish_prompt(self, row: ScheduledRow) -> list[SequenceOutput]:
        """A request for nothing but its prompt's logprobs ends with the prompt."""
        sequence = row.sequence
        if sequence.params.max_tokens > 0 or row.end < sequence.num_prompt_tokens:
            return []
        sequence.finish("length")
        return [self._end(sequence)]

    def _advance(self, sequence: Sequence, index: int, result: StepResult) -> SequenceOutput:
        """Append the sampled token; a sequence that it ends leaves at once."""
        token_id = result.token_ids[index]
        if token_id == NO_TOKEN:
            sequence.finish("error")
            return self._end(sequence, error=NO_TOKEN_POSSIBLE)
        try:
            sequence.append_token(token_id)
        except MatcherError as error:
            sequence.finish("error")
            return self._end(sequence, error=str(error))
        logprobs = None
        if sequence.reports_logprobs:
            logprobs = [result.logprobs(index, sequence.params.logprobs or 0)]
        if sequence.finish_reason is not None:
            return self._end(sequence, [token_id], logprobs)
        return SequenceOutput(
            sequence.request_id,
            sequence.index,
            [token_id],
            logprobs=logprobs,
            num_cached_tokens=sequence.num_cached_tokens,
        )

    def _advance_beam(self, sequence: Sequence, candidates: Candidates) -> list[SequenceOutput]:
        live, outputs = self._beams.advance(sequence, candidates)
        if live:
            self._requests[sequence.request_id] = live
        else:
            del self._requests[sequence.request_id]
        return outputs

    def _end(
        self,
        sequence: Sequence,
        token_ids: list[int] | None = None,
        logprobs: list[TopLogprobs] | None = None,
        error: str | None = None,
    ) -> SequenceOutput:
        """Take a finished sequence out and say so."""
        self.scheduler.finish(sequence)
        self._forget(sequence)
        return SequenceOutput(
            sequence.request_id,
            sequence.index,
            token_ids or [],
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            logprobs=logprobs,
            num_cached_tokens=sequence.num_cached_tokens,
            error=error,
        )

    def _abort(self, sequence: Sequence) -> None:
        leader = self._requests[sequence.request_id][0]
        if sequence in leader.siblings:
            leader.siblings.remove(sequence)
        else:
            self.scheduler.abort(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        live = self._requests[sequence.request_id]
        live.remove(sequence)
        if not live:
            del self._requests[sequence.request_id]
            self._beams.forget(sequence.request_id)
