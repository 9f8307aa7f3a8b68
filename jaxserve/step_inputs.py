"""A scheduler decision → arrays in a bucketed shape, all in one host buffer.

Everything that a step must know travels to the device as one int32 array. `StepProgram` is the static key of
a compiled program; what varies from request to request is data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from jaxserve.block_manager import BlockCopy
from jaxserve.kernels.metadata import MAX_UNTILED_TOKENS, QUERY_TILE
from jaxserve.scheduler import ScheduledRow, StepPlan
from jaxserve.sequence import Sequence

NO_LOGPROBS = -1


class SlotLookup(Protocol):
    """Where a sequence's row of the slot tables is."""

    def slot(self, sequence: Sequence) -> int: ...

    def num_biases(self, sequence: Sequence) -> int: ...


@dataclass(frozen=True)
class StepShape:
    """Static shape of a step.

    Attributes:
        num_tokens: T, the token bucket.
        num_rows: S, sequences at most.
        blocks_per_row: M, blocks of one sequence at most.
        prompt_logprobs: whether the step can report them; one bucket that does is enough.
        decode_only: every row has one token.
    """

    num_tokens: int
    num_rows: int
    blocks_per_row: int
    prompt_logprobs: bool = False
    decode_only: bool = False

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
            "block_copies": (S, 2),
            "logits_index": (S,),  # flat index of the row's last token
            "temperature": (S,),  # float32 bits, as top_p and min_p
            "top_p": (S,),
            "min_p": (S,),
            "top_k": (S,),
            "seed_low": (S,),
            "seed_high": (S,),
            "choice": (S,),
            "num_logprobs": (S,),
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
            # tokens attended one by one, tiles, block copies, processed rows, prompt_tokens, rows
            "counts": (6,),
            "shape_index": (1,),  # which of the program's
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
        return {name: inputs[name][: shape[0]] for name, shape in self.fields.items()}


@dataclass(frozen=True)
class StepProgram:
    """Shapes that one compiled program serves, in ascending order. Their inputs are laid out as those of the last,
    which holds all the others."""

    shapes: tuple[StepShape, ...]

    @property
    def layout(self) -> StepShape:
        return self.shapes[-1]


def pack_step(
    plan: StepPlan, program: StepProgram, shape: StepShape, block_size: int, slots: SlotLookup | None = None
) -> npt.NDArray[np.int32]:
    """The step's one host-to-device transfer.

    Args:
        plan: at most `shape.num_tokens` tokens in at most `shape.num_rows` rows, rows of one token first.
        shape: one of the program's.
        slots: None if nobody needs the slot tables.

    Returns:
        int32 [program.layout.size].
    """
    buffer = np.zeros(program.layout.size, np.int32)
    inputs: dict[str, npt.NDArray[np.int32]] = program.layout.unpack(buffer)
    for name in FLOATS:
        inputs[name] = inputs[name].view(np.float32)
    inputs["num_logprobs"][:] = NO_LOGPROBS
    inputs["top_p"][:] = 1.0
    inputs["repetition"][:] = 1.0
    ends = _pack_tokens(inputs, plan.rows, block_size)
    tiles: list[tuple[int, int]] = []
    copies: list[BlockCopy] = []
    processed: list[int] = []
    num_tiled_tokens = num_prompt_tokens = 0
    for s, row in enumerate(plan.rows):
        if shape.tiled and row.num_tokens > 1:
            tiles += [(s, first) for first in range(ends[s] - row.num_tokens, ends[s], QUERY_TILE)]
            num_tiled_tokens += row.num_tokens
        if shape.prompt_logprobs:
            num_prompt_tokens = _pack_prompt_targets(inputs, row, ends[s] - row.num_tokens, num_prompt_tokens)
        copies += row.copies
        if row.samples:
            _pack_sampling(inputs, s, row.sequence)
            if _pack_processors(inputs, s, row, slots):
                processed.append(s)
    inputs["processed_rows"][: len(processed)] = processed
    if tiles:
        inputs["tiles"][: len(tiles)] = tiles
    if copies:
        inputs["block_copies"][: len(copies)] = copies
    num_single_tokens = (ends[-1] if ends else 0) - num_tiled_tokens
    inputs["counts"][:] = (
        num_single_tokens, len(tiles), len(copies), len(processed), num_prompt_tokens, len(plan.rows),
    )  # fmt: skip
    inputs["shape_index"][0] = program.shapes.index(shape)
    return buffer


FLOATS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
Inputs = dict[str, npt.NDArray[np.int32]]


def _pack_tokens(inputs: Inputs, rows: list[ScheduledRow], block_size: int) -> list[int]:
    """The rows' tokens, where their KV goes, and what they attend to; returns the flat index behind each row."""
    S = len(rows)
    block_tables = inputs["block_tables"]
    token_ids: list[int] = []
    for s, row in enumerate(rows):
        table = row.sequence.block_table
        block_tables[s, : len(table)] = table
        token_ids += row.token_ids
    lengths = np.fromiter([row.num_tokens for row in rows], np.int32, S)
    seq_lens = np.fromiter([row.end for row in rows], np.int32, S)
    ends = np.cumsum(lengths, dtype=np.int32)
    T = len(token_ids)
    token_rows = np.repeat(np.arange(S, dtype=np.int32), lengths)
    positions = np.arange(T, dtype=np.int32) + (seq_lens - ends)[token_rows]
    inputs["token_ids"][:T] = token_ids
    inputs["positions"][:T] = positions
    inputs["token_rows"][:T] = token_rows
    blocks = block_tables[token_rows, positions // block_size]
    inputs["slot_mapping"][:T] = blocks * block_size + positions % block_size
    inputs["seq_lens"][:S] = seq_lens
    inputs["query_start_loc"][1 : S + 1] = ends
    inputs["query_start_loc"][S + 1 :] = T
    inputs["logits_index"][:S] = ends - 1
    indices: list[int] = ends.tolist()
    return indices


def _pack_prompt_targets(inputs: Inputs, row: ScheduledRow, token: int, count: int) -> int:
    """Name the row's tokens whose successor in the prompt is to be rated; returns the new count of such tokens."""
    first, stop = row.prompt_logprob_range
    num = stop - first
    if num > 0:
        offset = token + first - row.start
        inputs["prompt_tokens"][count : count + num] = np.arange(offset, offset + num)
        inputs["prompt_targets"][count : count + num] = row.sequence.token_ids[first + 1 : stop + 1]
    return count + max(num, 0)


def _pack_sampling(inputs: Inputs, s: int, sequence: Sequence) -> None:
    params = sequence.params
    if not params.greedy:
        inputs["temperature"][s] = params.temperature
        inputs["top_p"][s], inputs["min_p"][s] = params.top_p, params.min_p
        inputs["top_k"][s] = max(params.top_k, 0)
        inputs["seed_low"][s : s + 1].view(np.uint32)[0] = sequence.seed & 0xFFFFFFFF
        inputs["seed_high"][s : s + 1].view(np.uint32)[0] = (sequence.seed >> 32) & 0xFFFFFFFF
        inputs["choice"][s] = sequence.index
    if params.reports_logprobs:
        inputs["num_logprobs"][s] = params.logprobs or 0


def _pack_processors(inputs: Inputs, s: int, row: ScheduledRow, slots: SlotLookup | None) -> bool:
    """What changes the row's logits; returns whether anything does."""
    sequence, params = row.sequence, row.sequence.params
    slot = 0 if slots is None else slots.slot(sequence)
    if slots is not None and slot:
        inputs["slot"][s], inputs["num_biases"][s] = slot, slots.num_biases(sequence)
    if params.has_penalties:
        inputs["prompt_len"][s] = sequence.num_prompt_tokens
        inputs["num_counted"][s] = row.end
        inputs["repetition"][s] = params.repetition_penalty
        inputs["frequency"][s], inputs["presence"][s] = params.frequency_penalty, params.presence_penalty
    if params.use_beam_search:
        inputs["num_candidates"][s] = 2 * params.num_sequences  # half of them may end
    return bool(slot) or params.has_penalties or params.use_beam_search
