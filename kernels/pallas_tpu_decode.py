"""The TPU kernel's decode path: rows of one token, all kv heads of one row at a time."""

from __future__ import annotations

import functools
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
    batched_dot,
    convert,
    div,
    from_float32,
    iota,
    is_visible,
    mod,
    normalize,
    pipeline,
    softmax_update,
    to_float32,
)
from jaxserve.kernels.pallas_tpu_layout import LANES


class SingleTokens(Step):
    """The new K and V are inserted into the chunk that has just been read, and written while it is attended."""

    def attend_single_tokens(self) -> None:
        p, r = self.plan, self.refs

        def chunks(row: jax.Array) -> tuple[jax.Array, jax.Array]:
            """(first position, number of chunks)"""
            first = self.context_start(self.seq_len(row) - 1)
            return first, div(self.seq_len(row) - first + p.chunk - 1, p.chunk)

        def advance(item: Item) -> Item:
            row, chunk = item
            more = chunk + 1 < chunks(row)[1]
            return jnp.where(more, row, row + 1), jnp.where(more, chunk + 1, 0)

        def copies(item: Item) -> tuple[Any, list[Any]]:
            """(is it the row's last chunk, DMAs of its new K and V)"""
            row, chunk = item
            slot = row & 1
            new = [(r.new.at[self.heads, pl.ds(row + p.lead, 1)], r.new_row.at[slot, :, pl.ds(0, 1)])]
            if p.quantized:
                window = pl.ds(pl.multiple_of(align(row + p.lead, LANES), LANES), LANES)
                new.append((r.new_scales.at[self.heads, :, window], r.new_scale.at[slot]))
            last = chunk + 1 == chunks(row)[1]
            return last, [functools.partial(pltpu.make_async_copy, s, d, r.new_sem.at[slot]) for s, d in new]

        def query_copy(row: jax.Array) -> Any:
            return pltpu.make_async_copy(r.q_single.at[row, self.heads], r.q.at[row & 1], r.q_sem.at[row & 1])

        def prefetch(item: Item, slot: jax.Array) -> None:
            row, chunk = item
            start = chunks(row)[0] + chunk * p.chunk
            self.start_chunk(self.heads, row, start, self.seq_len(row) - 1, slot)
            pl.when(chunk == 0)(lambda: query_copy(row).start())
            last, new = copies(item)

            @pl.when(last)
            def _() -> None:
                for copy in new:
                    copy().start()

        def consume(item: Item, slot: jax.Array) -> None:
            row, chunk = item
            start = chunks(row)[0] + chunk * p.chunk
            self.wait_chunk(self.heads, row, start, self.seq_len(row) - 1, slot)

            @pl.when(chunk == 0)
            def _() -> None:
                query_copy(row).wait()
                r.peak[...] = jnp.full(r.peak.shape, MASKED, jnp.float32)
                r.total[...] = jnp.zeros(r.total.shape, jnp.float32)
                r.acc[...] = jnp.zeros(r.acc.shape, jnp.float32)

            last, new = copies(item)

            @pl.when(last)
            def _() -> None:
                for copy in new:
                    copy().wait()
                self._insert(row, start, slot)

            self._update_single(row, start, slot)
            pl.when(last)(lambda: self._finish_single(row))

        pipeline(
            (jnp.int32(0), jnp.int32(0)), lambda item: item[0] < self.num_singles, advance, prefetch, consume
        )
        for back in (2, 1):
            row = self.num_singles - back

            @pl.when(row >= 0)
            def _(row: jax.Array = row) -> None:
                self._wait_written(row & 1)
                self._out_copy(row).wait()

    def _insert(self, row: jax.Array, start: jax.Array, slot: jax.Array) -> None:
        """Put the row's new K and V into its last chunk, clear what follows, and write them to the pool."""
        p, r = self.plan, self.refs
        parity = row & 1
        position = self.seq_len(row) - 1
        local = position - start
        rows = p.window_rows
        window = pl.multiple_of(align(local, rows), rows)
        old = r.kv[slot, :, pl.ds(window, rows)]
        new = r.new_row[parity, :, :1]
        at = window + iota(old.shape, 1)
        fresh = from_float32(
            jnp.where(at == local, new, jnp.where(at < local, to_float32(old), 0.0)), p.kv_dtype
        )
        r.kv[slot, :, pl.ds(window, rows)] = fresh
        tile_end = align(local, p.decode_tile) + p.decode_tile
        self.clear_from(slot, p.K, window + rows, tile_end)
        pl.when(row >= 2)(lambda: self._wait_written(parity))
        r.stage[parity] = fresh
        if p.quantized:
            self._insert_scales(row, local, slot)
        for copy in self._write_copies(
            parity, self.block_of(row, position), mod(position, p.B), mod(local, rows)
        ):
            copy.start()

    def _insert_scales(self, row: jax.Array, local: jax.Array, slot: jax.Array) -> None:
        p, r = self.plan, self.refs
        unit, at = div(local, p.unit), mod(local, p.unit)
        lane = mod(row + p.lead, LANES)
        shifted = pltpu.roll(r.new_scale[row & 1], mod(at - lane, LANES), 2)
        old = r.kv_scales[slot, unit]
        lanes = iota(old.shape, 2)
        scales = jnp.where(lanes == at, shifted, jnp.where(lanes < at, old, 0.0))
        r.kv_scales[slot, unit] = scales
        r.stage_scales[row & 1] = scales

    def _write_copies(self, parity: jax.Array, block: Any, offset: Any, staged: Any) -> list[Any]:
        """DMAs of the words that hold one token: from row `staged` of the stage to `offset` in the block."""
        p, r = self.plan, self.refs
        rows = p.write_rows
        copies = [
            pltpu.make_async_copy(
                r.stage.at[parity, :, pl.ds(pl.multiple_of(align(staged, rows), rows), rows)],
                r.pool.at[block, self.heads, pl.ds(pl.multiple_of(align(offset, rows), rows), rows)],
                r.write_sem.at[parity],
            )
        ]
        if p.quantized:
            span = self.scale_lanes(align(offset, p.unit))
            copies.append(
                pltpu.make_async_copy(
                    r.stage_scales.at[parity],
                    r.scales.at[block, self.heads, :, span],
                    r.write_sem.at[parity],
                )
            )
        return copies

    def _wait_written(self, parity: jax.Array) -> None:
        zero = jnp.int32(0)  # a wait needs the size only
        for copy in self._write_copies(parity, zero, zero, zero):
            copy.wait()

    def _update_single(self, row: jax.Array, start: jax.Array, slot: jax.Array) -> None:
        """One softmax update per decode tile of the chunk, all heads at once."""
        p, r = self.plan, self.refs
        seq_len = self.seq_len(row)
        queries = r.q[row & 1].astype(p.compute_dtype)

        def update(tile: jax.Array, _: None) -> None:
            span = pl.ds(pl.multiple_of(tile * p.decode_tile, p.decode_tile), p.decode_tile)
            keys = convert(r.kv[slot, :, span, pl.ds(0, p.Lk)], p.compute_dtype)
            scores = batched_dot(queries, keys, 2, p.precision)
            units = p.decode_tile // p.unit if p.quantized else 0
            scales = self.scale_rows(slot, tile * units, units, pl.ds(0, p.K)) if p.quantized else None
            kv_positions = start + tile * p.decode_tile + iota((1, 1, p.decode_tile), 2)
            visible = is_visible(kv_positions, seq_len - 1, p.sliding_window)
            values = convert(r.kv[slot, :, span, p.values], p.compute_dtype)
            state = (r.peak[...], r.total[...], r.acc[...])
            product = functools.partial(batched_dot, axis=1, precision=p.precision)
            r.peak[...], r.total[...], r.acc[...] = softmax_update(
                p, scores, visible, values, scales, state, product
            )

        in_chunk = jnp.minimum(seq_len - start, p.chunk)
        lax.fori_loop(0, div(in_chunk + p.decode_tile - 1, p.decode_tile), update, None)

    def _finish_single(self, row: jax.Array) -> None:
        r = self.refs
        pl.when(row >= 2)(lambda: self._out_copy(row).wait())
        r.out[row & 1] = normalize(r.acc[...], r.total[..., :1]).astype(self.plan.query_dtype)
        self._out_copy(row).start()

    def _out_copy(self, row: jax.Array) -> Any:
        r = self.refs
        return pltpu.make_async_copy(
            r.out.at[row & 1], r.out_single.at[row, self.heads], r.out_sem.at[row & 1]
        )
