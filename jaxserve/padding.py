"""Fewer tokens where a step would be mostly padding: for a CPU, where padding costs as much as tokens."""

from __future__ import annotations

from jaxserve.kernels.metadata import MAX_UNTILED_TOKENS
from jaxserve.sequence import Sequence
from jaxserve.step_plan import ScheduledRow

# what steps cost on a CPU, in tokens: one token takes 21 ms, 128 take 150 ms, 256 take 300 ms; and where attention has
# no tiles, a token of a prompt costs more by about one for each 500 tokens before it
STEP_COST = 20
UNTILED_CONTEXT = 500


def cut_to_bucket(rows: dict[Sequence, ScheduledRow], buckets: tuple[int, ...]) -> None:
    """Leave the last tokens of the least urgent prompts to the next step, if this one would be mostly padding for
    their sake: 16 decodes and a prompt of 128 tokens would take as long as 256 tokens.

    Args:
        rows: of the step, the most urgent first.
        buckets: what steps are padded to, ascending.
    """
    prompts = [row for row in rows.values() if row.num_tokens > 1]
    if not prompts or any(row.rates for row in prompts):  # the largest program alone does that
        return
    total = sum(row.num_tokens for row in rows.values())
    full = max((bucket for bucket in buckets if bucket <= total), default=total)
    excess = total - full
    if not 0 < excess <= sum(row.num_tokens - 1 for row in prompts):
        return
    others = len(rows) - len(prompts)
    wanted = total - others
    context = max(row.end for row in prompts)

    def cost(num_prompt_tokens: int) -> float:
        """Of a step of so many tokens beside the others, in tokens: about what its time is proportional to."""
        num_tokens = others + num_prompt_tokens
        if num_tokens == 0:
            return 0.0
        bucket = min(bucket for bucket in buckets if bucket >= num_tokens)
        untiled = num_prompt_tokens * context / UNTILED_CONTEXT if bucket <= MAX_UNTILED_TOKENS else 0.0
        return STEP_COST + bucket + untiled

    if cost(wanted - excess) + cost(excess) >= cost(wanted) + cost(0):
        return
    for row in reversed(prompts):
        num_tokens = max(1, row.num_tokens - excess)
        excess -= row.num_tokens - num_tokens
        rows[row.sequence] = ScheduledRow(row.sequence, num_tokens, row.copies)
