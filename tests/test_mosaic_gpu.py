"""The kernel for Hopper, simulated, against the reference in float32.

JAX's simulator has GMEM, SMEM, barriers and copies that arrive when they are waited for; it looks for races, and all
fresh memory is NaN, as is every slot of the pool that no row owns. Python 3.11's JAX has none: there the kernel is only
traced. What it compiles to is `scripts/aot_check`'s to show.
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
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.kernels import pallas_mosaic_gpu, pallas_triton
from jaxserve.kernels.reference import QuantizedPool
from tests.attention_cases import Case, Variant, draw_case, telling_case

simulated = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason=f"JAX {jax.__version__} has no simulator of Mosaic GPU"
)

LONG_ROWS = (1, 1, 2, 40, 63, 64, 65, 90)


@dataclasses.dataclass(frozen=True)
class Split(Variant):
    """With every context in so many parts: as many as a GPU is given would take long to simulate."""

    parts: int = 1

    def __str__(self) -> str:
        return f"{super().__str__()}-parts{self.parts}"


DECODE = (
    Split(8, 16, 4, 2, 64, decode_only=True),
    Split(8, 16, 8, 1, 128, decode_only=True, sliding_window=33, parts=2),
    Split(8, 32, 9, 3, 64, "float16", "float16", decode_only=True, soft_cap=2.0, parts=4),
    Split(8, 128, 4, 2, 128, decode_only=True, max_context=400),
    Split(8, 64, 80, 1, 64, decode_only=True, parts=2),  # two programs for a kv head
    Split(8, 256, 20, 1, 128, decode_only=True, sliding_window=100, max_context=600),
    Split(8, 32, 4, 4, 80, decode_only=True, parts=2),
    Split(8, 16, 4, 2, 96, decode_only=True, max_context=300),
)
MIXED = (
    Split(32, 16, 4, 2, 64),  # so few tokens that there are no tiles
    Split(128, 16, 8, 1, 128, sliding_window=33, parts=2, row_lengths=LONG_ROWS),
)
QUICK = (*DECODE[:4], *MIXED)


@functools.cache
def compiled(variant: Split) -> Callable[..., Any]:
    return build(variant)


def build(variant: Split) -> Callable[..., Any]:
    v = variant

    def attend(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pallas_mosaic_gpu, "splits_for", lambda programs: v.parts)
            return pallas_mosaic_gpu.paged_attention(
                *args,
                scale=v.D**-0.5,
                sliding_window=v.sliding_window,
                soft_cap=v.soft_cap,
                decode_only=v.decode_only,
                interpret=plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan"),
            )

    return jax.jit(attend)


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


@simulated
@pytest.mark.parametrize("variant", [*DECODE, *MIXED], ids=str)
def test_equals_the_reference(variant: Split, kernel_cases: int) -> None:
    if kernel_cases < 100 and variant not in QUICK:
        pytest.skip("in the full run: --kernel-cases=200")
    count = -(-kernel_cases // len([*DECODE, *MIXED]))

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


@simulated
def test_a_step_without_rows_writes_nothing() -> None:
    case = Case(DECODE[0], [], seed=0)
    before = case.poisoned()
    out, pool = run(case)
    assert not out.any()
    np.testing.assert_array_equal(np.asarray(pool, np.float32), np.asarray(before, np.float32))


@simulated
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit, though the neighbours are longer."""
    case = Case(DECODE[0], [(37, 1), (150, 1), (100, 1)], seed=1)
    together, _ = run(case)
    case.metadata = case.metadata._replace(
        seq_lens=case.metadata.seq_lens.at[1:].set(0),
        query_start_loc=case.metadata.query_start_loc.at[1:].set(1),
        num_single_tokens=jnp.int32(1),
    )
    alone, _ = run(case)
    np.testing.assert_array_equal(alone[0], together[0])


def test_all_query_heads_share_a_load_if_wgmma_has_room_for_them() -> None:
    def plan(num_tokens: int, H: int, K: int) -> tuple[int, int, int]:
        case = Case(Variant(num_tokens, 16, H, K, 64, decode_only=True), [(0, 1)], seed=0)
        plan = pallas_triton.make_plan(case.q, case.before, case.metadata, scale=1.0)
        plan = pallas_mosaic_gpu.make_plan(plan)
        return plan.single_heads, plan.head_groups, plan.num_splits

    assert plan(8, 48, 1) == (48, 1, pallas_triton.MAX_SPLITS)
    assert plan(8, 80, 1) == (40, 2, pallas_triton.MAX_SPLITS)
    assert plan(256, 16, 8) == (2, 1, 1)


# -- kernels that are broken on purpose -------------------------------------------------------------------------


@simulated
@pytest.mark.parametrize("off_by_one", ["past", "window"])
def test_a_mask_that_is_off_by_one_is_caught(off_by_one: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_visible = pallas_mosaic_gpu.is_visible
    case = Case(DECODE[1], [(57, 1), (130, 1)], seed=1)
    check(case)

    def broken(kv_positions: Any, q_positions: Any, window: int | None) -> Any:
        assert window is not None
        past, less = (1, 0) if off_by_one == "past" else (0, 1)
        return is_visible(kv_positions, q_positions - past, window - less)

    monkeypatch.setattr(pallas_mosaic_gpu, "is_visible", broken)
    out, _ = run(case, build(DECODE[1]))
    with pytest.raises(AssertionError):
        case.check_output(out[: case.num_tokens])


@simulated
def test_values_that_were_never_written_are_caught_if_they_are_not_cleared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    iota = pallas_mosaic_gpu._iota
    monkeypatch.setattr(
        pallas_mosaic_gpu, "_iota", lambda shape, axis: iota(shape, axis) - (1000 if axis == 0 else 0)
    )
    case = Case(DECODE[0], [(57, 1), (130, 1)], seed=1)
    out, _ = run(case, build(DECODE[0]))
    assert np.isnan(out[: case.num_tokens]).any()


@simulated
@pytest.mark.parametrize(
    ("left_out", "complaint"),
    [
        ("barrier_wait", "RACE DETECTED"),  # what was copied is used before it is there
        ("commit_smem", "RACE DETECTED"),  # what was computed is copied before it is there
        ("wait_smem_to_gmem", "Not all copy_smem_to_gmem"),
    ],
)
def test_a_missing_wait_is_caught(
    left_out: str, complaint: str, monkeypatch: pytest.MonkeyPatch, reset_simulator: None
) -> None:
    monkeypatch.setattr(pallas_mosaic_gpu.plgpu, left_out, lambda *_: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match=complaint):
        run(Case(DECODE[0], [(150, 1)], seed=1), build(DECODE[0]))


@pytest.fixture
def reset_simulator() -> Iterator[None]:
    """An exception leaves its memories behind."""
    yield
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # there is no public name

    interpret_pallas_call.reset_gpu_interpret_mode_state()


# -- what it refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"D": 256}, "head_dim 256 is not one of 64, 80, 96, 128"),
        ({"B": 8}, "block_size 8 is not one of 16"),
        (
            {"q": "float32", "pool": "float32"},
            "queries are float32 and the pool is float32; wgmma takes both in",
        ),
        ({"pool": "float16"}, "queries are bfloat16 and the pool is float16"),
        ({"pool": "int8", "scales": True}, "the pool is int8: it takes none with scales"),
        ({"pool": "int8"}, "a pool of int8 needs scales"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], reason: str) -> None:
    asked = {"D": 64, "B": 32, "q": "bfloat16", "pool": "bfloat16"} | changes
    struct: Any = jax.ShapeDtypeStruct
    pool = struct((8, 2, 2, asked["B"], asked["D"]), jnp.dtype(asked["pool"]))
    if "scales" in asked:
        pool = QuantizedPool(pool, struct(pool.shape[:-1], jnp.float32))
    queries = struct((8, 4, asked["D"]), jnp.dtype(asked["q"]))
    assert reason in (pallas_mosaic_gpu.unsupported(queries, pool) or "")
