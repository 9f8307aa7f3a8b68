"""Ragged batches over scattered blocks, what attention should make of them, and how to draw them: what the tests of all
kernels share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxserve.kernels import reference
from jaxserve.kernels.metadata import MAX_UNTILED_TOKENS, QUERY_TILE, AttentionMetadata
from jaxserve.kernels.reference import QuantizedPool, quantize_kv

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}  # of the largest output of a token


@dataclasses.dataclass(frozen=True)
class Variant:
    """What one compiled kernel is for."""

    T: int
    B: int
    H: int
    K: int
    D: int
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    sliding_window: int | None = None
    soft_cap: float | None = None
    decode_only: bool = False
    num_cores: int = 1
    max_context: int = 160
    S: int = 6
    row_lengths: tuple[int, ...] = (
        1,
        1,
        2,
        3,
        7,
        16,
        17,
        30,
    )  # tokens of a row in a step; ignored by decode_only

    def __str__(self) -> str:
        """For the ids of tests."""
        kind = "decode" if self.decode_only else "mixed"
        window = f"-window{self.sliding_window}" if self.sliding_window else ""
        cap = "-cap" if self.soft_cap else ""
        cores = f"-cores{self.num_cores}" if self.num_cores > 1 else ""
        shape = f"B{self.B}-H{self.H}-K{self.K}-D{self.D}"
        return f"{kind}-{shape}-{self.dtype}-{self.kv_dtype}{window}{cap}{cores}"

    @property
    def M(self) -> int:  # noqa: N802
        return -(-self.max_context // self.B)

    @property
    def tiled(self) -> bool:
        """Whether rows of several tokens are attended in tiles, where a kernel asks for them."""
        return self.T > MAX_UNTILED_TOKENS and not self.decode_only

    @property
    def quantized(self) -> bool:
        return jnp.dtype(self.kv_dtype).itemsize == 1


class Case:
    """A batch of rows (tokens computed before, tokens of this step), and what attention should make of it."""

    def __init__(self, variant: Variant, rows: list[tuple[int, int]], seed: int, shared: int = 0) -> None:
        """`shared`: blocks at the start that all rows have in common, as far as their context fills them."""
        self.variant = v = variant
        self.rows = sorted(rows, key=lambda row: row[1] > 1)
        self.num_tokens = sum(n for _, n in rows)
        rng = np.random.RandomState(seed)
        self.num_blocks = (v.S + 1) * v.M + 4  # more than are needed: the tables have holes
        self.tables = self._block_tables(rng, shared)
        self.metadata = self._metadata()
        self.q, self.k, self.v = (
            jnp.asarray(rng.randn(v.T, heads, v.D), v.dtype) for heads in (v.H, v.K, v.K)
        )
        plain = rng.randn(self.num_blocks, 2, v.K, v.B, v.D)
        self.before = self._pool(jnp.asarray(plain, jnp.float32))
        self.after, expected = meaning(v)(self.before, self.q, self.k, self.v, self.metadata)
        self.expected = np.asarray(expected)[: self.num_tokens]

    def _block_tables(self, rng: np.random.RandomState, shared: int) -> np.ndarray:
        v = self.variant
        free = [int(block) for block in rng.permutation(np.arange(1, self.num_blocks))]
        prefix = [free.pop() for _ in range(shared)]
        tables = np.zeros((v.S, v.M), np.int32)
        for s, (computed, n) in enumerate(self.rows):
            blocks = prefix[: computed // v.B]  # full ones only, as the block manager does it
            blocks += [free.pop() for _ in range(-(-(computed + n) // v.B) - len(blocks))]
            tables[s, : len(blocks)] = blocks
        return tables

    def _metadata(self) -> AttentionMetadata:
        v = self.variant
        seq_lens, starts = np.zeros(v.S, np.int32), np.full(v.S + 1, self.num_tokens, np.int32)
        positions, token_rows, slots = (np.zeros(v.T, np.int32) for _ in range(3))
        t = 0
        for s, (computed, n) in enumerate(self.rows):
            seq_lens[s], starts[s] = computed + n, t
            for position in range(computed, computed + n):
                block = self.tables[s, position // v.B]
                positions[t], token_rows[t], slots[t] = position, s, block * v.B + position % v.B
                t += 1
        tiles, singles = np.zeros((v.T // QUERY_TILE + v.S if v.tiled else 0, 2), np.int32), self.num_tokens
        num_tiles = 0
        if v.tiled:
            rows = enumerate(zip(starts, self.rows, strict=False))
            runs = [
                (s, i) for s, (first, (_, n)) in rows if n > 1 for i in range(first, first + n, QUERY_TILE)
            ]
            num_tiles, singles = len(runs), sum(n == 1 for _, n in self.rows)
            tiles[:num_tiles] = np.reshape(runs, (-1, 2))
        counts = (jnp.int32(singles), jnp.asarray(tiles), jnp.int32(num_tiles))
        arrays = (self.tables, seq_lens, starts, positions, token_rows, slots)
        return AttentionMetadata(*map(jnp.asarray, arrays), *counts)

    def _pool(self, plain: jax.Array) -> jax.Array | QuantizedPool:
        if self.variant.quantized:
            return QuantizedPool(*quantize_kv(plain, jnp.dtype(self.variant.kv_dtype)))
        return plain.astype(self.variant.kv_dtype)

    def owned(self, *, computed: bool) -> np.ndarray:
        """[N, B]: slots with K and V of a row; with `computed`, of tokens before this step."""
        owned = np.zeros((self.num_blocks, self.variant.B), bool)
        for s, (before, n) in enumerate(self.rows):
            for position in range(before + (0 if computed else n)):
                owned[self.tables[s, position // self.variant.B], position % self.variant.B] = True
        return owned

    def poisoned(self) -> jax.Array | QuantizedPool:
        """The pool before the step, NaN (quantized: NaN as the scale) where no row has computed anything."""
        keep = jnp.asarray(self.owned(computed=True))[:, None, None, :]
        pool = self.before
        if isinstance(pool, QuantizedPool):
            return QuantizedPool(pool.values, jnp.where(keep, pool.scales, jnp.nan))
        return jnp.where(keep[..., None], pool, jnp.nan)

    def check_output(self, out: np.ndarray) -> None:
        v = self.variant
        wide = v.dtype == "float32"
        assert np.isfinite(out).all()
        error = np.abs(out - self.expected).max(axis=(1, 2)) / np.abs(self.expected).max(axis=(1, 2))
        assert error.max() <= BOUNDS["float32" if wide else "bfloat16"]

    def check_pool(self, pool: jax.Array | QuantizedPool) -> None:
        """Every owned slot as the reference leaves it, bit for bit."""
        owned = self.owned(computed=False)
        ours, theirs = pool, self.after
        if isinstance(ours, QuantizedPool) and isinstance(theirs, QuantizedPool):
            scales = (np.asarray(x.scales).transpose(0, 3, 1, 2)[owned] for x in (ours, theirs))
            np.testing.assert_allclose(*scales, rtol=1e-6)
            ours, theirs = ours.values, theirs.values
        elements = (
            np.asarray(x.astype(jnp.float32)).transpose(0, 3, 1, 2, 4)[owned]  # type: ignore[union-attr]
            for x in (ours, theirs)
        )
        np.testing.assert_array_equal(*elements)


@functools.cache
def meaning(variant: Variant) -> Callable[..., Any]:
    """(pool before, q, k, v, metadata) → (pool, float32 output), by the reference."""
    v = variant

    def write_and_attend(pool: Any, q: Any, keys: Any, values: Any, metadata: AttentionMetadata) -> Any:
        pool = reference.write_kv(pool, keys, values, metadata.slot_mapping)
        limits = {"sliding_window": v.sliding_window, "soft_cap": v.soft_cap}
        q = q.astype(jnp.float32)
        return pool, reference.paged_attention(q, pool, metadata, scale=v.D**-0.5, **limits)

    return jax.jit(write_and_attend)


def telling_case(variant: Variant) -> Case:
    """A case that reaches every part of a kernel, as what is drawn first need not: contexts around a block's edge and
    as long as they come, a block that rows share, and, if the step may have it, a prompt and a chunk behind a context.
    """
    v = variant
    if v.decode_only:
        rows = [
            (min(computed, v.max_context - 1), 1)
            for computed in (0, v.B - 1, v.B, v.B + 1, v.max_context - 1)
        ]
    else:
        prompt = v.T // 2 + 1
        chunk = v.T - prompt - 5
        rows = [(v.max_context - 1, 1), (v.B, 1), (0, prompt), (min(v.B + 1, v.max_context - chunk), chunk)]
    return Case(v, rows, seed=0, shared=1)


def draw_case(data: st.DataObject, variant: Variant) -> Case:
    v = variant
    lengths = st.integers(1, 1) if v.decode_only else st.sampled_from(v.row_lengths)
    rows: list[tuple[int, int]] = []
    room = v.T
    for _ in range(data.draw(st.integers(1, v.S), label="rows")):
        n = min(data.draw(lengths), room)
        if n > 0:
            near_edge = st.sampled_from((0, 1, v.B - 1, v.B, v.B + 1, v.max_context - n))
            computed = data.draw(st.one_of(st.integers(0, v.max_context - n), near_edge))
            rows.append((min(computed, v.max_context - n), n))
            room -= n
    shared = data.draw(st.integers(0, v.M), label="shared blocks")
    return Case(variant, rows, data.draw(st.integers(0, 9), label="seed"), shared)
