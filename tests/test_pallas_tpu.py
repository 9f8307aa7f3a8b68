"""The TPU kernel in the simulator of TPU memories, DMAs and semaphores, against the reference in float32.

Every case runs with race detection, with NaN in all memory that nothing was written to, and with NaN in every slot
of the pool that no row owns. `--kernel-cases=N` sets how many cases each kernel gets (the full run: 200).
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

from jaxserve.kernels import pallas_tpu, pallas_tpu_decode, pallas_tpu_layout, pallas_tpu_prefill
from jaxserve.kernels.pallas_tpu_common import Step
from jaxserve.kernels.pallas_tpu_decode import SingleTokens
from jaxserve.kernels.pallas_tpu_prefill import LongRows
from jaxserve.kernels.reference import QuantizedPool, quantize_kv
from tests.attention_cases import Case, Variant, draw_case, telling_case

pytestmark = pytest.mark.heavy

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
QUICK = (*DECODE[:4], *MIXED[:2], MIXED[3])


def packed(pool: jax.Array | QuantizedPool) -> jax.Array | QuantizedPool:
    """The plain layout → the kernel's; lanes that no scale is in are NaN."""
    if not isinstance(pool, QuantizedPool):
        return pallas_tpu_layout.pack_pool(pool)
    N, _, K, B = pool.scales.shape
    spare = pallas_tpu_layout.scales_shape(N, K, B)[3] - B
    scales = jnp.pad(
        pool.scales.transpose(0, 2, 1, 3), ((0, 0),) * 3 + ((0, spare),), constant_values=jnp.nan
    )
    return QuantizedPool(pallas_tpu_layout.pack_pool(pool.values), scales)


def unpacked(pool: jax.Array | QuantizedPool, variant: Variant) -> jax.Array | QuantizedPool:
    if not isinstance(pool, QuantizedPool):
        return pallas_tpu_layout.unpack_pool(pool, variant.D)
    scales = pool.scales[..., : variant.B].transpose(0, 2, 1, 3)
    return QuantizedPool(pallas_tpu_layout.unpack_pool(pool.values, variant.D), scales)


def run(case: Case, kernel: Callable[..., Any] | None = None) -> tuple[np.ndarray, jax.Array | QuantizedPool]:
    """(output of the real tokens, pool in the plain layout)"""
    kernel = kernel or compiled(case.variant)
    out, pool = kernel(case.q, case.k, case.v, packed(case.poisoned()), case.metadata)
    return np.asarray(out, np.float32)[: case.num_tokens], unpacked(pool, case.variant)


def check(case: Case) -> None:
    out, pool = run(case)
    assert not races_found()
    case.check_output(out)
    case.check_pool(pool)


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
        check(draw_case(data, variant))

    check(telling_case(variant))
    cases()


@pytest.mark.parametrize("variant", [DECODE[0], MIXED[0]], ids=str)
def test_a_step_without_rows_does_nothing(variant: Variant) -> None:
    case = Case(variant, [], seed=0)
    kernel = compiled(variant)
    out, _ = kernel(case.q, case.k, case.v, packed(case.poisoned()), case.metadata)
    assert not np.asarray(out).any()
    assert not races_found()


def test_padding_tokens_get_zeros() -> None:
    case = Case(MIXED[0], [(3, 1), (5, 9)], seed=0)
    out, _ = compiled(case.variant)(case.q, case.k, case.v, packed(case.poisoned()), case.metadata)
    assert not np.asarray(out)[10:].any()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit, though the neighbours are longer and share the buffers."""
    variant = DECODE[0]
    case = Case(variant, [(37, 1), (150, 1), (100, 1)], seed=1)
    together, _ = run(case)
    alone = Case(variant, [(37, 1)], seed=1)
    alone.metadata = jax.tree.map(jnp.asarray, case.metadata)._replace(
        seq_lens=case.metadata.seq_lens.at[1:].set(0),
        query_start_loc=case.metadata.query_start_loc.at[1:].set(1),
    )
    out, _ = compiled(variant)(case.q, case.k, case.v, packed(case.poisoned()), alone.metadata)
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
    check(broken_batch(variant))
    for part, names in (
        (Step, ("start_chunk", "wait_chunk")),
        (SingleTokens, ("_insert", "_update_single")),
        (LongRows, ("_update_tile",)),
    ):
        for name in names:
            monkeypatch.setattr(part, name, with_slot_zero(getattr(part, name)))
    run(broken_batch(variant), build(variant))
    assert races_found()


@pytest.mark.parametrize("variant", [DECODE[0], MIXED[0]], ids=str)
def test_using_a_chunk_before_waiting_for_it_is_caught(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(broken_batch(variant))
    wait_chunk, update_name = Step.wait_chunk, "_update_single"
    update = getattr(SingleTokens, update_name)
    waits: list[Any] = []

    def use_and_wait(self: Any, *args: Any) -> None:
        update(self, *args)
        wait_chunk(self, *waits.pop(0))

    def wait_later(self: Any, *args: Any) -> None:
        if waits or hasattr(self, "late"):
            wait_chunk(self, *args)
        else:
            self.late = True
            waits.append(args)

    monkeypatch.setattr(SingleTokens, "wait_chunk", wait_later)
    monkeypatch.setattr(SingleTokens, update_name, use_and_wait)
    case = broken_batch(variant)
    out, _ = run(case, build(variant))
    assert races_found() or not np.isfinite(out).all()


@pytest.mark.parametrize(
    ("variant", "off_by_one"),
    [(DECODE[1], "past"), (DECODE[1], "window"), (MIXED[1], "future"), (MIXED[1], "window")],
    ids=str,
)
def test_a_mask_that_is_off_by_one_is_caught(
    variant: Variant, off_by_one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible = pallas_tpu_prefill.is_visible
    rows = [(57, 1), (130, 1)] if variant.decode_only else [(57, 1), (90, 20), (0, 30)]
    case = Case(variant, rows, seed=1)
    check(case)

    def broken(kv_positions: Any, q_positions: Any, window: int | None) -> Any:
        assert window is not None
        if off_by_one == "window":
            return visible(kv_positions, q_positions, window - 1)
        return visible(kv_positions, q_positions + (1 if off_by_one == "future" else -1), window)

    for part in (pallas_tpu_decode, pallas_tpu_prefill):
        monkeypatch.setattr(part, "is_visible", broken)
    out, _ = run(case, build(variant, races=False))
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


@pytest.mark.parametrize("context", [128, 130, 4096, pytest.param(32768, marks=pytest.mark.sweep)])
def test_decode_moves_hardly_more_than_it_must(context: int, moved: list[tuple[int, ...]]) -> None:
    """All DMAs of K and V: those read, the new ones, and those written."""
    variant = Variant(1, 128, 2, 1, 128, decode_only=True, max_context=max(context, 256), S=1)
    case = Case(variant, [(context - 1, 1)], seed=0)
    out, _ = run(case, compiled(variant, races=False))
    case.check_output(out)
    token_bytes = 2 * variant.K * variant.D * 2
    total = sum(size for lanes, size in moved if lanes == 2 * variant.D)  # queries and outputs have D lanes
    assert context * token_bytes <= total <= 1.05 * context * token_bytes


def test_a_window_reads_hardly_more_than_the_window(moved: list[tuple[int, ...]]) -> None:
    variant = dataclasses.replace(DECODE[1], max_context=2000, S=1, T=1)
    case = Case(variant, [(1999, 1)], seed=0)
    out, _ = run(case, compiled(variant, races=False))
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
    assert pallas_tpu_layout.default_block_size(max_num_seqs, max_model_len) == expected


def test_tables_beyond_scalar_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="lower --max-num-seqs or --max-model-len"):
        pallas_tpu_layout.default_block_size(1024, 1_000_000)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_packing_a_pool_loses_nothing(head_dim: int) -> None:
    pool = jnp.arange(3 * 2 * 2 * 16 * head_dim, dtype=jnp.float32).reshape(3, 2, 2, 16, head_dim)
    packed = pallas_tpu_layout.pack_pool(pool)
    assert packed.shape == pallas_tpu_layout.pool_shape(3, 2, 16, head_dim)
    np.testing.assert_array_equal(pallas_tpu_layout.unpack_pool(packed, head_dim), pool)


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
    pool = jnp.zeros(pallas_tpu_layout.pool_shape(4, v.K, v.B, v.D), v.kv_dtype)
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
