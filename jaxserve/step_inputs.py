"""A scheduler decision → arrays in a bucketed shape (`step_shapes`), all in one host buffer.

Everything that a step must know travels to the device as one int32 array.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from jaxserve.block_manager import BlockCopy
from jaxserve.kernels.lanes import plan_lanes
from jaxserve.kernels.metadata import QUERY_TILE
from jaxserve.sequence import Sequence
from jaxserve.step_plan import ALL_LAYERS, ScheduledRow, StepPlan
from jaxserve.step_shapes import StepProgram, StepShape

NO_LOGPROBS = -1


class SlotLookup(Protocol):
    """Where a sequence's row of the slot tables is."""

    def slot(self, sequence: Sequence) -> int: ...

    def num_biases(self, sequence: Sequence) -> int: ...


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
    num_lane_groups = _pack_lanes(inputs, shape, num_single_tokens, block_size) if shape.lanes else 0
    num_rows = len(plan.rows) if plan.layers == ALL_LAYERS else 0  # that have logits
    inputs["counts"][:] = (
        num_single_tokens, len(tiles), len(copies), len(processed), num_prompt_tokens, num_rows, num_lane_groups,
    )  # fmt: skip
    inputs["shape_index"][0] = program.shapes.index(shape)
    inputs["layers"][:] = plan.layers
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


def _pack_lanes(inputs: Inputs, shape: StepShape, num_single_tokens: int, block_size: int) -> int:
    """How single tokens are attended; returns the number of groups."""
    lens = inputs["positions"][:num_single_tokens] + 1
    lanes, groups = plan_lanes(lens, shape.num_tokens, block_size=block_size, max_blocks=shape.blocks_per_row)
    inputs["lanes"][: len(lanes)] = lanes
    inputs["lane_groups"][: len(groups)] = groups
    return len(groups)


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
