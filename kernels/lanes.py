"""Which lanes single tokens are attended in, where all lanes of a group take as long as the longest context in it.

As a rule each token has a lane. Long contexts are split over several (Flash-Decoding, Dao et al. 2023), and what the
lanes of one token have seen is put together: over lanes that are to spare, where few tokens do not fill a group, and
over all lanes of a group of their own, where the contexts of a few are much longer than those of the others. So one
stream at the end of a long context does not make all others wait for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TOKEN_GROUP = 16
LARGE_TOKEN_GROUP = 32  # faster if it gets full
DECODING_BATCHES = (32, 64)  # sizes of which most tokens decode, each a multiple of the large group
GROUP_CHUNK = 64  # tokens of context at a time
WORTH_WHILE = 4  # chunks that the longest context must have
MAX_SPLITS = LARGE_TOKEN_GROUP // 2  # tokens of a step: each takes a lane to spare
MAX_OWN_GROUPS = 8
# in chunks of a group
MERGE_COST = 0.25  # of putting the parts of one token together
SPLIT_COST = 1  # of a token that has a group of its own

Int32s = npt.NDArray[np.int32]


class LanePlan(NamedTuple):
    """lanes [n · R, 3] int32: each one's token, the first block of its part of the context, and how many tokens that
    part has. merged [m] int32: tokens whose parts are put together. groups [n, 3] int32: where each group of R lanes
    puts its results, and from which to which of `merged` it puts together."""

    lanes: Int32s
    groups: Int32s
    merged: Int32s


def group_size(num_tokens: int) -> int:
    """R, lanes of a group in batches of so many tokens, padding included."""
    return min(LARGE_TOKEN_GROUP if num_tokens in DECODING_BATCHES else TOKEN_GROUP, num_tokens)


def max_lanes(num_tokens: int) -> int:
    """Lanes that batches of at most so many tokens need at most."""
    return num_tokens + MAX_OWN_GROUPS * LARGE_TOKEN_GROUP


def max_groups(num_tokens: int) -> int:
    """Groups likewise."""
    return -(-num_tokens // TOKEN_GROUP) + MAX_OWN_GROUPS


def chunk_size(block_size: int, max_blocks: int) -> int:
    """Tokens of context at a time, whole blocks of at most `max_blocks`."""
    return max(1, min(GROUP_CHUNK // block_size, max_blocks)) * block_size


def plan_lanes(lens: Int32s, num_tokens: int, *, block_size: int, max_blocks: int) -> LanePlan:
    """Lanes for the first tokens of a batch of `num_tokens`, padding included, which attend to `lens` [≤ num_tokens]
    tokens each."""
    R = group_size(num_tokens)
    num_groups = -(-len(lens) // R)
    chunk = chunk_size(block_size, max_blocks)
    padded_lens = np.zeros(num_groups * R, np.int32)
    padded_lens[: len(lens)] = lens
    tokens = np.arange(num_groups * R, dtype=np.int32)
    groups = np.zeros((num_groups, 3), np.int32)
    groups[:, 0] = np.arange(num_groups) * R
    chunks = -(-padded_lens // chunk)
    if chunks.max(initial=0) < WORTH_WHILE:
        return LanePlan(np.stack([tokens, np.zeros_like(tokens), padded_lens], axis=1), groups, tokens[:0])

    own, cost = _with_own_groups(chunks.reshape(-1, R))
    counts = np.ones_like(chunks)  # of lanes of each token
    if len(lens) < R:  # one group, with lanes to spare
        spread = _over_spare_lanes(chunks[: len(lens)], R)
        if np.max(-(-chunks[: len(lens)] // spread)) + MERGE_COST * np.sum(spread > 1) < cost:
            counts[: len(lens)], own = spread, []
    merged = np.array(own, np.int32) if own else np.flatnonzero(counts > 1).astype(np.int32)
    counts[own] = R
    lane_tokens, parts = tokens, np.zeros_like(tokens)
    if own:
        lane_tokens = np.concatenate([tokens, np.repeat(merged, R)])
        parts = np.concatenate([parts, np.tile(np.arange(R, dtype=np.int32), len(own))])
        numbers = np.arange(len(own))
        put_together = np.stack([np.full(len(own), num_tokens), numbers, numbers + 1], axis=1)
        groups = np.concatenate([groups, put_together.astype(np.int32)])
    elif len(merged):
        more = counts[merged] - 1
        end = len(lens) + more.sum()
        lane_tokens[len(lens) : end] = np.repeat(merged, more)
        parts[len(lens) : end] = 1 + np.arange(more.sum()) - np.repeat(np.cumsum(more) - more, more)
        groups[0, 2] = len(merged)
    share = (-(-chunks // counts) * chunk)[lane_tokens]
    offsets = parts * share
    lane_lens = np.clip(padded_lens[lane_tokens] - offsets, 0, share)
    lane_lens[own] = 0
    first_blocks = np.where(lane_lens > 0, offsets // block_size, 0)  # none begins behind its row's table
    return LanePlan(np.stack([lane_tokens, first_blocks, lane_lens], axis=1), groups, merged)


def _with_own_groups(chunks: Int32s) -> tuple[list[int], float]:
    """Of groups [n, R] with so many chunks of context each, the tokens to give a group of their own: those without
    which a group saves more than they take. And what all take then."""
    R = chunks.shape[1]
    most = chunks.max(axis=1)
    if np.all(most - chunks.min(axis=1, where=chunks > 0, initial=chunks.max()) <= SPLIT_COST):
        return [], float(most.sum())
    tokens = np.argsort(-chunks, axis=1, kind="stable")
    longest = np.take_along_axis(chunks, tokens, axis=1)[:, : MAX_OWN_GROUPS + 1]
    costs = longest.copy()  # [n, k]: of a group without its k longest, and of those
    costs[:, 1:] += np.cumsum(-(-longest[:, :-1] // R) + SPLIT_COST, axis=1)
    own: list[int] = []
    total = 0.0
    for group, cost in enumerate(costs):
        count = int(cost[: MAX_OWN_GROUPS - len(own) + 1].argmin())
        own += (group * R + tokens[group, :count]).tolist()
        total += float(cost[count])
    return own, total


def _over_spare_lanes(chunks: Int32s, num_lanes: int) -> Int32s:
    """How many lanes each token gets of a group that has lanes to spare, for the longest part to be the shortest."""
    lengths = np.arange(max(1, -(-chunks.sum() // num_lanes)), chunks.max() + 1)
    counts = np.maximum(-(-chunks[None] // lengths[:, None]), 1)
    first = int(np.argmax(counts.sum(axis=1) <= num_lanes))
    spread: Int32s = counts[first].astype(np.int32)
    return spread
