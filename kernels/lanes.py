"""Which lanes single tokens are attended in, where all lanes of a group take as long as the longest context in it.

As a rule each token has a lane. Where the contexts of a few are much longer than those of the others, each of these is
attended by itself, its context split over all lanes of a group (Flash-Decoding, Dao et al. 2023), and the rest of the
group is done sooner: one stream at the end of a long context does not make all others wait for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TOKEN_GROUP = 16
LARGE_TOKEN_GROUP = 32  # faster if it gets full
DECODING_BATCHES = (32, 64)  # sizes of which most tokens decode, each a multiple of the large group
GROUP_CHUNK = 64  # tokens of context at a time
MAX_SPLITS = 8  # tokens of a step
SPLIT_COST = 1  # of a token by itself, in chunks of a group
WORTH_WHILE = 8  # chunks that the longest context must have

NOT_SPLIT = -1


class LanePlan(NamedTuple):
    """lanes [n · R, 3] int32: each one's token, the first block of its part of the context, and how many tokens that
    part has. groups [n, 2] int32: where each group of R lanes puts its results, and the token whose parts they are, or
    NOT_SPLIT."""

    lanes: npt.NDArray[np.int32]
    groups: npt.NDArray[np.int32]


def group_size(num_tokens: int) -> int:
    """R, lanes of a group in batches of so many tokens, padding included."""
    return min(LARGE_TOKEN_GROUP if num_tokens in DECODING_BATCHES else TOKEN_GROUP, num_tokens)


def max_lanes(num_tokens: int) -> int:
    """Lanes that batches of at most so many tokens need at most."""
    return num_tokens + MAX_SPLITS * LARGE_TOKEN_GROUP


def max_groups(num_tokens: int) -> int:
    """Groups likewise."""
    return -(-num_tokens // TOKEN_GROUP) + MAX_SPLITS


def chunk_size(block_size: int, max_blocks: int) -> int:
    """Tokens of context at a time, whole blocks of at most `max_blocks`."""
    return max(1, min(GROUP_CHUNK // block_size, max_blocks)) * block_size


def plan_lanes(lens: npt.NDArray[np.int32], num_tokens: int, *, block_size: int, max_blocks: int) -> LanePlan:
    """Lanes for the first tokens of a batch of `num_tokens`, padding included, which attend to `lens` [≤ num_tokens]
    tokens each."""
    R = group_size(num_tokens)
    num_groups = -(-len(lens) // R)
    own = np.zeros((num_groups * R, 3), np.int32)
    own[:, 0] = np.arange(num_groups * R)
    own[: len(lens), 2] = lens
    groups = np.full((num_groups, 2), NOT_SPLIT, np.int32)
    groups[:, 0] = np.arange(num_groups) * R
    chunk = chunk_size(block_size, max_blocks)
    split = _worth_splitting(-(-own[:, 2].reshape(-1, R) // chunk))
    if not split:
        return LanePlan(own, groups)
    parts = np.zeros((len(split), R, 3), np.int32)
    for part, token in zip(parts, split, strict=True):
        share = -(-lens[token] // (R * chunk)) * chunk
        offsets = np.arange(R) * share
        own_lens = np.clip(lens[token] - offsets, 0, share)
        part[:, 0], part[:, 2] = token, own_lens
        part[:, 1] = np.where(own_lens > 0, offsets // block_size, 0)  # no lane begins behind its row's table
    own[split, 2] = 0
    merged = [(num_tokens, token) for token in split]
    return LanePlan(
        np.concatenate([own, parts.reshape(-1, 3)]), np.concatenate([groups, np.array(merged, np.int32)])
    )


def _worth_splitting(chunks: npt.NDArray[np.int32]) -> list[int]:
    """The tokens to split, of groups [n, R] with so many chunks of context each: those without which a group saves more
    than they take by themselves. A group of which too many would have to be split is left as it is."""
    most = chunks.max(initial=0)
    if most < WORTH_WHILE or most - chunks.min(where=chunks > 0, initial=most) <= SPLIT_COST:
        return []
    R = chunks.shape[1]
    tokens = np.argsort(-chunks, axis=1, kind="stable")
    longest = np.take_along_axis(chunks, tokens, axis=1)[:, : MAX_SPLITS + 1]
    costs = longest.copy()  # [n, k]: of a group if its k longest are split
    costs[:, 1:] += np.cumsum(-(-longest[:, :-1] // R) + SPLIT_COST, axis=1)
    split: list[int] = []
    for group in np.flatnonzero(costs.argmin(axis=1)):
        count = costs[group, : MAX_SPLITS - len(split) + 1].argmin()
        split += (group * R + tokens[group, :count]).tolist()
    return split
