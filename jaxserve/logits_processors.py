"""Logits → logits: what requests ask for before a token is chosen. Pure functions inside the jitted step.

Rows are taken one by one, and only those that ask for something: a batch in which nobody does pays nothing.
What a request fixes once (biases, masks) lies in per-slot tables on the device (`slot_tables`); what it has said so far
is read from the token pool through its block table, so no state has to follow forks, preemption or prefix hits.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.sharding import VocabShard, count_true

TOKEN_CHUNK = 512  # tokens of a row counted at a time
BIAS_CHUNK = 64  # bias entries added at a time
MAX_LOGIT = 1e30  # a tiny penalty must not make infinities that cancel to NaN
BITS = 32


class SlotTables(NamedTuple):
    """What requests fix, one row a slot; slot 0 is neutral.

    Attributes:
        bias_ids: [slots, E] int32; token ids.
        bias_values: [slots, E] float32; added to their logits, −inf to forbid them.
        masks: [slots, ceil(V / 32)] uint32; bit v % 32 of word v // 32: token v is possible.
    """

    bias_ids: jax.Array
    bias_values: jax.Array
    masks: jax.Array


class ProcessorInputs(NamedTuple):
    """Which rows are changed, and how. All [S] where nothing else is said.

    Attributes:
        rows: int32; the rows that are changed, ascending, first.
        num_rows: [] int32; how many.
        slot: int32; of the tables.
        num_biases: int32; entries of the table that count.
        prompt_len: int32; P of the row's sequence.
        num_counted: int32; tokens known, this step's included, where there are penalties, else 0.
        repetition, frequency, presence: float32.
        normalize: bool; the row is a beam's: its logits become log-probabilities first.
        block_tables: [S, M] int32.
        token_pool: [N, B] int32; the token of every slot of the KV pool.
    """

    rows: jax.Array
    num_rows: jax.Array
    slot: jax.Array
    num_biases: jax.Array
    prompt_len: jax.Array
    num_counted: jax.Array
    repetition: jax.Array
    frequency: jax.Array
    presence: jax.Array
    normalize: jax.Array
    block_tables: jax.Array
    token_pool: jax.Array
    tables: SlotTables


def process_logits(
    out: jax.Array,
    logits: jax.Array,
    temperature: jax.Array,
    first: jax.Array | int,
    inputs: ProcessorInputs,
    vocab: VocabShard,
) -> jax.Array:
    """Replace the changed rows of `out` by their processed logits, divided by their temperature.

    Args:
        out: [R, V] float32; `logits` divided by `temperature`.
        logits: [R, V] float32; of R of the step's S rows.
        temperature: [R] float32, positive.
        first: the first of these rows in the step.
        inputs: of all rows.
    """
    changed = jnp.arange(inputs.rows.shape[0], dtype=jnp.int32) < inputs.num_rows
    begin = count_true(changed & (inputs.rows < first))
    end = count_true(changed & (inputs.rows < first + len(out)))

    def change(i: jax.Array, out: jax.Array) -> jax.Array:
        r = inputs.rows[i]
        row = logits[r - first]
        row = jnp.where(inputs.normalize[r], row - vocab.logsumexp(row)[0], row)
        row = _add_biases(row, inputs, r, vocab)
        row = jnp.where(_expand(inputs.tables.masks[inputs.slot[r]], vocab), row, -jnp.inf)
        row = _penalize(row, inputs, r, vocab)
        return lax.dynamic_update_slice_in_dim(out, (row / temperature[r - first])[None], r - first, axis=0)

    processed: jax.Array = lax.fori_loop(begin, end, change, out)
    return processed


def _add_biases(row: jax.Array, inputs: ProcessorInputs, r: jax.Array, vocab: VocabShard) -> jax.Array:
    ids, values = (table[inputs.slot[r]] for table in (inputs.tables.bias_ids, inputs.tables.bias_values))
    count = inputs.num_biases[r]

    def add(c: jax.Array, row: jax.Array) -> jax.Array:
        start = c * BIAS_CHUNK
        chunk_ids = lax.dynamic_slice_in_dim(ids, start, BIAS_CHUNK)
        chunk_values = lax.dynamic_slice_in_dim(values, start, BIAS_CHUNK)
        counts = start + jnp.arange(BIAS_CHUNK, dtype=jnp.int32) < count
        index = vocab.local(chunk_ids, elsewhere=row.shape[0])
        return row.at[jnp.where(counts, index, row.shape[0])].add(chunk_values, mode="drop")

    biased: jax.Array = lax.fori_loop(0, (count + BIAS_CHUNK - 1) // BIAS_CHUNK, add, row)
    return biased


def _expand(words: jax.Array, vocab: VocabShard) -> jax.Array:
    """Packed bits [ceil(V / 32)] → bool [V]."""
    num_tokens = vocab.num_local
    if vocab.group.size > 1:
        num_words = num_tokens // BITS + 2  # a share may begin and end within a word
        padded = jnp.pad(words, (0, num_words + vocab.group.size * num_tokens // BITS - len(words)))
        words = lax.dynamic_slice_in_dim(padded, vocab.first // BITS, num_words)
    bits = (words[:, None] >> jnp.arange(BITS, dtype=jnp.uint32)) & jnp.uint32(1)
    flat = bits.reshape(-1)
    if vocab.group.size > 1:
        flat = lax.dynamic_slice_in_dim(flat, vocab.first % BITS, num_tokens)
    expanded: jax.Array = flat[:num_tokens].astype(bool)
    return expanded


def _penalize(row: jax.Array, inputs: ProcessorInputs, r: jax.Array, vocab: VocabShard) -> jax.Array:
    """Repetition (Keskar et al. 2019, over prompt and output), then frequency and presence (over the output)."""
    in_prompt, in_output = _count_tokens(inputs, r, vocab)
    factor = jnp.where(in_prompt + in_output > 0, inputs.repetition[r], 1.0)
    row = jnp.where(row > 0, row / factor, row * factor)
    # −inf · factor stays −inf; everything else stays finite
    row = jnp.where(jnp.isneginf(row), row, jnp.clip(row, -MAX_LOGIT, MAX_LOGIT))
    said = (in_output > 0).astype(row.dtype)
    return row - inputs.frequency[r] * in_output.astype(row.dtype) - inputs.presence[r] * said


def _count_tokens(inputs: ProcessorInputs, r: jax.Array, vocab: VocabShard) -> tuple[jax.Array, jax.Array]:
    """How often each token is in the row's prompt and in its output, int32 [V] each."""
    num_tokens = vocab.num_local
    B, M = inputs.token_pool.shape[1], inputs.block_tables.shape[1]
    blocks_per_chunk = max(1, min(TOKEN_CHUNK // B, M))
    chunk = blocks_per_chunk * B
    table = jnp.pad(inputs.block_tables[r], (0, -M % blocks_per_chunk))
    num_counted, prompt_len = inputs.num_counted[r], inputs.prompt_len[r]

    def count(c: jax.Array, counts: jax.Array) -> jax.Array:
        blocks = lax.dynamic_slice_in_dim(table, c * blocks_per_chunk, blocks_per_chunk)
        token_ids = inputs.token_pool[blocks].reshape(-1)
        positions = c * chunk + jnp.arange(chunk, dtype=jnp.int32)
        index = vocab.local(token_ids, elsewhere=2 * num_tokens)
        index = jnp.where(positions < prompt_len, index, index + num_tokens)
        index = jnp.where(positions < num_counted, index, 2 * num_tokens)
        return counts.at[index].add(1, mode="drop")

    counts = jnp.zeros(2 * num_tokens, jnp.int32)
    counts = lax.fori_loop(0, (num_counted + chunk - 1) // chunk, count, counts)
    return counts[:num_tokens], counts[num_tokens:]


def write_tokens(token_pool: jax.Array, token_ids: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    """Put this step's tokens [T] into the pool. Padding tokens go to the null block."""
    shape = token_pool.shape
    return token_pool.reshape(-1).at[slot_mapping].set(token_ids, mode="promise_in_bounds").reshape(shape)
