"""One stream of tokens: a request with n > 1 has n sequences that share a prompt."""

from __future__ import annotations

import hashlib
from array import array
from enum import Enum

import numpy as np

from jaxserve.constraints.text_constraint import TextConstraint
from jaxserve.messages import FinishReason
from jaxserve.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = "waiting"  # new, or preempted and waiting to be computed again
    RUNNING = "running"
    PARKED = "parked"  # a beam that waits, with its blocks, for the others of its request
    FINISHED = "finished"


class Sequence:
    """Tokens, block table and progress of one sequence.

    There is no phase: a sequence has `num_uncomputed_tokens`, and prefill, chunked prefill and decode are
    merely how many of them a step computes.

    Attributes:
        seed: int64 that, together with `index` and a token's position, determines every draw.
        draw_inputs: `sampling_params.DRAW_INPUTS`, packed.
        token_ids: prompt and output.
        block_table: KV blocks in order of position, int32; owned by the block manager.
        num_computed_tokens: tokens whose KV is in the pool, or will be when the steps under way are done.
        num_pending_tokens: tokens behind those that steps under way sample, and that the device goes on from by itself.
        sampled_row: row of the sequence in the last step that sampled from it.
        num_published_blocks: leading blocks that the prefix cache has been told of.
        num_cached_tokens: prompt tokens whose KV came from the prefix cache when it was first scheduled.
        num_prefix_tokens: what the prefix cache had when the sequence last got its first blocks.
        siblings: sequences of the same request that have not been forked off yet. They join once everything
            but the last prompt token is computed, sharing this sequence's blocks.
        constraint: where the text is in what it must be; None if it is free.
        needs_values: whether the host must know a token before the next one can be computed: masks and beams follow
            from it.
        changes_logits: whether its tokens are drawn from other logits than the model's, or for beams.
        reports_logprobs: whether each token comes with its log-probability.
        num_rated_tokens: prompt tokens whose prompt logprobs have been asked of a step; the first one has none.
        order: (priority, arrival) of its request: the smaller, the more urgent.
        scheduled_at: `time.monotonic()` of its first step, None before.
    """

    __slots__ = (
        "__weakref__", "_stop_token_ids", "block_hashes", "block_table", "cache_salt", "changes_logits", "constraint",
        "draw_inputs", "eos_token_ids", "finish_reason", "index", "max_len", "needs_values", "num_cached_tokens",
        "num_computed_tokens", "num_pending_tokens", "num_prefix_tokens", "num_prompt_tokens", "num_published_blocks",
        "num_rated_tokens", "order", "params", "reports_logprobs", "request_id", "sampled_row", "scheduled_at", "seed",
        "siblings", "status", "stop_reason", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        seed: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...] = (),
        cache_salt: str | None = None,
        order: tuple[int, int] = (0, 0),
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.needs_values, self.changes_logits = params.needs_values, params.changes_logits
        self.reports_logprobs = params.reports_logprobs
        self._stop_token_ids = frozenset(params.stop_token_ids + (() if params.ignore_eos else eos_token_ids))
        self.seed = seed
        self.draw_inputs = params.pack(seed, index)
        self.eos_token_ids = eos_token_ids
        self.cache_salt = cache_salt
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_len = min(max_model_len, self.num_prompt_tokens + params.max_tokens)
        self.block_table = array("i")
        self.block_hashes: list[bytes] = []
        self.num_computed_tokens = 0
        self.num_pending_tokens = 0
        self.num_published_blocks = 0
        self.sampled_row = 0
        self.num_cached_tokens = self.num_prefix_tokens = 0
        self.constraint: TextConstraint | None = None
        self.num_rated_tokens = 1
        self.siblings: list[Sequence] = []
        self.order = order
        self.scheduled_at: float | None = None
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        return f"<Sequence {self.request_id}/{self.index} {self.num_computed_tokens}/{len(self)} {self.status.value}>"

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens_to_schedule(self) -> int:
        """Tokens to compute next. A sequence with siblings stops before its last prompt token: from there
        each of them goes its own way."""
        if self.siblings:
            return max(self.num_prompt_tokens - 1 - self.num_computed_tokens, 0)
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def rates_prompt(self) -> bool:
        """Whether prompt logprobs are still to be asked for. The first of a request's sequences reports them."""
        if self.params.prompt_logprobs is None:
            return False
        return self.index == 0 and self.num_rated_tokens < self.num_prompt_tokens

    def fork(self) -> Sequence:
        """Another sequence with the same tokens, without blocks: a beam that goes its own way from here."""
        child = Sequence(
            self.request_id,
            self.index,
            self.token_ids[: self.num_prompt_tokens],
            self.params,
            seed=self.seed,
            max_model_len=self.max_len,
            eos_token_ids=self.eos_token_ids,
            cache_salt=self.cache_salt,
            order=self.order,
        )
        child.token_ids = list(self.token_ids)
        if self.constraint is not None:
            child.constrain(self.constraint.fork())
        child.num_rated_tokens = self.num_rated_tokens
        child.scheduled_at = self.scheduled_at
        child.status = self.status
        return child

    def constrain(self, constraint: TextConstraint) -> None:
        """Hold the text to a constraint, from here on."""
        self.constraint = constraint
        self.needs_values = self.changes_logits = True

    def append_token(self, token_id: int) -> None:
        """Add a sampled token and decide whether it is the last one (contract §4.4: end of sequence, stop
        token, length; stop strings are the detokenizing side's business).

        Raises:
            MatcherError: its constraint cannot go on.
        """
        self.token_ids.append(token_id)
        if self.num_pending_tokens:
            self.num_pending_tokens -= 1
        if self.constraint is not None:
            self.constraint.accept(token_id)
        if token_id in self._stop_token_ids:
            is_eos = token_id in self.eos_token_ids and not self.params.ignore_eos
            self.finish("stop", stop_reason=None if is_eos else token_id)
        elif self.constraint is not None and self.constraint.is_complete:
            self.finish("stop")
        elif len(self.token_ids) >= self.max_len:
            self.finish("length")

    def finish(self, reason: FinishReason, *, stop_reason: int | None = None) -> None:
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason

    def block_hash(self, block_index: int, block_size: int) -> bytes:
        """Name of the block's content: SHA-256 over its parent's hash and its own tokens, so that it names the
        whole prefix. The chain starts from the cache salt."""
        while len(self.block_hashes) <= block_index:
            i = len(self.block_hashes)
            parent = self.block_hashes[-1] if i else hashlib.sha256((self.cache_salt or "").encode()).digest()
            tokens = np.asarray(self.token_ids[i * block_size : (i + 1) * block_size], np.int32)
            self.block_hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())
        return self.block_hashes[block_index]
