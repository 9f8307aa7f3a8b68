"""Sequences and schedulers without a model, for tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from jaxserve.block_manager import BlockManager
from jaxserve.config import SchedulerConfig
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.sequence import Sequence, SequenceStatus
from jaxserve.step_plan import StepPlan

BLOCK_SIZE = 4
MAX_MODEL_LEN = 24
arrivals = itertools.count()


def make_sequence(
    name: str,
    prompt: list[int],
    *,
    n: int = 1,
    max_tokens: int = 8,
    salt: str | None = None,
    params: SamplingParams | None = None,
    priority: int = 0,
    max_model_len: int = MAX_MODEL_LEN,
) -> Sequence:
    """The first sequence of a request with its siblings attached; requests arrive in the order of these calls."""
    order = priority, next(arrivals)
    params = params or SamplingParams(max_tokens=max_tokens, n=n)
    sequences = [
        Sequence(
            name,
            i,
            prompt,
            params,
            seed=0,
            max_model_len=max_model_len,
            eos_token_ids=(0,),
            cache_salt=salt,
            order=order,
        )
        for i in range(params.n)
    ]
    sequences[0].siblings = sequences[1:]
    return sequences[0]


def make_scheduler(
    *,
    num_blocks: int = 13,
    max_num_seqs: int = 4,
    budget: int = 8,
    caching: bool = True,
    chunked: bool = True,
    **more: Any,
) -> Scheduler:
    config = SchedulerConfig(
        max_model_len=more.pop("max_model_len", MAX_MODEL_LEN),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        enable_prefix_caching=caching,
        enable_chunked_prefill=chunked,
        **more,
    )
    return Scheduler(config, BlockManager(config))


def run_step(scheduler: Scheduler, next_token: int = 1) -> StepPlan:
    """Schedule and pretend that the device sampled `next_token` in every row that samples."""
    plan = scheduler.schedule()
    for row in plan.rows:
        if row.samples:
            row.sequence.append_token(next_token)
        if row.sequence.status is SequenceStatus.FINISHED:
            scheduler.finish(row.sequence)
    return plan


def rows_of(plan: StepPlan) -> list[tuple[str, int]]:
    """Whose tokens it computes, and how many."""
    return [(row.sequence.request_id, row.num_tokens) for row in plan.rows]


def names(sequences: Iterable[Sequence]) -> list[str]:
    return [sequence.request_id for sequence in sequences]
