"""What the API process and the engine process say to each other: msgspec types in msgpack frames.

A frame is a 4-byte little-endian length, then that many bytes of msgpack. Times are `time.monotonic()`
seconds, which both processes share because they run on one machine.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from jaxserve.constraints.constraint import CompiledConstraint
from jaxserve.sampling_params import SamplingParams

FRAME_HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 30

NO_TOKEN_POSSIBLE = "no token is possible under the request's own masks"
FinishReason = Literal["stop", "length", "abort", "error"]


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    """One prompt, `params.num_sequences` sequences. `request_id` is unique among live requests; of two priorities the
    lower one is the more urgent."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str | None = None
    constraint: CompiledConstraint | None = None
    priority: int = 0


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """End sequences without an answer: `indices` of the request, or all of them (None)."""

    request_id: str
    indices: list[int] | None = None


class Profile(msgspec.Struct, frozen=True, kw_only=True, tag="profile"):
    """Begin or end a trace of the engine process, in the configuration's `profile_dir`; answered by `Profiled`."""

    running: bool


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End the engine process now."""


class StartupPhase(msgspec.Struct, frozen=True, kw_only=True, tag="phase"):
    """A phase of the engine's start has ended ("load", "compile", …): one log line."""

    text: str


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine is ready. What the API side must know about it."""

    max_model_len: int
    vocab_size: int  # V of the logits
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    kv_cache_dtype: str
    platform: str
    summary: list[str]  # lines for the start-up log


class TopLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities at one position."""

    logprob: float  # of the token that is there
    rank: (
        int | None
    )  # 1 + number of strictly likelier tokens; None: not known, of beams' tokens outside of top_ids
    top_ids: list[int]  # the k most likely, descending
    top_logprobs: list[float]


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What one step added to one sequence. A first output with no token says that it has been scheduled.

    Beam search gives each of its n results whole, best first, when it is over.
    """

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token's id; of beam search also the stop string
    logprobs: list[TopLogprobs] | None = None  # parallel to token_ids
    num_cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    scheduled_at: float | None = None  # with a sequence's first output: when it was first scheduled
    error: str | None = None  # with finish_reason "error": one line, safe to show
    # of the next tokens of the prompt, from its second on; in outputs of index 0, before its first token
    prompt_logprobs: list[TopLogprobs] | None = None

    def followed_by(self, later: SequenceOutput) -> SequenceOutput:
        """What both have added to the sequence, as one."""
        logprobs = None if self.logprobs is None else self.logprobs + (later.logprobs or [])
        return msgspec.structs.replace(later, token_ids=self.token_ids + later.token_ids, logprobs=logprobs)


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges and running totals after a step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # 0…1
    num_preemptions: int = 0
    prefix_cache_queries: int = 0  # tokens looked up
    prefix_cache_hits: int = 0  # tokens found
    xla_compilations: int = 0  # since ready
    num_tokens: int = 0  # computed by this step
    step_s: float = 0.0
    spec_decode_drafts: int = 0  # times that tokens were guessed behind a sequence's last one
    spec_decode_draft_tokens: int = 0
    spec_decode_accepted_tokens: int = 0


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """All that one step produced, for all requests: one frame."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class Profiled(msgspec.Struct, frozen=True, kw_only=True, tag="profiled"):
    """A trace has begun, or has ended and is on the disk; or why not."""

    error: str | None = None


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The engine cannot go on; the process ends after this. `user_error`: the model or a flag is at fault."""

    message: str
    user_error: bool


ToEngine = AddRequest | AbortRequest | Profile | Shutdown
FromEngine = StartupPhase | EngineInfo | StepOutputs | Profiled | EngineFailed


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """The message as one frame, header included."""
    body = msgspec.msgpack.encode(message)
    return FRAME_HEADER.pack(len(body)) + body
