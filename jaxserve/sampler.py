"""Logits → tokens and log-probabilities: pure functions inside the jitted step; every option is data.

Nothing here sorts the vocabulary. A row's top-k and top-p sets are found by a radix select over the bits of its
logits, the candidates of beams one after the other. A token is drawn by inverting the cumulative distribution
with one uniform number per row, so that a draw is a function of (seed, choice, position) and the row's own
logits alone. Work that no row asks for is skipped at run time.

On several chips each has the logits of its share of the vocabulary (`VocabShard`); what a row needs of the others is
a few numbers, or their best candidates. [S, V] below means a chip's share of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p

from jaxserve.logits_processors import ProcessorInputs, process_logits
from jaxserve.sampling_params import GREEDY_EPSILON
from jaxserve.sharding import VOCAB_GROUP, VOCAB_ROWS, VocabShard, count_true, first_true

NUM_BEAM_CANDIDATES = 256  # twice the widest beam search
NO_TOKEN = -1  # sampled where no token is possible
FLOAT_BITS = 32
SUM_GROUP = 32  # neighbours whose running sums are taken directly
ROW_GROUP = 16  # rows that [S, V] intermediates exist of at a time, on each device among which V is split
USED_ROW_GROUP = 8  # where rows that are not in use are skipped, on a CPU: few that are computed in vain


class SamplingInputs(NamedTuple):
    """Per row, [S] each. `position`: that of the token to be sampled. `num_logprobs`: −1 means none."""

    temperature: jax.Array  # float32; below GREEDY_EPSILON: greedy
    top_p: jax.Array  # float32
    min_p: jax.Array  # float32
    top_k: jax.Array  # int32; 0: off
    seed_low: jax.Array  # uint32
    seed_high: jax.Array  # uint32
    choice: jax.Array  # int32
    position: jax.Array  # int32
    num_logprobs: jax.Array  # int32
    num_candidates: jax.Array  # int32; of a beam; 0: it is none
    processors: ProcessorInputs


class SampleOutputs(NamedTuple):
    """int32 throughout, floats as their bits: one array for all that a branch returns is one kernel to compile.

    Attributes:
        token_ids: [S]; NO_TOKEN where the masks leave none.
        logprobs: [S, 2 + 2 · L] of `logprobs_of`; meaningful in rows that asked for logprobs.
        candidates: [S, 3 · C]; the likeliest continuations of beams, descending: token ids, processed
            log-probabilities (−inf where there are no more), raw ones. C is NUM_BEAM_CANDIDATES, or V if that is less.
    """

    token_ids: jax.Array
    logprobs: jax.Array
    candidates: jax.Array


def sample(
    logits: jax.Array,
    num_rows: jax.Array | int,
    read: Callable[[], SamplingInputs],
    vocab: VocabShard,
    *,
    max_logprobs: int,
    processed_logprobs: bool,
) -> SampleOutputs:
    """Draw one token per row.

    Args:
        logits: [S or more, V] float32; a chip's padding need not mean anything.
        num_rows: [] int32; how many rows are in use, which come first; those of others need not mean anything. A
            number, if they are computed as well.
        read: takes the inputs out of the step's buffer. A branch does so for itself: of all that is read before it XLA
            makes arrays, one kernel each.
        max_logprobs: L, static.
        processed_logprobs: report the distribution that was sampled from instead of the raw one; static.
    """
    max_candidates = min(NUM_BEAM_CANDIDATES, vocab.size)
    inputs = read()
    S = inputs.temperature.shape[0]

    def draw() -> tuple[jax.Array, jax.Array | None, jax.Array]:
        inputs = read()
        all_filters = _filters(inputs, vocab)

        def process(rows: _Rows) -> tuple[jax.Array, jax.Array]:
            raw, temperature = vocab.mask_padding(rows.of(logits)), rows.of(all_filters.temperature)
            scaled = raw / temperature[:, None]
            return raw, process_logits(scaled, raw, temperature, rows.first, inputs.processors, vocab)

        # all at once where an accelerator would stop for each group: how many rows are changed is data
        processed = process(_Rows(0, S)) if isinstance(num_rows, int) else None

        def draw_rows(rows: _Rows) -> tuple[jax.Array, jax.Array | None, jax.Array]:
            filters = jax.tree.map(rows.of, all_filters)
            raw, scaled = process(rows) if processed is None else map(rows.of, processed)
            keep, candidates = _filtered(scaled, raw, filters, vocab, max_candidates)
            drawn = _draw(scaled, keep, filters.uniform, vocab)
            token_ids = jnp.where(filters.random, drawn, vocab.argmax(scaled))
            possible = vocab.max(scaled)[:, 0] > -jnp.inf
            # what a branch returns is copied: not [S, V] for nothing
            reported = _masked(scaled, keep) if processed_logprobs else None
            return jnp.where(possible, token_ids, NO_TOKEN), reported, candidates

        return _by_row_groups(draw_rows, S, num_rows, vocab)

    def greedy() -> tuple[jax.Array, jax.Array | None, jax.Array]:
        def take_largest(rows: _Rows) -> jax.Array:
            return vocab.argmax(vocab.mask_padding(rows.of(logits)))

        everything = isinstance(num_rows, int)  # at once: it needs no room of its own
        token_ids = (
            take_largest(_Rows(0, S)) if everything else _by_row_groups(take_largest, S, num_rows, vocab)
        )
        reported = logits[:S] if processed_logprobs else None
        return token_ids, reported, jnp.zeros((S, 3 * max_candidates), jnp.int32)

    wanted = jnp.any(inputs.temperature >= GREEDY_EPSILON) | (inputs.processors.num_rows > 0)
    token_ids, processed, candidates = lax.cond(wanted, draw, greedy)
    reported = logits if processed is None else processed

    def rated() -> jax.Array:
        def rate(rows: _Rows) -> jax.Array:
            own = vocab.mask_padding(rows.of(reported))
            return logprobs_of(own, rows.of(jnp.maximum(token_ids, 0)), vocab, max_logprobs)

        ratings: jax.Array = _by_row_groups(rate, S, num_rows, vocab)
        return ratings

    def unrated() -> jax.Array:
        return jnp.zeros((S, 2 + 2 * max_logprobs), jnp.int32)

    logprobs = lax.cond(jnp.any(inputs.num_logprobs >= 0), rated, unrated)
    return SampleOutputs(token_ids, logprobs, candidates)


class _Filters(NamedTuple):
    """What becomes of a row's scaled logits, [S] each. Greedy rows (not `random`) have temperature 1 and no filters.

    Attributes:
        top_k: V where it is off.
        num_candidates: how many are wanted, if it is a beam's; else 0.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array
    random: jax.Array
    uniform: jax.Array
    num_candidates: jax.Array


def _filters(inputs: SamplingInputs, vocab: VocabShard) -> _Filters:
    random = inputs.temperature >= GREEDY_EPSILON
    return _Filters(
        temperature=jnp.where(random, inputs.temperature, 1.0),
        top_p=jnp.where(random, inputs.top_p, 1.0),
        min_p=jnp.where(random, inputs.min_p, 0.0),
        top_k=jnp.where(random & (inputs.top_k > 0) & (inputs.top_k < vocab.size), inputs.top_k, vocab.size),
        random=random,
        uniform=_uniforms(inputs),
        num_candidates=inputs.num_candidates,
    )


class _Rows(NamedTuple):
    """`size` of a step's rows, from `first` on."""

    first: jax.Array | int
    size: int

    def of(self, x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, self.first, self.size)


def _by_row_groups(
    function: Callable[[_Rows], Any], num_rows: int, num_used: jax.Array | int, vocab: VocabShard
) -> Any:
    """`function` of a few rows at a time, as far as rows are in use: what it needs for itself is several
    times [S, V], and all rows together would take that from the KV pool. Of groups that are not in use zeros.
    Several devices take more rows at a time: each holds less of a row, and every group waits for all of them often."""
    group = ROW_GROUP * vocab.group.size if isinstance(num_used, int) else USED_ROW_GROUP
    if num_rows <= group and isinstance(num_used, int):
        return function(_Rows(0, num_rows))
    size = math.gcd(num_rows, group)

    def compute(g: jax.Array, out: Any) -> Any:
        first = g * size
        rows = function(_Rows(first, size))
        return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, first, axis=0), out, rows)

    one = jax.eval_shape(lambda: function(_Rows(0, size)))
    out = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), one)
    return lax.fori_loop(0, (num_used + size - 1) // size, compute, out)


def _filtered(
    scaled: jax.Array, logits: jax.Array, filters: _Filters, vocab: VocabShard, max_candidates: int
) -> tuple[jax.Array, jax.Array]:
    """[S, V] mask of the tokens that may be drawn: top-k, top-p, min-p in this order; and the candidates of beams.
    `scaled`: processed and divided by the temperature."""
    peak = vocab.max(scaled)
    filtered = jnp.any((filters.top_k < vocab.size) | (filters.top_p < 1.0))
    keep = lax.cond(
        filtered,
        lambda: _top_k_top_p_mask(scaled, peak, filters.top_k, filters.top_p, vocab),
        lambda: jnp.ones(scaled.shape, bool),
    )
    most = jnp.max(filters.num_candidates)

    def ranked() -> jax.Array:
        values, ids = vocab.top_k(scaled, max_candidates, partial(likeliest, count=most))
        raw = vocab.take(logits, ids) - vocab.logsumexp(logits)
        return jnp.concatenate([ids, _bits(values), _bits(raw)], axis=1)

    candidates = lax.cond(most > 0, ranked, lambda: jnp.zeros((len(scaled), 3 * max_candidates), jnp.int32))
    return keep & (scaled >= peak + jnp.log(filters.min_p)[:, None]), candidates


def _masked(scaled: jax.Array, keep: jax.Array) -> jax.Array:
    return jnp.where(keep, scaled, -jnp.inf)


def _top_k_top_p_mask(
    scaled: jax.Array, peak: jax.Array, top_k: jax.Array, top_p: jax.Array, vocab: VocabShard
) -> jax.Array:
    """[S, V] mask of the `top_k` likeliest tokens and, within them, of the smallest set of likeliest tokens
    with a mass of at least `top_p`; the lowest ids win a tie."""
    keys = _sortable(scaled)
    in_k = _smallest_set(keys, None, top_k[:, None].astype(jnp.float32), (top_k < vocab.size)[:, None], vocab)
    weights = jnp.where(in_k, jnp.exp(scaled - peak), 0.0)
    # top-p cuts what top-k left; without top-k that is everything
    in_p = _smallest_set(keys, weights, top_p[:, None] * vocab.sum(weights), (top_p < 1.0)[:, None], vocab)
    return in_k & (in_p | (top_p >= 1.0)[:, None])


_Search = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _smallest_set(
    keys: jax.Array, weights: jax.Array | None, target: jax.Array, wanted: jax.Array, vocab: VocabShard
) -> jax.Array:
    """[S, V] mask of the largest keys, the lowest ids of equals, with a sum of `weights` (or a number) that reaches
    `target` [S, 1]; all of them where that is more than there is. Only rows that are `wanted` [S, 1] are waited for.

    The target is at least the smallest float, so that the largest key is always among them. On several chips every
    number that a loop asks is the same on all: they sum up inside it.

    A radix select that settles a bit in each pass over the vocabulary: of the least key, then, if another has the same
    key, of the last id. It is exact for every set, and small: a `top_k` of 1,024 saves a CPU 2 ms of a step of 16 rows,
    and takes most of the time in which a program is compiled for a TPU.
    """

    target = jnp.maximum(target, jnp.finfo(jnp.float32).tiny)

    def total(mask: jax.Array) -> jax.Array:
        return vocab.sum(jnp.where(mask, 1.0 if weights is None else weights, 0.0))

    def unsettled(carry: _Search) -> jax.Array:
        i, _, reached, missed = carry  # a number tells when no two keys are left to choose from
        return (i < FLOAT_BITS) & jnp.any(wanted if weights is not None else wanted & (reached - missed > 1))

    def settle_bit(carry: _Search) -> _Search:
        i, least, reached, missed = carry
        higher = least | (jnp.uint32(1 << (FLOAT_BITS - 1)) >> i.astype(jnp.uint32))
        found = total(keys >= higher)
        ok = found >= target
        return (
            i + 1,
            jnp.where(ok, higher, least),
            jnp.where(ok, found, reached),
            jnp.where(ok, missed, found),
        )

    zeros = jnp.zeros(target.shape)
    begin = jnp.int32(0), zeros.astype(jnp.uint32), jnp.full_like(zeros, vocab.size), zeros
    _, least, _, _ = lax.while_loop(unsettled, settle_bit, begin)
    above, equal, ids = keys > least, keys == least, vocab.ids()
    id_bits = vocab.size.bit_length()

    def settle_id(i: jax.Array, last: jax.Array) -> jax.Array:
        higher = last | (jnp.int32(1 << (id_bits - 1)) >> i)
        return jnp.where(total(above | (equal & (ids < higher))) >= target, last, higher)

    tied = jnp.any(wanted & (vocab.count(equal) > 1))
    start = jnp.where(tied, jnp.zeros_like(least, jnp.int32), vocab.size)
    last = lax.fori_loop(0, jnp.where(tied, id_bits, 0), settle_id, start)
    return above | (equal & (ids <= last))


def _sortable(x: jax.Array) -> jax.Array:
    """float32 → uint32 that sorts the same way; −0 equals 0."""
    bits = jnp.where(x == 0, jnp.uint32(0), lax.bitcast_convert_type(x, jnp.uint32))
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _uniforms(inputs: SamplingInputs) -> jax.Array:
    """[S] in [0, 1): Threefry-2x32 (Salmon et al. 2011) with the seed as key and (choice, position) as counter."""
    counter = (inputs.choice.astype(jnp.uint32), inputs.position.astype(jnp.uint32))
    bits, _ = threefry2x32_p.bind(inputs.seed_high, inputs.seed_low, *counter)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _draw(scaled: jax.Array, keep: jax.Array, uniforms: jax.Array, vocab: VocabShard) -> jax.Array:
    """[S] token ids: the first whose cumulative probability exceeds the row's uniform number.

    The vocabulary is taken column by column of a [VOCAB_ROWS, columns] table: columns are summed first, and
    only the chosen column is then summed token by token. A chip has whole rows of it.
    """
    S, V = scaled.shape
    num_columns = vocab.num_columns
    masked = _masked(scaled, keep)
    weights = jnp.exp(masked - vocab.max(masked))
    num_rows = VOCAB_ROWS if vocab.group.size == 1 else V // num_columns
    # token id = row * num_columns + column; summing over rows is the direction that vectorizes
    table = jnp.pad(weights, ((0, 0), (0, num_rows * num_columns - V))).reshape(S, num_rows, num_columns)
    cumulative = _running_sums(vocab.group.sum(jnp.sum(table, axis=1)))  # [S, columns]
    target = uniforms * cumulative[:, -1]
    column = count_true(cumulative <= target[:, None])
    column = jnp.minimum(column, num_columns - 1)
    before = jnp.where(
        column > 0, jnp.take_along_axis(cumulative, jnp.maximum(column - 1, 0)[:, None], 1)[:, 0], 0.0
    )
    members = jnp.take_along_axis(table, column[:, None, None], axis=2)[:, :, 0]
    members = vocab.group.gather(members, axis=1)  # [S, rows of all chips]
    within = _running_sums(members)
    row = count_true(within <= (target - before)[:, None])
    # the two sums round differently: never step past the last token that can be drawn
    last_row = members.shape[1] - 1 - jnp.argmax(members[:, ::-1] > 0, axis=-1)
    return (jnp.minimum(row, last_row) * num_columns + column).astype(jnp.int32)


def _running_sums(x: jax.Array) -> jax.Array:
    """[S, n] → the sum of each element and those before it: within groups, then of the groups. Of `cumsum` XLA:CPU
    makes a tree of windows, which takes long to compile."""
    S, n = x.shape
    num_groups = -(-n // SUM_GROUP)
    table = jnp.pad(x, ((0, 0), (0, num_groups * SUM_GROUP - n))).reshape(S, num_groups, SUM_GROUP)
    within = _sums_up_to(table, jnp.less_equal)
    before = _sums_up_to(within[:, :, -1], jnp.less)
    return (within + before[:, :, None]).reshape(S, -1)[:, :n]


def _sums_up_to(x: jax.Array, counts: Callable[..., jax.Array]) -> jax.Array:
    """[…, n]: element i is the sum of those elements j for which `counts(j, i)`."""
    index = jnp.arange(x.shape[-1])
    return jnp.sum(jnp.where(counts(index[:, None], index), x[..., None], 0.0), axis=-2)


def logprobs_of(logits: jax.Array, token_ids: jax.Array, vocab: VocabShard, max_logprobs: int) -> jax.Array:
    """[S, 2 + 2 · L] int32 of `token_ids` [S]: bits of the logprob (the natural logarithm of softmax), rank, the L
    likeliest ids, bits of their logprobs."""
    normalizer = vocab.logsumexp(logits)
    chosen = vocab.take(logits, token_ids[:, None])
    rank = 1 + vocab.count(logits > chosen)
    k = min(max_logprobs, vocab.size)
    values, ids = vocab.top_k(logits, k, top_few)
    pad = ((0, 0), (0, max_logprobs - k))
    top = jnp.pad(values - normalizer, pad, constant_values=-jnp.inf)
    return jnp.concatenate([_bits(chosen - normalizer), rank, jnp.pad(ids, pad), _bits(top)], axis=1)


def _bits(floats: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(floats, jnp.int32)


def top_few(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(values, ids) of the k largest of each row, [S, k] each, as `lax.top_k`, in a third of its time for a small k
    on CPU.

    The k largest are in the k groups of neighbours with the largest members: were one of them elsewhere, each of
    these groups would hold one that goes before it.
    """
    S, V = x.shape
    num_groups = -(-V // VOCAB_GROUP)
    if num_groups <= k:
        values, ids = lax.top_k(x, k)
        return values, ids.astype(jnp.int32)
    padding = ((0, 0), (0, num_groups * VOCAB_GROUP - V))
    table = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(S, num_groups, VOCAB_GROUP)
    groups = lax.optimization_barrier(lax.top_k(jnp.max(table, axis=-1), k)[1])
    groups = jnp.sort(groups, axis=-1).astype(jnp.int32)  # so that of equals the lowest id is the first one
    members = jnp.take_along_axis(table, groups[:, :, None], axis=1, mode="promise_in_bounds")
    # one by one: XLA:GPU cannot take apart a top_k whose results go into one barrier
    values, index = map(lax.optimization_barrier, lax.top_k(members.reshape(S, k * VOCAB_GROUP), k))
    group = jnp.take_along_axis(groups, index // VOCAB_GROUP, axis=-1, mode="promise_in_bounds")
    return values, group * VOCAB_GROUP + index % VOCAB_GROUP


def likeliest(x: jax.Array, k: int, *, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(values, ids) of the `count` largest of each row, [S, k] each, as `lax.top_k`; behind them −inf and 0.
    Of elements that are −inf the ids mean nothing.

    One after the other: the largest of what comes behind the one before it. Only the largest of each group of
    neighbours are looked at, and the group from which one was taken. So it costs what is wanted, and next to nothing
    to compile.
    """
    S, V = x.shape
    num_groups = -(-V // VOCAB_GROUP)
    padding = ((0, 0), (0, num_groups * VOCAB_GROUP - V))
    table = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(S, num_groups, VOCAB_GROUP)
    inside, groups = jnp.arange(VOCAB_GROUP, dtype=jnp.int32), jnp.arange(num_groups, dtype=jnp.int32)

    def take_next(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peaks, last, last_id, values, ids = carry  # peaks: of each group's members behind the last one taken
        value = jnp.max(peaks, axis=-1, keepdims=True)
        group = jnp.minimum(first_true(peaks == value), num_groups - 1)[:, None]
        members = jnp.take_along_axis(table, group[:, :, None], axis=1, mode="promise_in_bounds")[:, 0]
        member_ids = group * VOCAB_GROUP + inside
        left = (members < last) | ((members == last) & (member_ids > last_id))
        taken = jnp.minimum(first_true(left & (members == value)), VOCAB_GROUP - 1)[:, None]
        left &= inside != taken
        rest = jnp.max(jnp.where(left, members, -jnp.inf), axis=-1, keepdims=True)
        token_id = group * VOCAB_GROUP + taken
        return (
            jnp.where(groups == group, rest, peaks),
            value,
            token_id,
            lax.dynamic_update_slice(values, value, (0, i)),
            lax.dynamic_update_slice(ids, token_id, (0, i)),
        )

    first = jnp.max(table, axis=-1), jnp.full((S, 1), jnp.inf), jnp.full((S, 1), -1, jnp.int32)
    found = jnp.full((S, k), -jnp.inf), jnp.zeros((S, k), jnp.int32)
    *_, values, ids = lax.fori_loop(0, jnp.minimum(count, k), take_next, (*first, *found))
    return values, jnp.minimum(ids, V - 1)
