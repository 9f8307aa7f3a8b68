"""The GPU kernels, interpreted, against the reference in float32.

Every case has NaN in every slot of the pool that no row owns. `--kernel-cases=N` sets how many cases each kernel gets
(CI's full run: 200). What they compile to is `scripts/aot_check`'s to show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxserve.kernels import pallas_triton
from jaxserve.kernels.reference import QuantizedPool
from jaxserve.kv_cache import KVCacheSpec, num_blocks_for
from tests.attention_cases import Case, Variant, draw_case, telling_case

pytestmark = pytest.mark.heavy

LONG_ROWS = (1, 1, 2, 40, 63, 64, 65, 90)
# the first five of each cover every dtype, windows, caps and groupings; the others are for the full run
DECODE = (
    Variant(8, 16, 4, 2, 64, "float32", "float32", decode_only=True),
    Variant(8, 16, 8, 1, 128, decode_only=True, sliding_window=33),
    Variant(8, 32, 9, 3, 64, "float32", "bfloat16", decode_only=True, soft_cap=2.0),
    Variant(8, 16, 4, 2, 96, "bfloat16", "int8", decode_only=True),
    Variant(8, 128, 4, 2, 128, "float32", "float8_e4m3fn", decode_only=True, max_context=400),
    Variant(8, 128, 4, 4, 80, "float16", "float16", decode_only=True, max_context=400),
    Variant(512, 64, 32, 16, 64, decode_only=True),  # so many programs that no context is split
    Variant(8, 256, 20, 1, 256, "float32", "float32", decode_only=True, sliding_window=100, max_context=600),
)
MIXED = (
    Variant(32, 16, 4, 2, 64, "float32", "float32"),  # so few tokens that there are no tiles
    Variant(128, 16, 8, 1, 128, sliding_window=33, row_lengths=LONG_ROWS),
    Variant(128, 32, 9, 3, 64, "float32", "bfloat16", soft_cap=2.0, row_lengths=LONG_ROWS),
    Variant(128, 16, 4, 2, 96, "bfloat16", "int8", row_lengths=LONG_ROWS),
    Variant(128, 128, 4, 2, 128, "float32", "float8_e4m3fn", max_context=400, row_lengths=LONG_ROWS),
    Variant(128, 128, 4, 4, 80, "float16", "float16", max_context=400, row_lengths=LONG_ROWS),
    Variant(192, 64, 8, 2, 64, "float32", "float32", row_lengths=LONG_ROWS),
    Variant(
        128, 256, 2, 1, 256, "float32", "float32", sliding_window=100, max_context=600, row_lengths=LONG_ROWS
    ),
)
QUICK = (*DECODE[:4], *MIXED[:2], MIXED[3])


@functools.cache
def compiled(variant: Variant) -> Callable[..., Any]:
    return build(variant)


def build(variant: Variant) -> Callable[..., Any]:
    v = variant
    return jax.jit(
        functools.partial(
            pallas_triton.paged_attention,
            scale=v.D**-0.5,
            sliding_window=v.sliding_window,
            soft_cap=v.soft_cap,
            decode_only=v.decode_only,
            interpret=True,
        )
    )


def run(case: Case, kernel: Callable[..., Any] | None = None) -> tuple[np.ndarray, jax.Array | QuantizedPool]:
    """(output of all tokens, pool)"""
    kernel = kernel or compiled(case.variant)
    out, pool = kernel(case.q, case.k, case.v, case.poisoned(), case.metadata)
    return np.asarray(out, np.float32), pool


def check(case: Case) -> None:
    out, pool = run(case)
    case.check_output(out[: case.num_tokens])
    case.check_pool(pool)
    assert not out[case.num_tokens :].any()


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


@pytest.mark.parametrize("variant", [DECODE[0], MIXED[1]], ids=str)
def test_a_step_without_rows_writes_nothing(variant: Variant) -> None:
    case = Case(variant, [], seed=0)
    before = case.poisoned()
    out, pool = run(case)
    assert not out.any()
    np.testing.assert_array_equal(np.asarray(pool, np.float32), np.asarray(before, np.float32))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit, though the neighbours are longer."""
    variant = DECODE[0]
    case = Case(variant, [(37, 1), (150, 1), (100, 1)], seed=1)
    together, _ = run(case)
    case.metadata = case.metadata._replace(
        seq_lens=case.metadata.seq_lens.at[1:].set(0),
        query_start_loc=case.metadata.query_start_loc.at[1:].set(1),
        num_single_tokens=jnp.int32(1),
    )
    alone, _ = run(case)
    np.testing.assert_array_equal(alone[0], together[0])


def test_few_tokens_are_split_and_many_are_not() -> None:
    def splits(variant: Variant) -> int:
        case = Case(variant, [(0, 1)], seed=0)
        return pallas_triton.make_plan(case.q, case.before, case.metadata, scale=1.0).num_splits

    assert splits(DECODE[0]) == pallas_triton.MAX_SPLITS
    assert splits(DECODE[6]) == 1


@pytest.mark.parametrize(
    ("variant", "off_by_one"),
    [(DECODE[1], "past"), (DECODE[1], "window"), (MIXED[1], "future"), (MIXED[1], "window")],
    ids=str,
)
def test_a_mask_that_is_off_by_one_is_caught(
    variant: Variant, off_by_one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible = pallas_triton.is_visible
    rows = [(57, 1), (130, 1)] if variant.decode_only else [(57, 1), (20, 90), (0, 30)]
    case = Case(variant, rows, seed=1)
    check(case)

    def broken(kv_positions: Any, q_positions: Any, window: int | None) -> Any:
        assert window is not None
        if off_by_one == "window":
            return visible(kv_positions, q_positions, window - 1)
        return visible(kv_positions, q_positions + (1 if off_by_one == "future" else -1), window)

    monkeypatch.setattr(pallas_triton, "is_visible", broken)
    out, _ = run(case, build(variant))
    with pytest.raises(AssertionError):
        case.check_output(out[: case.num_tokens])


def test_every_bit_pattern_of_float8_is_decoded() -> None:
    bits = jnp.arange(256, dtype=jnp.uint8)
    ours = pallas_triton._decode_float8(jax.lax.bitcast_convert_type(bits, jnp.int8))
    theirs = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)
    numbers = np.asarray(bits & 0x7F) != 0x7F  # that is NaN, which the pool never holds
    np.testing.assert_array_equal(np.asarray(ours)[numbers], np.asarray(theirs)[numbers])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"D": 68}, "head_dim 68 is not a multiple of 8 up to 256"),
        ({"D": 264}, "head_dim 264"),
        ({"B": 8}, "block_size 8 is not one of 16"),
        ({"H": 5}, "5 query heads are no multiple of 2 kv heads"),
        ({"pool": "int8"}, "a pool of int8 needs scales"),
        ({"q": "int8"}, "queries are int8"),
        (
            {"N": 300_000, "pool": "int8", "scales": True},
            "of 300,000 blocks of one-byte elements, Pallas' 32-bit offsets reach 262,144",
        ),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], reason: str) -> None:
    asked = {"N": 8, "D": 64, "B": 32, "H": 4, "K": 2, "q": "bfloat16", "pool": "bfloat16"} | changes
    struct: Any = jax.ShapeDtypeStruct
    pool = struct((asked["N"], 2, asked["K"], asked["B"], asked["D"]), jnp.dtype(asked["pool"]))
    if "scales" in asked:
        pool = QuantizedPool(pool, struct(pool.shape[:-1], jnp.float32))
    queries = struct((8, asked["H"], asked["D"]), jnp.dtype(asked["q"]))
    assert reason in (pallas_triton.unsupported(queries, pool) or "")


@pytest.mark.parametrize(
    ("gib", "dtype", "reached_gib"),
    [
        (1.9, "int8", 1.9),
        (3.0, "int8", 2.0),
        (4.5, "int8", 4.5),
        (3.0, "bfloat16", 3.0),
        (60.0, "bfloat16", 60.0),
    ],
)
def test_a_pool_of_all_layers_is_never_larger_than_its_offsets(
    gib: float, dtype: str, reached_gib: float
) -> None:
    """Llama-3.1-8B's, of which a kernel sees all layers as one array."""
    kv_dtype = jnp.dtype(dtype)
    spec = KVCacheSpec(
        num_layers=32,
        num_kv_heads=8,
        head_dim=128,
        block_size=32,
        dtype=kv_dtype,
        backend="pallas_triton",
        platform="gpu",
    )
    values_bytes = 32 * 2 * 8 * 32 * 128 * kv_dtype.itemsize
    num_blocks = int(gib * 2**30) // values_bytes
    chosen = num_blocks_for(spec, pool_bytes=num_blocks * spec.bytes_per_block, max_useful_tokens=1 << 40)
    assert chosen == int(reached_gib * 2**30) // values_bytes
    flat: Any = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] * x.shape[1], *x.shape[2:]), x.dtype),
        spec.abstract(chosen),
    )
    assert pallas_triton.unsupported(jax.ShapeDtypeStruct((8, 32, 128), jnp.bfloat16), flat) is None
