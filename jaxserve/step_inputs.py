"""A scheduler decision → arrays in a bucketed shape (`step_shapes`), all in one host buffer.

Everything that a step must know travels to the device as one int32 array.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from jaxserve.kernels.lanes import plan_lanes
from jaxserve.kernels.metadata import QUERY_TILE
from jaxserve.sampling_params import NO_DRAW
from jaxserve.sequence import Sequence
from jaxserve.step_plan import ALL_LAYERS, ScheduledRow, StepPlan
from jaxserve.step_shapes import StepProgram, StepShape

ONE = np.float32(1.0).view(np.int32)
PADDING_DRAWS = np.frombuffer(NO_DRAW, np.int32)[:, None]
Inputs = dict[str, npt.NDArray[np.int32]]


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
    inputs: Inputs = program.layout.unpack(buffer)
    inputs["repetition"][:] = ONE
    rows = plan.rows
    ends = _pack_tokens(inputs, rows, block_size)
    _pack_draws(inputs, rows)
    tiles: list[tuple[int, int]] = []
    num_single_tokens = plan.num_tokens
    if shape.tiled and not plan.is_of_single_tokens:
        for s, (row, end) in enumerate(zip(rows, ends, strict=True)):
            if row.num_tokens > 1:
                tiles += [(s, first) for first in range(end - row.num_tokens, end, QUERY_TILE)]
                num_single_tokens -= row.num_tokens
        inputs["tiles"][: len(tiles)] = tiles
    copies = [copy for row in rows for copy in row.copies]
    if copies:
        inputs["block_copies"][: len(copies)] = copies
    processed = [s for s, row in enumerate(rows) if row.samples and row.sequence.changes_logits]
    processed = [s for s in processed if _pack_processors(inputs, s, rows[s], slots)]
    inputs["processed_rows"][: len(processed)] = processed
    num_prompt_tokens = _pack_prompt_targets(inputs, rows, ends) if shape.prompt_logprobs else 0
    num_lane_groups = _pack_lanes(inputs, shape, num_single_tokens, block_size) if shape.lanes else 0
    num_rows = len(rows) if plan.layers == ALL_LAYERS else 0  # that have logits
    inputs["counts"][:] = (
        num_single_tokens, len(tiles), len(copies), len(processed), num_prompt_tokens, num_rows, num_lane_groups,
    )  # fmt: skip
    inputs["shape_index"][0] = program.shapes.index(shape)
    inputs["layers"][:] = plan.layers
    return buffer


def _pack_tokens(inputs: Inputs, rows: list[ScheduledRow], block_size: int) -> list[int]:
    """The rows' tokens, where their KV goes, and what they attend to; returns the flat index behind each row."""
    S = len(rows)
    block_tables = inputs["block_tables"]
    longest = max((len(row.sequence.block_table) for row in rows), default=0)
    if longest:
        num_bytes = longest * block_tables.itemsize
        tables = b"".join([row.sequence.block_table.tobytes().ljust(num_bytes, b"\0") for row in rows])
        block_tables[:S, :longest] = np.frombuffer(tables, np.int32).reshape(S, longest)
    token_ids = [token_id for row in rows for token_id in row.token_ids]
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
    lanes, groups, merged = plan_lanes(
        lens, shape.num_tokens, block_size=block_size, max_blocks=shape.blocks_per_row
    )
    inputs["lanes"][: len(lanes)] = lanes
    inputs["lane_groups"][: len(groups)] = groups
    inputs["merged_tokens"][: len(merged)] = merged
    return len(groups)


def _pack_prompt_targets(inputs: Inputs, rows: list[ScheduledRow], ends: list[int]) -> int:
    """Name the rows' tokens whose successors in the prompt are to be rated; returns how many they are."""
    count = 0
    for row, end in zip(rows, ends, strict=True):
        if row.rates:
            first, stop = row.prompt_logprob_range
            num, offset = stop - first, end - row.end
            inputs["prompt_tokens"][count : count + num] = np.arange(first + offset, stop + offset)
            inputs["prompt_targets"][count : count + num] = row.sequence.token_ids[first + 1 : stop + 1]
            count += num
    return count


def _pack_draws(inputs: Inputs, rows: list[ScheduledRow]) -> None:
    """What the rows that sample draw by."""
    packed = b"".join([row.sequence.draw_inputs if row.samples else NO_DRAW for row in rows])
    draws = inputs["draws"]
    draws[:, : len(rows)] = np.frombuffer(packed, np.int32).reshape(len(rows), len(draws)).T
    draws[:, len(rows) :] = PADDING_DRAWS


def _pack_processors(inputs: Inputs, s: int, row: ScheduledRow, slots: SlotLookup | None) -> bool:
    """What changes the row's logits; returns whether anything does."""
    sequence, params = row.sequence, row.sequence.params
    slot = 0 if slots is None else slots.slot(sequence)
    if slots is not None and slot:
        inputs["slot"][s], inputs["num_biases"][s] = slot, slots.num_biases(sequence)
    if params.has_penalties:
        inputs["prompt_len"][s] = sequence.num_prompt_tokens
        inputs["num_counted"][s] = row.end
        inputs["repetition"].view(np.float32)[s] = params.repetition_penalty
        inputs["frequency"].view(np.float32)[s] = params.frequency_penalty
        inputs["presence"].view(np.float32)[s] = params.presence_penalty
    if params.use_beam_search:
        inputs["num_candidates"][s] = 2 * params.num_sequences  # half of them may end
    return bool(slot) or params.has_penalties or params.use_beam_search
