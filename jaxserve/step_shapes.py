"""The shapes of steps: what programs are compiled for, and where in its buffer each input of a step lies.

`StepProgram` is the static key of a compiled program; what varies from request to request is data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxserve.kernels.lanes import MAX_SPLITS, TOKEN_GROUP, max_groups, max_lanes
from jaxserve.kernels.metadata import MAX_UNTILED_TOKENS, QUERY_TILE
from jaxserve.sampling_params import DRAW_INPUTS

MAX_SHAPES = 8
SHARED_TOKENS = 32  # times as many as in the smallest shape of a program


@dataclass(frozen=True)
class StepShape:
    """Static shape of a step.

    Attributes:
        num_tokens: T, the token bucket.
        num_rows: S, sequences at most.
        blocks_per_row: M, blocks of one sequence at most.
        prompt_logprobs: whether the step can report them; one bucket that does is enough.
        decode_only: every row has one token.
        lanes: single tokens are attended in lanes (`kernels.lanes`).
    """

    num_tokens: int
    num_rows: int
    blocks_per_row: int
    prompt_logprobs: bool = False
    decode_only: bool = False
    lanes: bool = False

    @cached_property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every input, in buffer order."""
        T, S, M = self.num_tokens, self.num_rows, self.blocks_per_row
        return {
            "token_ids": (T,),  # −1 − r: the token that row r of the step before sampled
            "positions": (T,),
            "token_rows": (T,),
            "slot_mapping": (T,),
            "block_tables": (S, M),
            "seq_lens": (S,),
            "query_start_loc": (S + 1,),
            "tiles": (T // QUERY_TILE + S if self.tiled else 0, 2),
            "lanes": (max_lanes(T) if self.lanes else 0, 3),
            "lane_groups": (max_groups(T) if self.lanes else 0, 3),
            "merged_tokens": (MAX_SPLITS if self.lanes else 0,),
            "block_copies": (S, 2),
            "logits_index": (S,),  # flat index of the row's last token
            "draws": (len(DRAW_INPUTS), S),
            "processed_rows": (S,),  # those whose logits are changed, first
            "slot": (S,),
            "num_biases": (S,),
            "prompt_len": (S,),
            "num_counted": (S,),
            "repetition": (S,),  # float32 bits, as frequency and presence
            "frequency": (S,),
            "presence": (S,),
            "num_candidates": (S,),  # of a beam
            # the token behind each token of a prompt whose logprobs are wanted, and where those tokens are
            "prompt_targets": (T if self.prompt_logprobs else 0,),
            "prompt_tokens": (T if self.prompt_logprobs else 0,),
            # tokens attended one by one, tiles, block copies, processed rows, prompt_tokens, rows with logits, groups
            # of lanes
            "counts": (7,),
            "shape_index": (1,),  # which of the program's
            "layers": (2,),  # the first, and the one to stop before
        }

    @property
    def tiled(self) -> bool:
        """Whether rows of several tokens are attended in tiles."""
        return self.num_tokens > MAX_UNTILED_TOKENS and not self.decode_only

    def fits(self, num_tokens: int, num_rows: int, *, prompt_logprobs: bool) -> bool:
        """Whether a step of this shape can compute that many tokens of that many rows."""
        only_decodes = num_tokens == num_rows
        return (
            num_tokens <= self.num_tokens
            and (only_decodes or not self.decode_only)
            and (self.prompt_logprobs or not prompt_logprobs)
        )

    @cached_property
    def _layout(self) -> list[tuple[str, slice, tuple[int, ...]]]:
        """Name, place and shape of every input."""
        layout, offset = [], 0
        for name, shape in self.fields.items():
            count = math.prod(shape)
            layout.append((name, slice(offset, offset + count), shape))
            offset += count
        return layout

    @cached_property
    def size(self) -> int:
        """int32 elements of the buffer."""
        return sum(math.prod(shape) for shape in self.fields.values())

    def unpack(self, buffer: Any) -> dict[str, Any]:
        """Views of (numpy) or slices of (jax) the buffer by name."""
        return {
            name: buffer[place] if len(shape) == 1 else buffer[place].reshape(shape)
            for name, place, shape in self._layout
        }

    def narrow(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """This shape's part of a larger shape's inputs."""
        return {name: inputs[name][tuple(map(slice, shape))] for name, shape in self.fields.items()}


@dataclass(frozen=True)
class StepProgram:
    """Shapes that one compiled program serves, in ascending order. Their inputs are laid out as those of the last,
    which holds all the others."""

    shapes: tuple[StepShape, ...]

    @property
    def layout(self) -> StepShape:
        return self.shapes[-1]


def token_buckets(max_num_batched_tokens: int, smallest: tuple[int, ...]) -> list[int]:
    """Token counts that programs are compiled for: `smallest`, then powers of two up to the budget, thinned out
    from below the largest if they are more than MAX_SHAPES."""
    buckets = list(smallest)
    while buckets[-1] * 2 < max_num_batched_tokens:
        buckets.append(buckets[-1] * 2)
    largest = -(-max_num_batched_tokens // TOKEN_GROUP) * TOKEN_GROUP
    buckets = [b for b in buckets if b < largest] + [largest]
    while len(buckets) > MAX_SHAPES:
        del buckets[-3]  # few steps are between a full chunk and a full batch of decodes
    return buckets


def step_shapes(
    buckets: list[int],
    smallest_mixed: int | None,
    *,
    max_num_seqs: int,
    blocks_per_row: int,
    lanes: bool = False,
) -> list[StepShape]:
    """Shapes that programs are compiled for, in the order in which a step looks for the first that fits it; at most
    MAX_SHAPES, and the last one takes everything.

    Args:
        smallest_mixed: rows of several tokens get programs only from this size on, and decoding gets programs
            of its own for up to `max_num_seqs` rows; None: one program a bucket, for both.
        lanes: of batches of several tokens.
    """

    def shape(bucket: int, *, decode_only: bool = False) -> StepShape:
        last = bucket == buckets[-1] and not decode_only
        rows = min(bucket, max_num_seqs)
        return StepShape(
            bucket,
            rows,
            blocks_per_row,
            prompt_logprobs=last,
            decode_only=decode_only,
            lanes=lanes and bucket > 1,
        )

    if smallest_mixed is None:
        return [shape(bucket) for bucket in buckets]
    decode = [b for i, b in enumerate(buckets) if i == 0 or buckets[i - 1] < max_num_seqs]
    mixed = [b for b in buckets[:-1] if b >= smallest_mixed] + [buckets[-1]]
    shapes = [*(shape(b, decode_only=True) for b in decode), *map(shape, mixed)]
    while len(shapes) > MAX_SHAPES:
        del shapes[-3]
    return shapes


def step_programs(shapes: list[StepShape], *, shared: bool) -> list[StepProgram]:
    """Which shapes are compiled together. Of a shared program (XLA:CPU takes long to compile, and jumps for free) all
    but the layers is there once. That of one row has its own, for it is all overhead to it; others share within a
    factor of SHARED_TOKENS, since each step makes room for the hidden states of the largest."""
    programs: list[list[StepShape]] = []
    for shape in shapes:
        first = programs[-1][0] if programs else None
        if (
            first is not None
            and shared
            and first.num_rows > 1
            and shape.num_tokens <= SHARED_TOKENS * first.num_tokens
        ):
            programs[-1].append(shape)
        else:
            programs.append([shape])
    return [StepProgram(tuple(program)) for program in programs]
