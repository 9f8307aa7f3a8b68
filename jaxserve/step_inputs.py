"""A scheduler decision → arrays in a bucketed shape, all in one host buffer.

Everything that a step must know travels to the device as one int32 array. `StepShape` is the static key of the
compiled program; what varies from request to request is data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxserve.kernels.metadata import MAX_UNTILED_TOKENS, QUERY_TILE
from jaxserve.scheduler import StepPlan

NO_LOGPROBS = -1


@dataclass(frozen=True)
class StepShape:
    """Static shape of one compiled step.

    Attributes:
        num_tokens: T, the token bucket.
        num_rows: S, sequences at most.
        blocks_per_row: M, blocks of one sequence at most.
    """

    num_tokens: int
    num_rows: int
    blocks_per_row: int

    @cached_property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every input, in buffer order."""
        T, S, M = self.num_tokens, self.num_rows, self.blocks_per_row
        return {
            "token_ids": (T,),
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
            "counts": (3,),  # tokens attended one by one, tiles, block copies
        }

    @property
    def tiled(self) -> bool:
        """Whether rows of several tokens are attended in tiles."""
        return self.num_tokens > MAX_UNTILED_TOKENS

    @cached_property
    def size(self) -> int:
        """int32 elements of the buffer."""
        return sum(int(np.prod(shape)) for shape in self.fields.values())

    def unpack(self, buffer: Any) -> dict[str, Any]:
        """Views of (numpy) or slices of (jax) the buffer by name."""
        views, offset = {}, 0
        for name, shape in self.fields.items():
            count = int(np.prod(shape))
            views[name] = buffer[offset : offset + count].reshape(shape)
            offset += count
        return views


def pack_step(plan: StepPlan, shape: StepShape, block_size: int) -> npt.NDArray[np.int32]:
    """The step's one host-to-device transfer.

    Args:
        plan: at most `shape.num_tokens` tokens in at most `shape.num_rows` rows, rows of one token first.

    Returns:
        int32 [shape.size].
    """
    buffer = np.zeros(shape.size, np.int32)
    inputs: dict[str, npt.NDArray[np.int32]] = shape.unpack(buffer)
    inputs["num_logprobs"][:] = NO_LOGPROBS
    temperature, top_p, min_p = (inputs[name].view(np.float32) for name in ("temperature", "top_p", "min_p"))
    top_p[:] = 1.0
    seed_low, seed_high = (inputs[name].view(np.uint32) for name in ("seed_low", "seed_high"))
    tiles: list[tuple[int, int]] = []
    copies: list[tuple[int, int]] = []
    token = num_single_tokens = 0
    for s, row in enumerate(plan.rows):
        sequence, num_tokens, params = row.sequence, row.num_tokens, row.sequence.params
        start = sequence.num_computed_tokens
        stop = start + num_tokens
        table = inputs["block_tables"][s]
        table[: len(sequence.block_table)] = sequence.block_table
        inputs["token_rows"][token : token + num_tokens] = s
        if num_tokens == 1:
            inputs["token_ids"][token] = sequence.token_ids[start]
            inputs["positions"][token] = start
            inputs["slot_mapping"][token] = table[start // block_size] * block_size + start % block_size
        else:
            positions = np.arange(start, stop, dtype=np.int32)
            inputs["token_ids"][token : token + num_tokens] = sequence.token_ids[start:stop]
            inputs["positions"][token : token + num_tokens] = positions
            slots = table[positions // block_size] * block_size + positions % block_size
            inputs["slot_mapping"][token : token + num_tokens] = slots
        if shape.tiled and num_tokens > 1:
            tiles += [(s, first) for first in range(token, token + num_tokens, QUERY_TILE)]
        else:
            num_single_tokens += num_tokens
        token += num_tokens
        copies += row.copies
        inputs["seq_lens"][s] = stop
        inputs["query_start_loc"][s + 1] = token
        inputs["logits_index"][s] = token - 1
        temperature[s] = params.temperature
        if not params.greedy:
            top_p[s], min_p[s] = params.top_p, params.min_p
            inputs["top_k"][s] = max(params.top_k, 0)
            seed_low[s] = sequence.seed & 0xFFFFFFFF
            seed_high[s] = (sequence.seed >> 32) & 0xFFFFFFFF
            inputs["choice"][s] = sequence.index
        if params.logprobs is not None and row.samples:
            inputs["num_logprobs"][s] = params.logprobs
    inputs["query_start_loc"][len(plan.rows) + 1 :] = token
    if tiles:
        inputs["tiles"][: len(tiles)] = tiles
    if copies:
        inputs["block_copies"][: len(copies)] = copies
    inputs["counts"][:] = num_single_tokens, len(tiles), len(copies)
    return buffer
