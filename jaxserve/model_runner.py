"""The only holder of device state: parameters, KV pool and compiled programs."""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.beam_search import Candidates
from jaxserve.compilation import CompilationCounter, enable_compilation_cache, set_compiler_flags
from jaxserve.config import EngineConfig, SchedulerConfig
from jaxserve.errors import ConfigError
from jaxserve.kernels import pallas_tpu_layout
from jaxserve.kernels.lanes import TOKEN_GROUP
from jaxserve.kernels.metadata import MAX_UNTILED_TOKENS
from jaxserve.kernels.paged_attention import BACKENDS, PoolShape, ServingShape, backend_for, passed_over
from jaxserve.kv_cache import (
    CPU_DEFAULT_POOL_BYTES,
    KVCacheSpec,
    claim_device_memory,
    free_device_bytes,
    num_blocks_for,
)
from jaxserve.lockstep import Follower, OnLoss, Step, Table, end_process, join
from jaxserve.logits_processors import SlotTables
from jaxserve.messages import TopLogprobs
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import Llama, checkpoint_slots
from jaxserve.models.loader import Checkpoint, load_params, open_checkpoint, resolve_model
from jaxserve.sampling_params import SamplingParams
from jaxserve.sequence import Sequence
from jaxserve.sharding import EVERYWHERE, SHARDED, DeviceGroup, VocabShard, shard_config
from jaxserve.slot_tables import SlotTableManager
from jaxserve.step import ModelDefinition, Pools, StepOutputs, logits_sizes, make_all_logits, make_step
from jaxserve.step_inputs import pack_step
from jaxserve.step_plan import ScheduledRow, StepPlan
from jaxserve.step_shapes import StepProgram, step_programs, step_shapes, token_buckets
from jaxserve.trace_cache import TraceCache
from jaxserve.weight_layouts import loop_copies_table

ROW_MULTIPLE = 8
COMPILE_THREADS = 2
PROGRAM_BYTES_GUESS = 256 << 20
PROGRAM_BYTES_AT_MOST = 4 << 30  # if there is room for so much, nobody asks what it is

Report = Callable[[str], None]
"""Takes one line for the start-up log."""


class PlatformDefaults(NamedTuple):
    """What None in EngineConfig means on a platform."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    smallest_buckets: tuple[int, ...]
    smallest_mixed_bucket: (
        int | None
    )  # below, programs are for decoding alone; None: every program takes everything
    async_scheduling: bool


# a lone sequence is worth a program of its own on a CPU, where every row costs
PLATFORM_DEFAULTS = {
    "cpu": PlatformDefaults(
        64,
        256,
        64,
        (1, 8),
        None,
        async_scheduling=True,
    )
}
ACCELERATOR_DEFAULTS = PlatformDefaults(256, 2048, 32, (16,), 256, async_scheduling=True)


class StepResult:
    """What a step computes: row r belongs to `plan.rows[r]`. Whoever asks first waits for the step to end; what few
    ask for is fetched when it is."""

    def __init__(self, outputs: StepOutputs, config: EngineConfig) -> None:
        outputs.sampled.copy_to_host_async()
        self._outputs = outputs
        self._max_logprobs = config.max_logprobs
        self._processed = config.logprobs_mode == "processed"

    @cached_property
    def _sampled(self) -> npt.NDArray[np.int32]:
        return np.asarray(self._outputs.sampled)

    @cached_property
    def _candidates(self) -> npt.NDArray[np.int32]:
        return np.asarray(self._outputs.candidates)

    @cached_property
    def _prompt(self) -> npt.NDArray[np.int32]:
        return np.asarray(self._outputs.prompt)

    def wait(self) -> None:
        """Until the step has ended."""
        assert self._sampled is not None

    @cached_property
    def token_ids(self) -> list[int]:
        """What each row sampled; NO_TOKEN if its masks leave none."""
        ids: list[int] = self._sampled[:, 0].tolist()
        return ids

    def logprobs(self, row: int, count: int) -> TopLogprobs:
        """The sampled token's log-probability and rank, and the `count` most likely tokens."""
        return self._top_logprobs(self._sampled[row, 1:], count)

    def prompt_logprobs(self, index: int, count: int) -> TopLogprobs:
        """Of the step's `index`-th token of a prompt that is rated."""
        return self._top_logprobs(self._prompt[index], count)

    def candidates(self, row: int, params: SamplingParams) -> Candidates:
        """How the row's beam can go on."""
        ids, scores, logprobs = np.split(self._candidates[row], 3)
        scores, logprobs = scores.view(np.float32), logprobs.view(np.float32)
        top = None if params.logprobs is None else self.logprobs(row, params.logprobs)
        return Candidates(ids, scores, scores if self._processed else logprobs, top)

    def _top_logprobs(self, fields: npt.NDArray[np.int32], count: int) -> TopLogprobs:
        L = self._max_logprobs
        return TopLogprobs(
            logprob=float(fields[:1].view(np.float32)[0]),
            rank=int(fields[1]),
            top_ids=fields[2 : 2 + count].tolist(),
            top_logprobs=fields[2 + L : 2 + L + count].view(np.float32).tolist(),
        )


class ModelRunner:
    """Loads the model, compiles every program, allocates the pool; then runs steps and nothing else.

    Attributes:
        model_config: of the checkpoint.
        limits: resolved; what the scheduler works under.
        compilations: counts what XLA compiled since the runner was ready.
    """

    def __init__(
        self, config: EngineConfig, report: Report = lambda _: None, on_loss: OnLoss = end_process
    ) -> None:
        set_compiler_flags()
        claim_device_memory(config.memory_utilization)
        self._others = join(config, on_loss, report)
        self.config = config = self._others.config
        self.compilations = CompilationCounter()
        if config.compilation_cache:
            enable_compilation_cache()
        path = resolve_model(config.model)
        checkpoint = open_checkpoint(path, config.load_format)
        self.model_config = checkpoint.config
        self._shard = shard_config(self.model_config, config.tensor_parallel_size)
        self.devices = DeviceGroup.of(config.tensor_parallel_size)
        self.platform = self.devices.platform
        self._vocab = VocabShard(self.model_config.vocab_size, self.devices.group)
        self.dtype = _resolve_dtype(config, self.model_config, self.platform)
        self.kv_dtype = _resolve_kv_dtype(config, self.dtype)
        self.max_model_len = _resolve_max_model_len(config, self.model_config)
        defaults = PLATFORM_DEFAULTS.get(self.platform, ACCELERATOR_DEFAULTS)
        self._max_num_seqs = config.max_num_seqs or defaults.max_num_seqs
        self._max_num_rows = _round_up(self._max_num_seqs, ROW_MULTIPLE)
        ahead = config.async_scheduling
        self._async_scheduling = defaults.async_scheduling if ahead is None else ahead
        chunk = defaults.max_num_batched_tokens if config.enable_chunked_prefill else self.max_model_len
        max_num_batched_tokens = config.max_num_batched_tokens or chunk
        self.block_size = config.block_size or self._default_block_size(defaults)
        self.attention_backend, self._passed_over = self._choose_attention(max_num_batched_tokens)
        self.shapes = step_shapes(
            token_buckets(max_num_batched_tokens, defaults.smallest_buckets),
            defaults.smallest_mixed_bucket,
            max_num_seqs=self._max_num_rows,
            blocks_per_row=_ceil_div(self.max_model_len, self.block_size),
            lanes=self.platform == "cpu" and self.model_config.sliding_window is None,
        )
        # an accelerator would stop at every branch that depends on data
        self._unroll_layers = self.platform != "cpu"
        self._cuts_layers = (
            not self._unroll_layers and config.long_prefill_token_threshold is None and self.shapes[-1].tiled
        )
        self._programs = step_programs(self.shapes, shared=self.platform == "cpu")
        self._program_of = {shape: i for i, program in enumerate(self._programs) for shape in program.shapes}
        self._definition = ModelDefinition.of(
            lambda: Llama(
                self.model_config,
                dtype=self.dtype,
                max_model_len=self.max_model_len,
                quantized=config.quantization == "int8",
                group=self.devices.group,
            )
        )
        self._spec = KVCacheSpec.of(
            self._shard, self.block_size, self.kv_dtype, self.platform, self.attention_backend
        )
        self._free_bytes = (
            None
            if config.kv_cache_memory_bytes
            else self._others.least(free_device_bytes(self.devices.devices, config.memory_utilization))
        )
        self._max_num_batched_tokens = max_num_batched_tokens
        guess = self._num_blocks(program_bytes=PROGRAM_BYTES_GUESS)
        self.limits = self._limits(guess)  # what cannot work is said before anything is loaded
        self._slots = SlotTableManager(self._max_num_seqs, self.model_config.vocab_size, self._place_table)
        self._compiled: dict[int, jax.stages.Compiled] = {}
        self._pools: Pools
        self._all_logits: jax.stages.Wrapped | None = None
        self._tracing = threading.Lock()
        # tried where weights have no layouts of their own
        keeps_traces = config.compilation_cache and self.platform == "cpu" and self.devices.group.size == 1
        self._traces = TraceCache(config, self.model_config, self.devices.kind) if keeps_traces else None
        with ThreadPoolExecutor(COMPILE_THREADS + 1, thread_name_prefix="startup") as pool:
            started = time.monotonic()
            loading = pool.submit(self._load, checkpoint, report)
            try:
                self._start_programs(pool, guess, loading)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what is wrong is said before all is compiled
                raise
        sizes = " | ".join(
            ", ".join(f"{s.num_tokens}{' decoded' if s.decode_only else ''}" for s in program.shapes)
            for program in self._programs
        )
        report(f"compiled {len(self._programs)} programs ({sizes} tokens) in {_seconds_since(started)}")
        self.compilations.reset()

    def run(self, plan: StepPlan) -> StepResult:
        """Begin one step: one transfer in, one program, one small transfer out. The device runs steps in the order in
        which they were begun; nobody waits here."""
        needed, rows = plan.num_tokens, len(plan.rows)
        if plan.is_layered:  # tiles, however few tokens are left of the prompt: they lie behind many
            needed = max(needed, MAX_UNTILED_TOKENS + 1)
        rates = plan.rates
        shape = next(shape for shape in self.shapes if shape.fits(needed, rows, prompt_logprobs=rates))
        program = self._program_of[shape]
        self._slots.assign([row for row in plan.rows if row.samples and row.sequence.changes_logits])
        packed = pack_step(plan, self._programs[program], shape, self.block_size, self._slots)
        tables = self._slots.on_device()
        self._others.send_step(program, packed)
        outputs, self._pools = self._execute(program, self._pools, packed, tables)
        return StepResult(outputs, self.config)

    def follow(self) -> None:
        """Run what process 0 runs, until it is told to end. For the other processes."""
        assert isinstance(self._others, Follower), "process 0 runs steps"
        tables = self._slots.on_device()
        last: StepOutputs | None = None
        for frame in self._others.frames():
            match frame:
                case Step():
                    packed = np.frombuffer(frame.packed, np.int32)
                    outputs, self._pools = self._execute(frame.program, self._pools, packed, tables)
                    jax.block_until_ready(last)  # one step ahead, as process 0 is
                    last = outputs
                case Table():
                    old = getattr(tables, frame.name)
                    table = np.frombuffer(frame.data, old.dtype).reshape(old.shape)
                    tables = tables._replace(**{frame.name: self.devices.put_everywhere(table)})

    def profile(self, *, running: bool) -> str | None:
        """Begin or end a trace of this process in the configuration's `profile_dir`; returns why that failed."""
        directory = self.config.profile_dir
        if directory is None:
            return "there is no --profile-dir"
        try:
            if running:
                jax.profiler.start_trace(directory)
            else:
                jax.profiler.stop_trace()  # writes it
        except (OSError, RuntimeError) as error:  # the disk; the profiler
            return str(error)
        return None

    def close(self) -> None:
        """End together with the other processes, if there are any."""
        self._others.close()

    def describe_kv_cache(self) -> str:
        """One line for the log."""
        usable = self.limits.num_blocks - 1
        tokens = usable * self.block_size
        size = usable * self._spec.bytes_per_block * self.devices.group.size
        fit = tokens // self.max_model_len
        return (
            f"KV cache: {usable:,} blocks of {self.block_size} = {tokens:,} tokens in {self.kv_dtype.name}, "
            f"{size / 2**30:.1f} GiB; "
            f"{fit:,} sequence{'s' if fit != 1 else ''} of {self.max_model_len:,} fit"
        )

    def describe_attention(self) -> str | None:
        """One line for the log; None on a CPU, which has one backend."""
        if self.platform == "cpu":
            return None
        reasons = "".join(f"; {name} does not fit: {reason}" for name, reason in self._passed_over.items())
        return f"Attention: {self.attention_backend}{reasons}"

    def prompt_logits(self, prompt_token_ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits of every position, float32 [P, V], computed in chunks like any prompt. Compiles: for tests."""
        sequence = Sequence(
            "", 0, prompt_token_ids, SamplingParams(), seed=0, max_model_len=self.max_model_len
        )
        sequence.block_table = array("i", range(1, 1 + _ceil_div(len(sequence), self.block_size)))
        chunks = []
        shape = self.shapes[-1]
        if self._all_logits is None:
            all_logits = self.devices.spread(
                make_all_logits(
                    self._definition,
                    shape,
                    self._vocab,
                    attention_backend=self.attention_backend,
                    unroll_layers=self._unroll_layers,
                ),
                in_specs=(SHARDED, SHARDED, EVERYWHERE),
                out_specs=(EVERYWHERE, SHARDED),
            )
            self._all_logits = jax.jit(all_logits, donate_argnums=1)
        while sequence.num_uncomputed_tokens:
            num_tokens = min(sequence.num_uncomputed_tokens, shape.num_tokens)
            plan = StepPlan([ScheduledRow(sequence, num_tokens, ())])
            packed = pack_step(plan, StepProgram((shape,)), shape, self.block_size)
            logits, self._pools = self._all_logits(
                self._leaves, self._pools, self.devices.put_everywhere(packed)
            )
            chunks.append(np.asarray(logits[:num_tokens]))
            sequence.num_computed_tokens += num_tokens
        return np.concatenate(chunks)

    # --- start --------------------------------------------------------------------------------------------

    def _default_block_size(self, defaults: PlatformDefaults) -> int:
        """The platform's, or the next larger one with which block tables stay small enough for the kernel."""
        if self.platform != "tpu":
            return defaults.block_size
        try:
            return pallas_tpu_layout.default_block_size(self._max_num_rows, self.max_model_len)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _choose_attention(self, num_tokens: int) -> tuple[str, dict[str, str]]:
        """Of the backends: which one, and why not those that are usually faster."""
        model = self._shard
        shape = ServingShape(
            num_tokens=_round_up(num_tokens, TOKEN_GROUP),
            num_seqs=self._max_num_rows,
            blocks_per_seq=_ceil_div(self.max_model_len, self.block_size),
            num_heads=model.num_heads,
            dtype=self.dtype,
            pool=PoolShape(2, model.num_kv_heads, self.block_size, model.head_dim, self.kv_dtype),
            sliding_window=model.sliding_window,
        )
        try:
            backend = backend_for(shape, self.config.attention_backend, self.platform)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.config.speculation and not BACKENDS[backend].rows_meet:
            raise ConfigError(
                f"--speculative-config is not for the attention backend {backend}, whose rows do not see each other: "
                "choose another one with --attention-backend."
            )
        return backend, passed_over(shape, backend, self.platform)

    def _load(self, checkpoint: Checkpoint, report: Report) -> list[jax.Array]:
        started = time.monotonic()
        devices = self.devices
        shards = load_params(
            checkpoint,
            [
                checkpoint_slots(self.model_config, num_shards=devices.group.size, shard=shard)
                for shard in devices.local_shards
            ],
            dict(zip(self._definition.names, self._definition.shapes, strict=True)),
            np.dtype(self.dtype),
            devices.put_weight,
            quantized=[
                name
                for name, dtype in zip(self._definition.names, self._definition.dtypes, strict=True)
                if dtype == jnp.int8
            ],
        )
        leaves = [devices.put_shards([shard[name] for shard in shards]) for name in self._definition.names]
        jax.block_until_ready(leaves)
        report(
            f"loaded {sum(x.nbytes for x in leaves) / 2**20:,.0f} MiB of weights in {_seconds_since(started)}"
        )
        if self.platform == "cpu" and self.config.quantization == "none":
            report("--quantization int8 decodes one sequence a fifth faster on a CPU, in half the memory")
        return leaves

    def _start_programs(self, pool: ThreadPoolExecutor, guess: int, loading: Future[list[jax.Array]]) -> None:
        """Compile all programs, allocate the pools, and run each program as soon as it is there.

        The number of blocks is part of the programs' shape and depends on the memory that they need, so they are
        compiled for a guess. Where that matters, the figures of the largest one, which comes first, confirm or correct
        it.
        """

        def compile_for(num_blocks: int) -> dict[Future[jax.stages.Compiled], int]:
            numbered = reversed(list(enumerate(self._programs)))
            return {pool.submit(self._compile, program, num_blocks): i for i, program in numbered}

        compiling, num_blocks = compile_for(guess), guess
        free_pools: list[Pools] = []
        if self.platform == "cpu":  # clearing takes time, and the guess is rarely wrong
            free_pools += [self._zero_pools(guess) for _ in range(2 if self._has_room_for_two(guess) else 1)]
        num_blocks_needed = self._num_blocks(program_bytes=PROGRAM_BYTES_AT_MOST)
        if num_blocks_needed != guess:
            num_blocks_needed = self._num_blocks(program_bytes=_program_bytes(next(iter(compiling)).result()))
        if not guess <= num_blocks_needed <= 1.05 * guess:
            for program in compiling:
                program.cancel()
            free_pools.clear()
            compiling, num_blocks = compile_for(num_blocks_needed), num_blocks_needed
        self.limits = self._limits(num_blocks)
        if not free_pools:
            free_pools.append(self._zero_pools(num_blocks))
        self._leaves = loading.result()
        finished = as_completed(compiling)
        if self.devices.group.size > 1:
            # programs that wait for one another have the same order everywhere, and nobody's compiler beside them
            wait(compiling)
            finished = iter(compiling)
            if jax.process_count() > 1:
                self._others.start_together(f"{self.model_config} {self.limits}")
        with ThreadPoolExecutor(len(free_pools), thread_name_prefix="first-run") as runners:
            running: set[Future[Pools]] = set()
            for compiled in finished:
                index = compiling[compiled]
                self._compiled[index] = compiled.result()
                for packed in self._first_inputs(self._programs[index]):
                    while not free_pools:
                        done, running = wait(running, return_when=FIRST_COMPLETED)
                        free_pools += [run.result() for run in done]
                    running.add(runners.submit(self._run_first, index, packed, free_pools.pop()))
            free_pools += [run.result() for run in running]
        self._pools = free_pools.pop()

    def _zero_pools(self, num_blocks: int) -> Pools:
        return self.devices.zeros(self._abstract_pools(num_blocks))

    def _has_room_for_two(self, num_blocks: int) -> bool:
        """Whether first runs can be two at a time: a CPU's spend their time preparing, on one thread. The second pools
        are taken from what the budget leaves free, and given back at ready."""
        if self._free_bytes is None or self.devices.group.size > 1:
            return False
        pool_bytes = num_blocks * self._spec.bytes_per_block + self._shared_bytes
        return self._weight_bytes + PROGRAM_BYTES_GUESS + 2 * pool_bytes <= self._free_bytes

    def _first_inputs(self, program: StepProgram) -> list[npt.NDArray[np.int32]]:
        """For a run of each shape, and each number of rows whose logits have a product of their own: the first one pays
        for what later ones find ready."""
        rows = program.layout.num_rows
        sizes = logits_sizes(rows) if self._shared_bytes else [rows]
        inputs = []
        for i in range(max(len(program.shapes), len(sizes))):
            shape = program.shapes[i % len(program.shapes)]
            packed = pack_step(StepPlan([]), program, shape, self.block_size)
            program.layout.unpack(packed)["counts"][5] = sizes[i % len(sizes)]  # rows of the null block
            inputs.append(packed)
        return inputs

    def _run_first(self, program: int, packed: npt.NDArray[np.int32], pools: Pools) -> Pools:
        """Until it has ended; returns the pools."""
        outputs, pools = self._execute(program, pools, packed, self._slots.on_device())
        np.asarray(outputs.sampled)
        return pools

    def _limits(self, num_blocks: int) -> SchedulerConfig:
        return SchedulerConfig(
            max_model_len=self.max_model_len,
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            block_size=self.block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=self.config.enable_prefix_caching,
            enable_chunked_prefill=self.config.enable_chunked_prefill,
            long_prefill_token_threshold=self.config.long_prefill_token_threshold or 0,
            num_layers=self.model_config.num_layers if self._cuts_layers else 0,
            scheduling_policy=self.config.scheduling_policy,
            async_scheduling=self._async_scheduling,
            speculation=self.config.speculation,
            token_buckets=tuple(s.num_tokens for s in self.shapes) if self.platform == "cpu" else (),
        )

    def _compile(self, program: StepProgram, num_blocks: int) -> jax.stages.Compiled:
        step = make_step(
            self._definition,
            program,
            self._vocab,
            max_logprobs=self.config.max_logprobs,
            processed_logprobs=self.config.logprobs_mode == "processed",
            attention_backend=self.attention_backend,
            unroll_layers=self._unroll_layers,
            unroll_prompts=loop_copies_table(
                self._definition.table_dtype, self.devices.kind, self.devices.group.size
            ),
        )
        devices = self.devices
        step = devices.spread(
            step, in_specs=(SHARDED, SHARDED, EVERYWHERE, EVERYWHERE), out_specs=(EVERYWHERE, SHARDED)
        )
        leaves = devices.abstract_weights(self._definition.names, self._definition.abstract())
        pools = devices.abstract_shards(self._abstract_pools(num_blocks))
        packed = devices.abstract_everywhere(jax.ShapeDtypeStruct((program.layout.size,), jnp.int32))
        arguments = leaves, pools, self._slots.on_device(), packed
        with self._tracing:  # one after the other: the first is being compiled while the next one is traced
            if self._traces is None:
                lowered = jax.jit(step, donate_argnums=1).lower(*arguments)
            else:
                lowered = self._traces.lower(step, arguments, program, donate=1)
        return lowered.compile()

    def _abstract_pools(self, num_blocks: int) -> Any:
        """Of one chip."""
        tokens = jax.ShapeDtypeStruct((num_blocks, self.block_size), jnp.int32)
        sampled = jax.ShapeDtypeStruct((self._max_num_rows,), jnp.int32)
        logits = jax.ShapeDtypeStruct((self._max_num_rows, self._vocab.num_local), jnp.float32)
        hidden = jax.ShapeDtypeStruct(
            (2, self.shapes[-1].num_tokens, self.model_config.hidden_size), jnp.float32
        )
        room = () if self._unroll_layers else (logits, hidden)
        return Pools(self._spec.abstract(num_blocks), tokens, sampled, *room)  # type: ignore[arg-type]

    @property
    def _weight_bytes(self) -> int:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in self._definition.abstract())

    @property
    def _shared_bytes(self) -> int:
        """Of the room for logits and residual streams that steps share."""
        if self._unroll_layers:
            return 0
        logits = self._max_num_rows * self._vocab.num_local
        return 4 * (logits + 2 * self.shapes[-1].num_tokens * self.model_config.hidden_size)

    def _place_table(self, name: str, table: npt.NDArray[Any]) -> jax.Array:
        self._others.send_table(name, table)
        return self.devices.put_everywhere(table)

    def _execute(
        self, program: int, pools: Pools, packed: npt.NDArray[np.int32], tables: SlotTables
    ) -> tuple[StepOutputs, Pools]:
        inputs = packed if self.devices.group.size == 1 else self.devices.put_everywhere(packed)
        result: tuple[StepOutputs, Pools] = self._compiled[program](self._leaves, pools, tables, inputs)
        return result

    def _num_blocks(self, *, program_bytes: int) -> int:
        if self._free_bytes is None:
            assert self.config.kv_cache_memory_bytes is not None
            pool_bytes = self.config.kv_cache_memory_bytes
        else:
            pool_bytes = self._free_bytes - self._weight_bytes - program_bytes - self._shared_bytes
            if self.platform == "cpu":
                pool_bytes = min(pool_bytes, CPU_DEFAULT_POOL_BYTES // self.devices.group.size)
        return num_blocks_for(
            self._spec, pool_bytes=pool_bytes, max_useful_tokens=self._max_num_seqs * self.max_model_len
        )


def prompt_logits(config: EngineConfig, prompts: list[list[int]]) -> list[npt.NDArray[np.float32]]:
    """Logits of every position of whole prompts, [P, V] each: the model through the serving step's own code,
    for tests and comparisons."""
    runner = ModelRunner(config)
    return [runner.prompt_logits(prompt) for prompt in prompts]


def _resolve_dtype(config: EngineConfig, model: ModelConfig, platform: str) -> jnp.dtype:
    """auto: the checkpoint's, but bfloat16 for float16 checkpoints on devices without fast float16."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    if model.dtype == "float16" and platform in ("cpu", "tpu"):
        return jnp.dtype("bfloat16")
    return jnp.dtype(model.dtype)


def _resolve_kv_dtype(config: EngineConfig, dtype: jnp.dtype) -> jnp.dtype:
    """auto: the model's; fp8: the format of NVIDIA's and Google's hardware with the most precision."""
    if config.kv_cache_dtype == "auto":
        return dtype
    return jnp.dtype(jnp.float8_e4m3fn if config.kv_cache_dtype == "fp8" else config.kv_cache_dtype)


def _resolve_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_position_embeddings
    longest = model.longest_context
    if config.max_model_len > longest:
        stretched = (
            " and its rope scaling together allow" if longest > model.max_position_embeddings else " allows"
        )
        raise ConfigError(
            f"--max-model-len {config.max_model_len:,} is more than the {longest:,} positions that the model's "
            f"training{stretched}."
        )
    return config.max_model_len


def _program_bytes(program: jax.stages.Compiled) -> int:
    """Memory that a run takes beside its arguments."""
    memory = program.memory_analysis()
    if memory is None:
        return 0  # the backend does not tell
    return int(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)


def _seconds_since(started: float) -> str:
    return f"{time.monotonic() - started:.1f} s"


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, multiple: int) -> int:
    return _ceil_div(a, multiple) * multiple
