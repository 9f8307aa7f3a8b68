"""The engine: schedule → run → update → outputs. In-process, single-threaded, without sockets or text."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from jaxserve.block_manager import BlockManager
from jaxserve.config import EngineConfig, SchedulerConfig
from jaxserve.errors import RequestError
from jaxserve.messages import AbortRequest, AddRequest, EngineInfo, EngineStats, SequenceOutput, StepOutputs
from jaxserve.model_runner import ModelRunner, StepResult
from jaxserve.sampling_params import INT64_MAX
from jaxserve.scheduler import ScheduledRow, Scheduler, StepPlan
from jaxserve.sequence import Sequence


class Engine:
    """Owns the live sequences; `step` moves all of them forward.

    Args:
        limits: what to schedule under; the model runner's own if None.
        seed: seeds requests that bring no seed.
    """

    def __init__(
        self, model_runner: ModelRunner, limits: SchedulerConfig | None = None, *, seed: int = 0
    ) -> None:
        self.model_runner = model_runner
        self.limits = limits or model_runner.limits
        self.block_manager = BlockManager(self.limits)
        self.scheduler = Scheduler(self.limits, self.block_manager)
        self._requests: dict[str, list[Sequence]] = {}
        self._seeds = random.Random(seed)
        self._last_step_s = 0.0
        self._last_num_tokens = 0

    @classmethod
    def load(cls, config: EngineConfig, report: Callable[[str], None] = lambda _: None) -> Engine:
        """Load the model and compile everything; `report` takes lines for the start-up log.

        Raises:
            ConfigError, ModelLoadError: the model or a flag is wrong.
        """
        return cls(ModelRunner(config, report), seed=config.seed)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add_request(self, request: AddRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: it cannot be served; nothing was queued.
        """
        self._check(request)
        seed = self._seeds.randint(0, INT64_MAX) if request.params.seed is None else request.params.seed
        sequences = [
            Sequence(
                request.request_id,
                index,
                request.prompt_token_ids,
                request.params,
                seed=seed,
                max_model_len=self.limits.max_model_len,
                eos_token_ids=request.eos_token_ids,
                cache_salt=request.cache_salt,
            )
            for index in range(request.params.n)
        ]
        sequences[0].siblings = sequences[1:]
        self._requests[request.request_id] = sequences
        self.scheduler.add(sequences[0])

    def abort_request(self, request: AbortRequest) -> None:
        """End sequences without an answer; their blocks are free at once. Unknown ones are none of our business:
        they have ended in the meantime."""
        for sequence in list(self._requests.get(request.request_id, [])):
            if request.indices is None or sequence.index in request.indices:
                self._abort(sequence)

    def step(self) -> StepOutputs:
        """Compute one step for all that can run."""
        started = time.monotonic()
        plan = self.scheduler.schedule()
        result = self.model_runner.run(plan)
        outputs = self._update(plan, result)
        self._last_step_s, self._last_num_tokens = time.monotonic() - started, plan.num_tokens
        return StepOutputs(outputs=outputs, stats=self.stats())

    def stats(self) -> EngineStats:
        """Gauges and totals as of now."""
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
            platform=runner.device.platform,
            summary=[runner.describe_kv_cache()],
        )

    # --- one step's aftermath -------------------------------------------------------------------------------

    def _update(self, plan: StepPlan, result: StepResult) -> list[SequenceOutput]:
        sampled = {row.sequence for row in plan.rows if row.samples}
        outputs = [
            SequenceOutput(
                s.request_id, s.index, [], num_cached_tokens=s.num_cached_tokens, scheduled_at=s.scheduled_at
            )
            for s in plan.first_scheduled
        ]
        for index, row in enumerate(plan.rows):
            self.scheduler.mark_computed(row)
            if row.sequence in sampled:
                outputs.append(self._advance(row, index, result))
        return outputs

    def _advance(self, row: ScheduledRow, index: int, result: StepResult) -> SequenceOutput:
        """Append the sampled token; a sequence that it ends leaves at once."""
        sequence = row.sequence
        token_id = result.token_id(index)
        sequence.append_token(token_id)
        wanted = sequence.params.logprobs
        logprobs = None if wanted is None else [result.logprobs(index, wanted)]
        if sequence.finish_reason is not None:
            self.scheduler.finish(sequence)
            self._forget(sequence)
        return SequenceOutput(
            sequence.request_id,
            sequence.index,
            [token_id],
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            logprobs=logprobs,
            num_cached_tokens=sequence.num_cached_tokens,
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

    def _check(self, request: AddRequest) -> None:
        """The front checks all of this before; a request that slips through must not harm others."""
        vocab_size = self.model_runner.model_config.vocab_size
        prompt = request.prompt_token_ids
        if request.request_id in self._requests:
            raise RequestError(
                f"A request with the id {request.request_id!r} is running already.", param="request_id"
            )
        if not prompt:
            raise RequestError("The prompt cannot be empty.", param="prompt")
        if len(prompt) >= self.limits.max_model_len:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens, the model takes {self.limits.max_model_len} with the output.",
                param="prompt",
                code="context_length_exceeded",
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise RequestError(f"Token ids must be in [0, {vocab_size}).", param="prompt")
        if (request.params.logprobs or 0) > self.model_runner.config.max_logprobs:
            limit = self.model_runner.config.max_logprobs
            raise RequestError(f"logprobs must be at most {limit}.", param="logprobs")
