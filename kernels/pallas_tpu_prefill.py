"""The TPU kernel's prefill path: rows of several tokens. All K and V are written, then tiles of queries attend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels.pallas_tpu_common import (
    MASKED,
    Item,
    Step,
    align,
    convert,
    div,
    dot,
    from_float32,
    iota,
    is_visible,
    mod,
    normalize,
    pipeline,
    softmax_update,
    to_float32,
)
from jaxserve.kernels.pallas_tpu_layout import LANES, SUBLANES


class LongRows(Step):
    """Rows of several tokens."""

    # -- rows of several tokens: writing ------------------------------------------------------------------------

    def _for_each_window(
        self,
        size: int,
        new_copy: Callable[[Item, jax.Array], Any],
        old_copy: Callable[[Item, jax.Array], Any],
        out_copy: Callable[[Item, jax.Array], Any],
        combine: Callable[[Item, jax.Array], None],
    ) -> None:
        """Double-buffered read, combine and write of every window of `size` positions that gets new tokens. What is
        there already is read only if there is something to keep. Items are (row, window, ordinal)."""

        def span(row: jax.Array) -> tuple[jax.Array, jax.Array]:
            return div(self.first_position(row), size), div(self.seq_len(row) - 1, size)

        def advance(item: Item) -> Item:
            row, window, ordinal = item
            more = window < span(row)[1]
            return jnp.where(more, row, row + 1), jnp.where(more, window + 1, span(row + 1)[0]), ordinal + 1

        def keeps(item: Item) -> jax.Array:
            return item[1] * size < self.first_position(item[0])

        def prefetch(item: Item, slot: jax.Array) -> None:
            pl.when(item[2] >= 2)(lambda: out_copy(item, slot).wait())  # the slot's last write
            new_copy(item, slot).start()
            pl.when(keeps(item))(lambda: old_copy(item, slot).start())

        def consume(item: Item, slot: jax.Array) -> None:
            new_copy(item, slot).wait()
            pl.when(keeps(item))(lambda: old_copy(item, slot).wait())
            combine(item, slot)
            out_copy(item, slot).start()

        first = (self.num_singles, span(self.num_singles)[0], jnp.int32(0))
        end = pipeline(first, lambda item: item[0] < self.num_rows, advance, prefetch, consume)
        for back in (2, 1):
            ordinal = end[2] - back

            @pl.when(ordinal >= 0)
            def _(ordinal: jax.Array = ordinal) -> None:
                out_copy((self.num_singles, jnp.int32(0), ordinal), ordinal & 1).wait()

    def _window_place(self, item: Item, size: int) -> tuple[jax.Array, Any]:
        """(block, span in the block) of a window."""
        row, window, _ = item
        base = window * size
        return self.block_of(row, base), pl.ds(self.offset_in_block(base, size), size)

    def write_prefill_rows(self) -> None:
        p, r = self.plan, self.refs
        size = p.new_rows

        def first_new(row: jax.Array, base: jax.Array) -> jax.Array:
            """Where the new rows begin that belong to positions from `base` on."""
            return self.first_token(row) + base - self.first_position(row) + p.lead

        def new_copy(item: Item, slot: jax.Array) -> Any:
            base = item[1] * size
            first = pl.multiple_of(align(first_new(item[0], base), SUBLANES), SUBLANES)
            source = r.new.at[self.heads, pl.ds(first, size + SUBLANES)]
            return pltpu.make_async_copy(source, r.fresh.at[slot], r.kv_sem.at[slot])

        def old_copy(item: Item, slot: jax.Array) -> Any:
            block, span = self._window_place(item, size)
            target = r.kv.at[slot, :, pl.ds(0, size)]
            return pltpu.make_async_copy(r.pool.at[block, self.heads, span], target, r.kv_sem.at[slot])

        def out_copy(item: Item, slot: jax.Array) -> Any:
            block, span = self._window_place(item, size)
            source = r.kv.at[slot, :, pl.ds(0, size)]
            return pltpu.make_async_copy(source, r.pool.at[block, self.heads, span], r.write_sem.at[slot])

        def combine(item: Item, slot: jax.Array) -> None:
            row, window, _ = item
            old = to_float32(r.kv[slot, :, pl.ds(0, size)])
            at = window * size + iota(old.shape, 1)
            back = size + SUBLANES - mod(first_new(row, window * size), SUBLANES)  # a whole turn is none
            fresh = pltpu.roll(r.fresh[slot], back, 1)[:, :size]
            new = jnp.where(at < self.seq_len(row), fresh, 0.0)
            merged = jnp.where(at < self.first_position(row), old, new)
            r.kv[slot, :, pl.ds(0, size)] = from_float32(merged, p.kv_dtype)

        self._for_each_window(size, new_copy, old_copy, out_copy, combine)

    def write_prefill_scales(self) -> None:
        p, r = self.plan, self.refs

        def first_lane(item: Item) -> jax.Array:
            row, window, _ = item
            return self.first_token(row) + window * p.unit - self.first_position(row) + p.lead

        def place(item: Item) -> tuple[Any, ...]:
            base = item[1] * p.unit
            return self.block_of(item[0], base), self.heads, slice(None), self.scale_lanes(base)

        def new_copy(item: Item, slot: jax.Array) -> Any:
            lanes = pl.ds(pl.multiple_of(align(first_lane(item), LANES), LANES), 2 * LANES)
            source = r.new_scales.at[self.heads, :, lanes]
            return pltpu.make_async_copy(source, r.fresh_scales.at[slot], r.kv_sem.at[slot])

        def old_copy(item: Item, slot: jax.Array) -> Any:
            source = r.scales.at[place(item)]
            return pltpu.make_async_copy(source, r.stage_scales.at[slot], r.kv_sem.at[slot])

        def out_copy(item: Item, slot: jax.Array) -> Any:
            target = r.scales.at[place(item)]
            return pltpu.make_async_copy(r.stage_scales.at[slot], target, r.write_sem.at[slot])

        def combine(item: Item, slot: jax.Array) -> None:
            row, window, _ = item
            back = mod(-mod(first_lane(item), LANES), 2 * LANES)
            shifted = pltpu.roll(r.fresh_scales[slot], back, 2)[..., :LANES]
            old = r.stage_scales[slot]
            at = window * p.unit + iota(old.shape, 2)
            new = jnp.where(at < self.seq_len(row), shifted, 0.0)
            r.stage_scales[slot] = jnp.where(at < self.first_position(row), old, new)

        self._for_each_window(p.unit, new_copy, old_copy, out_copy, combine)

    # -- rows of several tokens: attention ----------------------------------------------------------------------

    def attend_tiles(self) -> None:
        """Items are (head group, row, tile, chunk, ordinal of the tile)."""
        p, r = self.plan, self.refs
        num_groups = p.K // p.head_group

        def heads(group: jax.Array) -> Any:
            return pl.ds(self.first_head + group * p.head_group, p.head_group)

        def part(row: jax.Array, tile: jax.Array) -> tuple[jax.Array, ...]:
            """(first position that is seen, position behind the last, chunks) of a row's tokens in a tile."""
            to_position = self.seq_len(row) - self.first_token(row + 1)
            first = jnp.maximum(self.first_token(row), tile * p.Q) + to_position
            stop = jnp.minimum(self.first_token(row + 1), (tile + 1) * p.Q) + to_position
            start = self.context_start(first)
            return start, stop, div(stop - start + p.chunk - 1, p.chunk)

        def opens(item: Item) -> jax.Array:
            """Is it the first item of its tile?"""
            _, row, tile, chunk, _ = item
            return (chunk == 0) & ((row == self.num_singles) | (self.first_token(row) <= tile * p.Q))

        def closes(item: Item) -> jax.Array:
            _, row, tile, chunk, _ = item
            end = (self.first_token(row + 1) >= (tile + 1) * p.Q) | (row + 1 == self.num_rows)
            return (chunk + 1 == part(row, tile)[2]) & end

        first_row = self.num_singles
        first_tile = div(self.first_token(first_row), p.Q)

        def advance(item: Item) -> Item:
            group, row, tile, chunk, ordinal = item
            more_chunks = chunk + 1 < part(row, tile)[2]
            more_tiles = tile < div(self.first_token(row + 1) - 1, p.Q)
            more_rows = row + 1 < self.num_rows
            next_row = jnp.where(more_tiles, row, jnp.where(more_rows, row + 1, first_row))
            row_tile = jnp.where(more_rows, div(self.first_token(row + 1), p.Q), first_tile)
            next_tile = jnp.where(more_tiles, tile + 1, row_tile)
            next_group = jnp.where(more_tiles | more_rows, group, group + 1)
            new_tile = (next_tile != tile) | (next_group != group)
            return (
                jnp.where(more_chunks, group, next_group),
                jnp.where(more_chunks, row, next_row),
                jnp.where(more_chunks, tile, next_tile),
                jnp.where(more_chunks, chunk + 1, 0),
                jnp.where(more_chunks | ~new_tile, ordinal, ordinal + 1),
            )

        def query_copy(item: Item) -> Any:
            group, _, tile, _, ordinal = item
            slot = ordinal & 1
            return pltpu.make_async_copy(
                r.q_tiled.at[tile, heads(group)], r.tile_q.at[slot], r.q_sem.at[slot]
            )

        def out_copy(group: jax.Array, tile: jax.Array, ordinal: jax.Array) -> Any:
            slot = ordinal & 1
            return pltpu.make_async_copy(
                r.tile_out.at[slot], r.out_tiled.at[tile, heads(group)], r.out_sem.at[slot]
            )

        def chunk_of(item: Item) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
            group, row, tile, chunk, _ = item
            start, stop, _ = part(row, tile)
            return heads(group), row, start + chunk * p.chunk, stop

        def prefetch(item: Item, slot: jax.Array) -> None:
            self.start_chunk(*chunk_of(item), slot)
            pl.when(opens(item))(lambda: query_copy(item).start())

        def consume(item: Item, slot: jax.Array) -> None:
            group, row, tile, ordinal = item[0], item[1], item[2], item[4]
            start, stop = chunk_of(item)[2:]
            self.wait_chunk(*chunk_of(item), slot)

            @pl.when(opens(item))
            def _() -> None:
                query_copy(item).wait()
                r.tile_peak[...] = jnp.full(r.tile_peak.shape, MASKED, jnp.float32)
                r.tile_total[...] = jnp.zeros(r.tile_total.shape, jnp.float32)
                r.tile_acc[...] = jnp.zeros(r.tile_acc.shape, jnp.float32)

            pl.when(start + p.chunk > stop)(
                lambda: self.clear_from(slot, p.head_group, stop - start, p.chunk)
            )
            self._update_tile(row, tile, ordinal & 1, start, slot)

            @pl.when(closes(item))
            def _() -> None:
                pl.when(ordinal >= 2)(lambda: out_copy(group, tile, ordinal).wait())

                def finish(head: jax.Array, _: None) -> None:
                    out = normalize(r.tile_acc[head], r.tile_total[head, :, :1])
                    r.tile_out[ordinal & 1, head] = out.astype(p.query_dtype)

                lax.fori_loop(0, p.head_group, finish, None)
                out_copy(group, tile, ordinal).start()

        zero = jnp.int32(0)
        first_group = jnp.where(self.num_singles < self.num_rows, 0, num_groups).astype(jnp.int32)
        first = (first_group, first_row, first_tile, zero, zero)
        end = pipeline(first, lambda item: item[0] < num_groups, advance, prefetch, consume)
        for back in (2, 1):
            ordinal = end[4] - back

            @pl.when(ordinal >= 0)
            def _(ordinal: jax.Array = ordinal) -> None:
                out_copy(zero, zero, ordinal).wait()

    def _update_tile(
        self, row: jax.Array, tile: jax.Array, parity: jax.Array, start: jax.Array, slot: jax.Array
    ) -> None:
        """One softmax update of a query tile with one chunk, head by head."""
        p, r = self.plan, self.refs
        token = tile * p.Q + (iota((p.G * p.Q, 1), 0) & (p.Q - 1))
        own = (token >= self.first_token(row)) & (token < self.first_token(row + 1))
        q_positions = token + (self.seq_len(row) - self.first_token(row + 1))
        kv_positions = start + iota((1, p.chunk), 1)
        visible = own & is_visible(kv_positions, q_positions, p.sliding_window)

        def update(head: jax.Array, _: None) -> None:
            queries = r.tile_q[parity, head].astype(p.compute_dtype)
            keys = convert(r.kv[slot, head, :, pl.ds(0, p.Lk)], p.compute_dtype)
            scores = dot(queries, keys, 1, p.precision)
            units = p.chunk // p.unit
            scales = None
            if p.quantized:
                scales = tuple(x[0] for x in self.scale_rows(slot, 0, units, pl.ds(head, 1)))
            values = convert(r.kv[slot, head, :, p.values], p.compute_dtype)
            state = (r.tile_peak[head], r.tile_total[head], r.tile_acc[head])
            product = functools.partial(dot, axis=0, precision=p.precision)
            r.tile_peak[head], r.tile_total[head], r.tile_acc[head] = softmax_update(
                p, scores, visible, values, scales, state, product
            )

        lax.fori_loop(0, p.head_group, update, None)
