"""What both paths of the TPU kernel are made of: where things are, reading the pool, arithmetic, the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels.pallas_tpu_layout import LANES, Plan

READ_ROWS = 4  # the end of a context is read in pieces of a power of two of tokens, at least this many
MASKED = -1e30  # finite, so that a row without any context gives 0 and no NaN

Item = tuple[jax.Array, ...]


class Step:
    """One instance's work: its kv heads begin at `first_head`."""

    def __init__(self, plan: Plan, refs: SimpleNamespace, first_head: jax.Array) -> None:
        self.plan = plan
        self.refs = refs
        self.heads = pl.ds(first_head, plan.K)
        self.first_head = first_head
        self.num_singles = refs.counts[0]
        self.num_rows = refs.counts[1]

    # -- scalars ------------------------------------------------------------------------------------------------

    def seq_len(self, row: jax.Array) -> jax.Array:
        return self.refs.seq_lens[
            jnp.minimum(row, self.plan.S - 1)
        ]  # a pipeline looks one row beyond the last

    def first_token(self, row: jax.Array) -> jax.Array:
        return self.refs.query_start_loc[jnp.minimum(row, self.plan.S)]

    def first_position(self, row: jax.Array) -> jax.Array:
        """Of the row's tokens in this step."""
        return self.seq_len(row) - (self.first_token(row + 1) - self.first_token(row))

    def context_start(self, position: jax.Array) -> jax.Array:
        """First position that a token at `position` sees, rounded down to a unit."""
        if self.plan.sliding_window is None:
            return jnp.int32(0)
        oldest = jnp.maximum(position - (self.plan.sliding_window - 1), 0)
        return align(oldest, self.plan.unit)

    def block_of(self, row: jax.Array, position: jax.Array) -> jax.Array:
        index = jnp.minimum(row, self.plan.S - 1) * self.plan.M + div(position, self.plan.B)
        return self.refs.block_tables[index]

    def offset_in_block(self, position: jax.Array, size: int) -> jax.Array | int:
        """Of a unit of `size` tokens that begins at `position`."""
        if size == self.plan.B:
            return 0
        return pl.multiple_of(mod(position, self.plan.B), size)

    def scale_lanes(self, position: jax.Array) -> Any:
        """Where in its block the scales of a unit are that begins at `position`."""
        if self.plan.B <= LANES:
            return pl.ds(0, LANES)
        return pl.ds(pl.multiple_of(mod(position, self.plan.B), LANES), LANES)

    # -- reading the pool ---------------------------------------------------------------------------------------

    def start_chunk(
        self, heads: Any, row: jax.Array, start: jax.Array, stop: jax.Array, slot: jax.Array
    ) -> None:
        self._for_each_piece(lambda copy: copy.start(), heads, row, start, stop, slot)

    def wait_chunk(
        self, heads: Any, row: jax.Array, start: jax.Array, stop: jax.Array, slot: jax.Array
    ) -> None:
        self._for_each_piece(wait, heads, row, start, stop, slot)

    def _for_each_piece(
        self,
        act: Callable[[Any], None],
        heads: Any,
        row: jax.Array,
        start: jax.Array,
        stop: jax.Array,
        slot: jax.Array,
    ) -> None:
        """`act` on each DMA that brings positions start … min(stop, start + chunk) into kv[slot]: whole units, and
        the rest in pieces of powers of two, so that hardly more is read than is needed."""
        p, r = self.plan, self.refs
        sem = r.kv_sem.at[slot]
        needed = jnp.clip(stop - start, 0, p.chunk)
        full = div(needed, p.unit)

        def piece(unit: jax.Array, offset: jax.Array | int, size: int) -> None:
            position = start + unit * p.unit
            source = self.offset_in_block(position, p.unit) + offset
            target = pl.multiple_of(unit * p.unit + offset, size)
            source = source if isinstance(source, int) else pl.multiple_of(source, size)
            act(
                pltpu.make_async_copy(
                    r.pool.at[self.block_of(row, position), heads, pl.ds(source, size)],
                    r.kv.at[slot, pl.ds(0, heads.size), pl.ds(target, size)],
                    sem,
                )
            )

        def whole_unit(unit: jax.Array, _: None) -> None:
            piece(unit, 0, p.unit)

        lax.fori_loop(0, full, whole_unit, None)
        rest = align(needed - full * p.unit + (READ_ROWS - 1), READ_ROWS)
        size = p.unit
        while size >= READ_ROWS:

            @pl.when((rest & size) != 0)
            def _(size: int = size) -> None:
                piece(full, 0 if size == p.unit else rest & ~(2 * size - 1), size)

            size //= 2
        if p.quantized:

            def scales(unit: jax.Array, _: None) -> None:
                position = start + unit * p.unit
                act(
                    pltpu.make_async_copy(
                        r.scales.at[self.block_of(row, position), heads, :, self.scale_lanes(position)],
                        r.kv_scales.at[slot, unit, pl.ds(0, heads.size)],
                        sem,
                    )
                )

            lax.fori_loop(0, div(needed + p.unit - 1, p.unit), scales, None)

    def clear_from(self, slot: jax.Array, num_heads: int, first: jax.Array, stop: int | jax.Array) -> None:
        """Zero kv[slot] from token `first` to `stop`, a multiple of a window: nothing that was not written may reach
        a product, for 0 · NaN is NaN."""
        rows = self.plan.window_rows
        zeros = jnp.zeros((num_heads, rows, self.plan.L), self.plan.kv_dtype)
        window = div(first, rows)

        @pl.when(mod(first, rows) != 0)
        def _() -> None:
            span = pl.ds(pl.multiple_of(window * rows, rows), rows)
            old = self.refs.kv[slot, pl.ds(0, num_heads), span]
            keep = window * rows + iota(old.shape, 1) < first
            self.refs.kv[slot, pl.ds(0, num_heads), span] = select(keep, old, zeros)

        def clear(window: jax.Array, _: None) -> None:
            span = pl.ds(pl.multiple_of(window * rows, rows), rows)
            self.refs.kv[slot, pl.ds(0, num_heads), span] = zeros

        lax.fori_loop(div(first + rows - 1, rows), div(stop, rows), clear, None)

    def scale_rows(
        self, slot: jax.Array, first_unit: Any, num_units: int, heads: Any
    ) -> tuple[jax.Array, ...]:
        """Scales of K and of V, [heads, 1, tokens] each."""
        unit = self.plan.unit
        units = [self.refs.kv_scales[slot, first_unit + i, heads][..., :unit] for i in range(num_units)]
        scales = units[0] if num_units == 1 else jnp.concatenate(units, axis=-1)
        return scales[:, :1], scales[:, 1:]


# -- arithmetic -------------------------------------------------------------------------------------------------


def softmax_update(
    plan: Plan,
    scores: jax.Array,
    visible: jax.Array,
    values: jax.Array,
    scales: tuple[jax.Array, ...] | None,
    state: tuple[jax.Array, jax.Array, jax.Array],
    product: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """FlashAttention's update of (peak, total, accumulator) with one tile of scores [..., queries, tokens]."""
    peak, total, acc = state
    scores = scores * plan.scale
    if scales is not None:
        scores = scores * scales[0]
    if plan.soft_cap is not None:
        scores = plan.soft_cap * jnp.tanh(scores / plan.soft_cap)
    scores = jnp.where(visible, scores, MASKED)
    new_peak = jnp.maximum(peak[..., :1], jnp.max(scores, axis=-1, keepdims=True))
    rescale = jnp.exp(peak[..., :1] - new_peak)
    weights = jnp.where(visible, jnp.exp(scores - new_peak), 0.0)
    new_total = total[..., :1] * rescale + jnp.sum(weights, axis=-1, keepdims=True)
    if scales is not None:
        weights = jnp.where(visible, weights * scales[1], 0.0)
    acc = acc * rescale + product(weights.astype(values.dtype), values)
    return jnp.broadcast_to(new_peak, peak.shape), jnp.broadcast_to(new_total, total.shape), acc


def is_visible(kv_positions: jax.Array, q_positions: jax.Array, sliding_window: int | None) -> jax.Array:
    visible = kv_positions <= q_positions
    if sliding_window is not None:
        visible &= kv_positions > q_positions - sliding_window
    return visible


def normalize(acc: jax.Array, total: jax.Array) -> jax.Array:
    return acc / jnp.where(total > 0, total, 1.0)


def dot(a: jax.Array, b: jax.Array, axis: int, precision: lax.Precision) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision, preferred_element_type=jnp.float32)


def batched_dot(a: jax.Array, b: jax.Array, axis: int, precision: lax.Precision) -> jax.Array:
    return lax.dot_general(
        a, b, (((2,), (axis,)), ((0,), (0,))), precision, preferred_element_type=jnp.float32
    )


def to_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int32).astype(jnp.float32) if x.dtype == jnp.int8 else x.astype(jnp.float32)


def from_float32(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(jnp.int32).astype(jnp.int8) if dtype == jnp.int8 else x.astype(dtype)


def convert(x: jax.Array, dtype: Any) -> jax.Array:
    """What is stored in a pool as an operand of the matrix unit."""
    return x if x.dtype == dtype else to_float32(x).astype(dtype)


def select(mask: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """In 32 bits: masks of packed dtypes do not exist on every chip."""
    return from_float32(jnp.where(mask, to_float32(a), to_float32(b)), a.dtype)


# -- small things -----------------------------------------------------------------------------------------------


def pipeline(
    first: Item,
    alive: Callable[[Item], jax.Array],
    advance: Callable[[Item], Item],
    prefetch: Callable[[Item, jax.Array], None],
    consume: Callable[[Item, jax.Array], None],
) -> Item:
    """Work through items with two buffers: while one is used, the next is on its way. Returns the item that is no
    longer alive."""
    pl.when(alive(first))(lambda: prefetch(first, jnp.int32(0)))

    def body(carry: tuple[Item, jax.Array]) -> tuple[Item, jax.Array]:
        item, slot = carry
        following = advance(item)
        pl.when(alive(following))(lambda: prefetch(following, 1 - slot))
        consume(item, slot)
        return following, 1 - slot

    return lax.while_loop(lambda carry: alive(carry[0]), body, (first, jnp.int32(0)))[0]


def wait(copy: Any) -> None:
    copy.wait()


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


# Sizes are powers of two: shifts and masks, where a division would be a dozen scalar instructions.


def div(x: Any, n: int) -> Any:
    return (
        lax.shift_right_arithmetic(x, jnp.int32(n.bit_length() - 1)) if isinstance(x, jax.Array) else x // n
    )


def mod(x: jax.Array, n: int) -> jax.Array:
    return x & (n - 1)


def align(x: jax.Array, n: int) -> jax.Array:
    return x & ~(n - 1)
