"""Configuration: frozen dataclasses that check their values. The command line fills them and nothing else does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from jaxserve.errors import ConfigError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
KVCacheDtype = Literal["auto", "bfloat16", "float16", "float32", "int8", "fp8"]
Quantization = Literal["none", "int8"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
LogprobsMode = Literal["raw", "processed"]
GuidedBackend = Literal["auto", "llguidance", "outlines", "lm-format-enforcer"]
AttentionBackend = Literal["auto", "pallas_tpu", "pallas_triton", "mosaic_gpu", "blocked", "reference"]
SchedulingPolicy = Literal["fcfs", "priority"]
ToolCallParserName = Literal["hermes", "llama3_json", "pythonic"]

MAX_SPECULATIVE_TOKENS = 32
DEFAULT_SPECULATIVE_TOKENS = 15
DEFAULT_LOOKUP_MAX, DEFAULT_LOOKUP_MIN = 4, 2


def cache_dir() -> Path:
    """Where jaxserve keeps what it can make again: the demo model and compiled programs."""
    return Path(os.environ.get("JAXSERVE_CACHE") or Path.home() / ".cache" / "jaxserve").expanduser()


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Prompt-lookup speculative decoding. Names are vLLM's.

    Attributes:
        method: "ngram": what follows is looked up in the prompt and the output so far.
        num_speculative_tokens: tokens to guess at most in one step, by default 15.
        prompt_lookup_max: the longest run of tokens at the text's end to look for; by default 4, or prompt_lookup_min
            if that is more.
        prompt_lookup_min: the shortest; by default 2, or prompt_lookup_max if that is less.
    """

    method: str
    num_speculative_tokens: int
    prompt_lookup_max: int
    prompt_lookup_min: int

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> SpeculativeConfig:
        """Check the fields that a user has given.

        Raises:
            ConfigError: one is unknown, missing or wrong.
        """
        flag, known = "--speculative-config", [f.name for f in fields(cls)]
        for name in given:
            _require(name in known, flag, name, "an object with no fields but " + ", ".join(known))
        _require("method" in given, flag, dict(given), "an object with method")
        _choice(f"{flag}: method", given["method"], ("ngram",))
        for name in known[1:]:
            value = given.get(name, 1)
            ok = type(value) is int and 1 <= value <= MAX_SPECULATIVE_TOKENS
            allowed = f"an integer between 1 and {MAX_SPECULATIVE_TOKENS}"
            _require(ok, f"{flag}: {name}", value, allowed)
        shortest, longest = given.get("prompt_lookup_min"), given.get("prompt_lookup_max")
        if longest is None:
            longest = max(DEFAULT_LOOKUP_MAX, shortest or 0)
        if shortest is None:
            shortest = min(DEFAULT_LOOKUP_MIN, longest)
        allowed = f"at most prompt_lookup_max ({longest})"
        _require(shortest <= longest, f"{flag}: prompt_lookup_min", shortest, allowed)
        return cls(
            method=given["method"],
            num_speculative_tokens=given.get("num_speculative_tokens", DEFAULT_SPECULATIVE_TOKENS),
            prompt_lookup_max=longest,
            prompt_lookup_min=shortest,
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine process is started with. None means: chosen for the model and the device.

    Attributes:
        model: directory in Hugging Face form, `.gguf` file, or hub id.
        tokenizer: likewise; None means the model's own.
        dtype: of weights, activations and (by default) the KV cache.
        quantization: int8 makes weights int8 while they are loaded, whatever the checkpoint has.
        kv_cache_dtype: of the KV cache; auto is dtype. int8 and fp8 (float8_e4m3fn) have a scale per token and head.
        load_format: how the checkpoint is stored; "dummy" makes random weights of the right shape.
        max_model_len: L, tokens of prompt and output together.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens that one step computes at most.
        block_size: tokens of one KV block; a power of two.
        memory_utilization: share of the device's memory to use, (0, 1].
        kv_cache_memory_bytes: size of the KV pool, on each device; overrides memory_utilization.
        enable_prefix_caching: reuse the KV blocks of equal prompt prefixes.
        enable_chunked_prefill: compute a long prompt in several steps.
        long_prefill_token_threshold: what a step computes at most of such prompts while others decode; 0: no limit.
        scheduling_policy: fcfs serves requests as they come; with priority, those of a lower `priority` come first.
        async_scheduling: give the device its next step before the host knows what the last one sampled.
        seed: seeds requests that bring no seed.
        max_logprobs: the most top logprobs a request may ask for.
        logprobs_mode: of the logits as they are, or of the distribution that was sampled from.
        profile_dir: where traces of the engine process go; None: there are none.
        compilation_cache: keep compiled programs on disk.
        attention_backend: which implementation of attention runs (docs/kernels.md).
        tensor_parallel_size: devices that share the model.
        coordinator_address: host:port of process 0, where the processes of one engine meet.
        num_processes: how many there are.
        process_id: which one this is; process 0 schedules and serves.
        speculative_config: the fields of a SpeculativeConfig; None: no speculative decoding.
    """

    model: str
    tokenizer: str | None = None
    dtype: Dtype = "auto"
    quantization: Quantization = "none"
    kv_cache_dtype: KVCacheDtype = "auto"
    load_format: LoadFormat = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int | None = None
    scheduling_policy: SchedulingPolicy = "fcfs"
    async_scheduling: bool | None = None
    seed: int = 0
    max_logprobs: int = 20
    logprobs_mode: LogprobsMode = "raw"
    profile_dir: str | None = None
    compilation_cache: bool = True
    attention_backend: AttentionBackend = "auto"
    tensor_parallel_size: int = 1
    coordinator_address: str | None = None
    num_processes: int = 1
    process_id: int = 0
    speculative_config: Mapping[str, Any] | None = None

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config`, checked.

        Raises:
            ConfigError: it is wrong.
        """
        return None if self.speculative_config is None else SpeculativeConfig.of(self.speculative_config)

    def __post_init__(self) -> None:
        _require(bool(self.model), "--model", self.model, "a directory, a .gguf file or a hub id")
        _choice("--dtype", self.dtype, get_args(Dtype))
        _choice("--quantization", self.quantization, get_args(Quantization))
        _choice("--kv-cache-dtype", self.kv_cache_dtype, get_args(KVCacheDtype))
        _choice("--load-format", self.load_format, get_args(LoadFormat))
        _choice("--attention-backend", self.attention_backend, get_args(AttentionBackend))
        _choice("--scheduling-policy", self.scheduling_policy, get_args(SchedulingPolicy))
        _choice("--logprobs-mode", self.logprobs_mode, get_args(LogprobsMode))
        for flag, value in (
            ("--max-model-len", self.max_model_len),
            ("--max-num-seqs", self.max_num_seqs),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
            ("--kv-cache-memory-bytes", self.kv_cache_memory_bytes),
            ("--tensor-parallel-size", self.tensor_parallel_size),
            ("--num-processes", self.num_processes),
        ):
            _require(value is None or value >= 1, flag, value, "an integer of at least 1")
        power_of_two = self.block_size is None or (self.block_size >= 1 and self.block_size.bit_count() == 1)
        _require(power_of_two, "--block-size", self.block_size, "a power of two")
        utilization = self.memory_utilization
        _require(
            0.0 < utilization <= 1.0, "--gpu-memory-utilization", utilization, "greater than 0 and at most 1"
        )
        share = self.long_prefill_token_threshold
        _require(
            share is None or share >= 0, "--long-prefill-token-threshold", share, "an integer of at least 0"
        )
        _require(0 <= self.max_logprobs <= 100, "--max-logprobs", self.max_logprobs, "between 0 and 100")
        self._check_processes()
        if self.speculative_config is not None:
            SpeculativeConfig.of(self.speculative_config)

    def _check_processes(self) -> None:
        address, count = self.coordinator_address, self.num_processes
        if (address is None) != (count == 1):
            raise ConfigError("--coordinator-address and --num-processes (2 or more) must be given together.")
        if address is not None:
            host, _, port = address.rpartition(":")
            valid = bool(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16
            _require(valid, "--coordinator-address", address, "host:port of process 0")
        _require(0 <= self.process_id < count, "--process-id", self.process_id, f"between 0 and {count - 1}")
        divisible = self.tensor_parallel_size % count == 0
        allowed = f"a multiple of --num-processes {count}: each has as many devices as the others"
        _require(divisible, "--tensor-parallel-size", self.tensor_parallel_size, allowed)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The limits that the scheduler and the block manager work under; all resolved.

    Attributes:
        max_model_len: tokens of one sequence at most.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: token budget of one step.
        block_size: tokens of one KV block.
        num_blocks: KV blocks in the pool; block 0 is the null block that padding writes to, never handed out.
        long_prefill_token_threshold: tokens a step of prompts that take several, while others decode; 0: no limit.
        num_layers: of the model, if such prompts are computed by layers instead (`layered_prefill`), else 0.
        scheduling_policy: whether requests may have priorities.
        async_scheduling: decide a step before the results of the one before it are there.
        speculation: guess tokens and check several in one step; None: never.
        token_buckets: what steps are padded to, ascending, where padding costs as much as tokens; empty: it does not.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    num_layers: int = 0
    scheduling_policy: SchedulingPolicy = "fcfs"
    async_scheduling: bool = True
    speculation: SpeculativeConfig | None = None
    token_buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        usable_tokens = (self.num_blocks - 1) * self.block_size
        if usable_tokens < self.max_model_len:
            raise ConfigError(
                f"The KV cache holds {max(usable_tokens, 0):,} tokens, less than one sequence of --max-model-len "
                f"{self.max_model_len:,}: give it more memory (--kv-cache-memory-bytes, --gpu-memory-utilization) "
                "or lower --max-model-len."
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"--no-enable-chunked-prefill needs --max-num-batched-tokens of at least --max-model-len "
                f"{self.max_model_len:,}, got {self.max_num_batched_tokens:,}."
            )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the API process is started with; the meaning of each is in docs/flags.md."""

    engine: EngineConfig
    served_model_names: tuple[str, ...] = ()  # empty: the value of --model
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    root_path: str = ""
    chat_template: str | None = None  # a file, or the template's text
    response_role: str = "assistant"
    default_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    request_chat_template: bool = True  # requests may bring templates and variables of their own
    generation_config: str = "auto"  # "auto", "none", or a folder
    override_generation_config: dict[str, Any] = field(default_factory=dict)
    return_tokens_as_token_ids: bool = False
    guided_decoding_backend: GuidedBackend = "auto"  # of requests that name none
    enable_auto_tool_choice: bool = False
    tool_call_parser: ToolCallParserName | None = None
    unknown_fields: Literal["reject", "ignore"] = "reject"
    max_body_bytes: int = 4 << 20
    max_connections: int = 1024
    max_num_queued_reqs: int | None = None  # None: 4 × max_num_seqs
    max_num_queued_tokens: int | None = None
    request_timeout_s: float = 600.0  # 0: off
    stall_timeout_s: float = 30.0  # a client that does not read
    stall_limit_s: float = 60.0  # an engine that finishes no step
    shutdown_timeout_s: float = 30.0
    sse_keep_alive_interval_s: float = 0.0  # 0: off
    enable_force_include_usage: bool = False
    enable_log_requests: bool = False
    disable_docs: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "--port", self.port, "between 0 and 65535")
        both = (self.ssl_keyfile is None) == (self.ssl_certfile is None)
        _require(both, "--ssl-keyfile", self.ssl_keyfile, "given together with --ssl-certfile")
        _choice("--unknown-fields", self.unknown_fields, ("reject", "ignore"))
        _choice("--log-level", self.log_level, ("debug", "info", "warning", "error"))
        _choice("--guided-decoding-backend", self.guided_decoding_backend, get_args(GuidedBackend))
        if self.tool_call_parser is not None:
            _choice("--tool-call-parser", self.tool_call_parser, get_args(ToolCallParserName))
        if self.enable_auto_tool_choice != (self.tool_call_parser is not None):
            raise ConfigError("--enable-auto-tool-choice and --tool-call-parser must be given together.")
        for flag, value in (
            ("--request-timeout", self.request_timeout_s),
            ("--stall-timeout", self.stall_timeout_s),
            ("--stall-limit", self.stall_limit_s),
            ("--shutdown-timeout", self.shutdown_timeout_s),
            ("--sse-keep-alive-interval", self.sse_keep_alive_interval_s),
        ):
            _require(0 <= value < float("inf"), flag, value, "a number of seconds, 0 or more")
        for flag, count in (
            ("--max-body-bytes", self.max_body_bytes),
            ("--max-connections", self.max_connections),
            ("--max-num-queued-reqs", self.max_num_queued_reqs),
            ("--max-num-queued-tokens", self.max_num_queued_tokens),
        ):
            _require(count is None or count >= 1, flag, count, "an integer of at least 1")
        _require(
            not self.root_path or self.root_path.startswith("/"),
            "--root-path",
            self.root_path,
            'a path that starts with "/"',
        )

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may use; the first is the one in responses."""
        return self.served_model_names or (self.engine.model,)


def _require(ok: bool, flag: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{flag} must be {allowed}, got {value!r}.")


def _choice(flag: str, value: object, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, flag, value, "one of " + ", ".join(allowed))
