"""What attention must know about a step's ragged batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the scheduler and the packing of steps want the numbers here, and no jax
    import jax

QUERY_TILE = 64  # tokens of one prefill tile
MAX_UNTILED_TOKENS = 32  # batches up to this size are attended token by token, without tiles


class Lanes(NamedTuple):
    """How single tokens are attended: what `lanes.plan_lanes` says, padded, and how many groups that is."""

    lanes: jax.Array
    groups: jax.Array
    merged: jax.Array
    num_groups: jax.Array


class AttentionMetadata(NamedTuple):
    """One token-flattened batch. Rows of exactly one token come first.

    Attributes:
        block_tables: [S, M] int32; block ids in order of position, padded with 0. (JAX's own kernels say page
            for block.)
        seq_lens: [S] int32; tokens of the row's sequence once this step's are written; 0 for padding rows.
        query_start_loc: [S + 1] int32; row s owns tokens query_start_loc[s] … query_start_loc[s + 1] − 1.
        positions: [T] int32; of every token in its sequence.
        token_rows: [T] int32; the row of every token.
        slot_mapping: [T] int32; where token t's K and V go: block_id * block_size + offset. Padding
            tokens go to the null block.
        num_single_tokens: [] int32; how many of the first tokens are attended one by one: those of rows of
            one token, or all if the batch is small.
        tiles: [num_tiles_max, 2] int32; (row, first token) of each run of at most QUERY_TILE tokens of the
            other rows, in ascending order of first token; [0, 2] in a batch of at most MAX_UNTILED_TOKENS.
        num_tiles: [] int32.
        lanes: how single tokens are attended by `blocked_attention`; None: each in a lane of its own.
    """

    block_tables: jax.Array
    seq_lens: jax.Array
    query_start_loc: jax.Array
    positions: jax.Array
    token_rows: jax.Array
    slot_mapping: jax.Array
    num_single_tokens: jax.Array
    tiles: jax.Array
    num_tiles: jax.Array
    lanes: Lanes | None = None

    def shifted(self, num_blocks: int | jax.Array, block_size: int) -> AttentionMetadata:
        """The same batch with its blocks that many further on: another layer's, where layers share an array."""
        return self._replace(
            block_tables=self.block_tables + num_blocks,
            slot_mapping=self.slot_mapping + num_blocks * block_size,
        )
