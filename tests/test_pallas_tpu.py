"""The TPU kernel in the simulator of TPU memories, DMAs and semaphores, against the reference in float32.

Every case runs with race detection, with NaN in all memory that nothing was written to, and with NaN in every slot
of the pool that no row owns. `--kernel-cases=N` sets how many cases each kernel gets (CI's full run: 200).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import (
    interpret_pallas_call as simulator,
)  # the races it found are not public
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels import pallas_tpu, reference
from jaxserve.kernels.metadata import AttentionMetadata
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
    def quantized(self) -> bool:
        return jnp.dtype(self.kv_dtype).itemsize == 1


# the first five of each cover every dtype, windows, caps and groupings; the others are for the full run
DECODE = (
    Variant(8, 16, 4, 2, 64, "float32", "float32", decode_only=True),
    Variant(8, 16, 8, 1, 128, decode_only=True, sliding_window=33),
    Variant(8, 32, 9, 3, 64, "float32", "bfloat16", decode_only=True, soft_cap=2.0),
    Variant(8, 16, 4, 2, 96, "bfloat16", "int8", decode_only=True),
    Variant(8, 128, 4, 2, 128, "float32", "float8_e4m3fn", decode_only=True, max_context=400),
    Variant(8, 128, 4, 4, 80, decode_only=True, num_cores=2, max_context=400),
    Variant(8, 64, 16, 16, 64, decode_only=True),
    Variant(8, 256, 2, 1, 256, "float32", "float32", decode_only=True, sliding_window=100, max_context=600),
)
MIXED = (
    Variant(64, 16, 4, 2, 64, "float32", "float32"),
    Variant(64, 16, 8, 1, 128, sliding_window=33),
    Variant(64, 32, 9, 3, 64, "float32", "bfloat16", soft_cap=2.0),
    Variant(64, 16, 4, 2, 96, "bfloat16", "int8"),
    Variant(64, 128, 4, 2, 128, "float32", "float8_e4m3fn", max_context=400),
    Variant(64, 128, 4, 4, 80, max_context=400),
    Variant(64, 64, 8, 2, 64, num_cores=2),
    Variant(64, 256, 2, 1, 256, "float32", "float32", sliding_window=100, max_context=600),
)
QUICK = (*DECODE[:5], *MIXED[:5])


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
        arrays = (self.tables, seq_lens, starts, positions, token_rows, slots)
        none = jnp.zeros((), jnp.int32)
        return AttentionMetadata(*map(jnp.asarray, arrays), none, jnp.zeros((0, 2), jnp.int32), none)

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
        """The pool as the kernel wants it, NaN (int8: NaN as the scale) where no row has computed anything."""
        keep = jnp.asarray(self.owned(computed=True))[:, None, None, :]
        pool = self.before
        if isinstance(pool, QuantizedPool):
            scales = jnp.where(keep, pool.scales, jnp.nan).transpose(0, 2, 1, 3)
            spare = pallas_tpu.scales_shape(*pool.values.shape[:1], self.variant.K, self.variant.B)[3]
            lanes = ((0, 0),) * 3 + ((0, spare - self.variant.B),)
            scales = jnp.pad(scales, lanes, constant_values=jnp.nan)
            return QuantizedPool(pallas_tpu.pack_pool(pool.values), scales)
        return pallas_tpu.pack_pool(jnp.where(keep[..., None], pool, jnp.nan))

    def run(self, kernel: Callable[..., Any] | None = None) -> tuple[np.ndarray, jax.Array | QuantizedPool]:
        """(output of the real tokens, pool)"""
        kernel = kernel or compiled(self.variant)
        out, pool = kernel(self.q, self.k, self.v, self.poisoned(), self.metadata)
        return np.asarray(out, np.float32)[: self.num_tokens], pool

    def check(self) -> None:
        out, pool = self.run()
        assert not races_found()
        self.check_output(out)
        self.check_pool(pool)

    def check_output(self, out: np.ndarray) -> None:
        v = self.variant
        wide = v.dtype == "float32"
        assert np.isfinite(out).all()
        error = np.abs(out - self.expected).max(axis=(1, 2)) / np.abs(self.expected).max(axis=(1, 2))
        assert error.max() <= BOUNDS["float32" if wide else "bfloat16"]

    def check_pool(self, pool: jax.Array | QuantizedPool) -> None:
        """Every owned slot as the reference leaves it, bit for bit."""
        owned = self.owned(computed=False)
        if isinstance(pool, QuantizedPool) and isinstance(self.after, QuantizedPool):
            scales = np.asarray(pool.scales)[..., : self.variant.B].transpose(0, 3, 2, 1)[owned]
            np.testing.assert_allclose(
                scales, np.asarray(self.after.scales).transpose(0, 3, 1, 2)[owned], rtol=1e-6
            )
            values, expected = pool.values, self.after.values
        else:
            values, expected = pool, self.after
        unpacked = pallas_tpu.unpack_pool(values, self.variant.D)
        ours, theirs = (
            np.asarray(x.astype(jnp.float32)).transpose(0, 3, 1, 2, 4)[owned] for x in (unpacked, expected)
        )
        np.testing.assert_array_equal(ours, theirs)


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


def simulation(**settings: Any) -> pltpu.InterpretParams:
    if "on_race" in {field.name for field in dataclasses.fields(pltpu.InterpretParams)}:
        settings |= {"on_race": "warn"}  # newer JAX raises otherwise; both then tell by the same flag
    # a clock that is as short as the default takes DMAs that overlap for ordered and misses their races
    return pltpu.InterpretParams(uninitialized_memory="nan", vector_clock_size=128, **settings)


def build(variant: Variant, *, races: bool = True) -> Callable[..., Any]:
    v = variant
    return jax.jit(
        functools.partial(
            pallas_tpu.paged_attention,
            scale=v.D**-0.5,
            sliding_window=v.sliding_window,
            soft_cap=v.soft_cap,
            decode_only=v.decode_only,
            num_cores=v.num_cores,
            interpret=simulation(detect_races=races, num_cores_or_threads=v.num_cores),
        )
    )


compiled = functools.cache(build)


def races_found() -> bool:
    return simulator.races is not None and simulator.races.races_found


@pytest.fixture(autouse=True)
def fresh_simulator() -> Iterator[None]:
    yield
    pltpu.reset_tpu_interpret_mode_state()


def draw_case(data: st.DataObject, variant: Variant) -> Case:
    v = variant
    lengths = st.integers(1, 1) if v.decode_only else st.sampled_from((1, 1, 2, 3, 7, 16, 17, 30))
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


@pytest.mark.parametrize("variant", [*DECODE, *MIXED], ids=str)
def test_equals_the_reference(variant: Variant, kernel_cases: int) -> None:
    if kernel_cases < 100 and variant not in QUICK:
        pytest.skip("in the full run: --kernel-cases=200")
    count = -(-kernel_cases // len(DECODE if variant.decode_only else MIXED))

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),  # a case that fails is small already
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def cases(data: st.DataObject) -> None:
        draw_case(data, variant).check()

    cases()


@pytest.mark.parametrize("variant", [DECODE[0], MIXED[0]], ids=str)
def test_a_step_without_rows_does_nothing(variant: Variant) -> None:
    case = Case(variant, [], seed=0)
    kernel = compiled(variant)
    out, _ = kernel(case.q, case.k, case.v, case.poisoned(), case.metadata)
    assert not np.asarray(out).any()
    assert not races_found()


def test_padding_tokens_get_zeros() -> None:
    case = Case(MIXED[0], [(3, 1), (5, 9)], seed=0)
    out, _ = compiled(case.variant)(case.q, case.k, case.v, case.poisoned(), case.metadata)
    assert not np.asarray(out)[10:].any()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit, though the neighbours are longer and share the buffers."""
    variant = DECODE[0]
    case = Case(variant, [(37, 1), (150, 1), (100, 1)], seed=1)
    together, _ = case.run()
    alone = Case(variant, [(37, 1)], seed=1)
    alone.metadata = jax.tree.map(jnp.asarray, case.metadata)._replace(
        seq_lens=case.metadata.seq_lens.at[1:].set(0),
        query_start_loc=case.metadata.query_start_loc.at[1:].set(1),
    )
    out, _ = compiled(variant)(case.q, case.k, case.v, case.poisoned(), alone.metadata)
    np.testing.assert_array_equal(np.asarray(out)[0], together[0])


# -- the tests themselves: a kernel that is broken on purpose must be caught ------------------------------------


def with_slot_zero(method: Callable[..., None]) -> Callable[..., None]:
    """The slot is the last argument."""
    return lambda self, *args: method(self, *args[:-1], jnp.int32(0))


def broken_batch(variant: Variant) -> Case:
    """Rows with more than one chunk in flight."""
    rows = [(37, 1), (150, 1)] if variant.decode_only else [(37, 1), (90, 20), (0, 30)]
    return Case(variant, rows, seed=1)


@pytest.mark.parametrize("variant", [DECODE[0], MIXED[0]], ids=str)
def test_one_buffer_instead_of_two_is_a_race(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next chunk is fetched into the buffer that is being used."""
    for name in ("start_chunk", "wait_chunk", "_insert", "_update_single", "_update_tile"):
        monkeypatch.setattr(pallas_tpu._Step, name, with_slot_zero(getattr(pallas_tpu._Step, name)))
    broken_batch(variant).run(build(variant))
    assert races_found()


@pytest.mark.parametrize("variant", [DECODE[0], MIXED[0]], ids=str)
def test_using_a_chunk_before_waiting_for_it_is_caught(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_chunk, update_name = pallas_tpu._Step.wait_chunk, "_update_single"
    update = getattr(pallas_tpu._Step, update_name)
    waits: list[Any] = []

    def use_and_wait(self: Any, *args: Any) -> None:
        update(self, *args)
        wait_chunk(self, *waits.pop(0))

    def wait_later(self: Any, *args: Any) -> None:
        if waits or hasattr(self, "late"):  # tiles, which come after the single tokens, stay right
            wait_chunk(self, *args)
        else:
            self.late = True
            waits.append(args)

    monkeypatch.setattr(pallas_tpu._Step, "wait_chunk", wait_later)
    monkeypatch.setattr(pallas_tpu._Step, update_name, use_and_wait)
    case = broken_batch(variant)
    out, _ = case.run(build(variant))
    assert races_found() or not np.isfinite(out).all()


@pytest.mark.parametrize(
    ("variant", "off_by_one"),
    [(DECODE[1], "past"), (DECODE[1], "window"), (MIXED[1], "future"), (MIXED[1], "window")],
    ids=str,
)
def test_a_mask_that_is_off_by_one_is_caught(
    variant: Variant, off_by_one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible = pallas_tpu._visible

    def broken(kv_positions: Any, q_positions: Any, window: int | None) -> Any:
        assert window is not None
        if off_by_one == "window":
            return visible(kv_positions, q_positions, window - 1)
        return visible(kv_positions, q_positions + (1 if off_by_one == "future" else -1), window)

    monkeypatch.setattr(pallas_tpu, "_visible", broken)
    rows = [(57, 1), (130, 1)] if variant.decode_only else [(57, 1), (90, 20), (0, 30)]
    case = Case(variant, rows, seed=1)
    out, _ = case.run(build(variant, races=False))
    with pytest.raises(AssertionError):
        case.check_output(out)


# -- traffic ----------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """(lanes, bytes) of every DMA in the simulator."""
    copies: list[tuple[int, ...]] = []
    execute_read = simulator.DMA.execute_read

    def counting(self: Any) -> None:
        if self.data is None:
            execute_read(self)
            copies.append((self.data.shape[-1], self.data.nbytes))

    monkeypatch.setattr(simulator.DMA, "execute_read", counting)
    return copies


@pytest.mark.parametrize("context", [128, 130, 4096, 32768])
def test_decode_moves_hardly_more_than_it_must(context: int, moved: list[tuple[int, ...]]) -> None:
    """All DMAs of K and V: those read, the new ones, and those written."""
    variant = Variant(1, 128, 2, 1, 128, decode_only=True, max_context=max(context, 256), S=1)
    case = Case(variant, [(context - 1, 1)], seed=0)
    out, _ = case.run(compiled(variant, races=False))
    case.check_output(out)
    token_bytes = 2 * variant.K * variant.D * 2
    total = sum(size for lanes, size in moved if lanes == 2 * variant.D)  # queries and outputs have D lanes
    assert context * token_bytes <= total <= 1.05 * context * token_bytes


def test_a_window_reads_hardly_more_than_the_window(moved: list[tuple[int, ...]]) -> None:
    variant = dataclasses.replace(DECODE[1], max_context=2000, S=1, T=1)
    case = Case(variant, [(1999, 1)], seed=0)
    out, _ = case.run(compiled(variant, races=False))
    case.check_output(out)
    assert variant.sliding_window is not None
    tokens = sum(size for lanes, size in moved if lanes == 2 * variant.D) / (2 * variant.K * variant.D * 2)
    assert tokens <= variant.sliding_window + variant.B + 4 + 2  # a block, the last words, the new token


# -- what can be known without running --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_num_seqs", "max_model_len", "expected"),
    [(64, 8192, 128), (256, 98_304, 128), (256, 131_072, 256), (1, 1_000_000, 128)],
)
def test_the_block_grows_with_the_context(max_num_seqs: int, max_model_len: int, expected: int) -> None:
    assert pallas_tpu.default_block_size(max_num_seqs, max_model_len) == expected


def test_tables_beyond_scalar_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="lower --max-num-seqs or --max-model-len"):
        pallas_tpu.default_block_size(1024, 1_000_000)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_packing_a_pool_loses_nothing(head_dim: int) -> None:
    pool = jnp.arange(3 * 2 * 2 * 16 * head_dim, dtype=jnp.float32).reshape(3, 2, 2, 16, head_dim)
    packed = pallas_tpu.pack_pool(pool)
    assert packed.shape == pallas_tpu.pool_shape(3, 2, 16, head_dim)
    np.testing.assert_array_equal(pallas_tpu.unpack_pool(packed, head_dim), pool)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float16"}, "queries are float16"),
        ({"kv_dtype": "float16"}, "the pool is float16"),
        ({"D": 512}, "head_dim 512 exceeds 256"),
        ({"H": 5}, "5 query heads are no multiple of 2"),
        ({"H": 32, "K": 32}, "32 kv heads exceed 16"),
        ({"B": 48}, "block_size 48"),
    ],
)
def test_says_why_it_does_not_fit(change: dict[str, Any], reason: str) -> None:
    v = dataclasses.replace(Variant(8, 16, 4, 2, 64), **change)
    q, kv = jnp.zeros((v.T, v.H, v.D), v.dtype), jnp.zeros((v.T, v.K, v.D), v.dtype)
    pool = jnp.zeros(pallas_tpu.pool_shape(4, v.K, v.B, v.D), v.kv_dtype)
    metadata = Case(Variant(8, 16, 4, 2, 64), [(0, 1)], seed=0).metadata
    with pytest.raises(ValueError, match=reason):
        pallas_tpu.paged_attention(q, kv, kv, pool, metadata, scale=1.0, interpret=True)


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.5 / 127), ("float8_e4m3fn", 2.0**-4)])
def test_quantization_error(dtype: str, bound: float) -> None:
    """Of the largest element of a head."""
    x = jnp.asarray(np.random.RandomState(0).randn(50, 4, 64), jnp.float32)
    values, scales = quantize_kv(x, jnp.dtype(dtype))
    error = jnp.abs(values.astype(jnp.float32) * scales[..., None] - x).max(-1) / jnp.abs(x).max(-1)
    assert float(error.max()) <= bound * 1.001
    assert not np.asarray(quantize_kv(jnp.zeros((2, 64)), jnp.dtype(dtype))[0].astype(jnp.float32)).any()
