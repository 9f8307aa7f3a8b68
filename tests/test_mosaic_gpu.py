"""The kernel for Hopper, simulated, against the reference in float32.

JAX's simulator has GMEM, SMEM, barriers and copies that arrive when they are waited for; it looks for races, and all
fresh memory is NaN, as is every slot of the pool that no row owns. Python 3.11's JAX has none: there the kernel is only
traced. What it compiles to is `scripts/aot_check`'s to show.
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
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.kernels import pallas_mosaic_gpu, pallas_triton
from jaxserve.kernels.reference import QuantizedPool
from tests.attention_cases import Case, Variant, draw_case

pytestmark = pytest.mark.heavy
simulated = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason=f"JAX {jax.__version__} has no simulator of Mosaic GPU"
)

LONG_ROWS = (1, 1, 2, 40, 63, 64, 65, 90)
DECODE = (
    Variant(8, 16, 4, 2, 64, decode_only=True),
    Variant(8, 16, 8, 1, 128, decode_only=True, sliding_window=33),
    Variant(8, 32, 9, 3, 64, "float16", "float16", decode_only=True, soft_cap=2.0),
    Variant(8, 128, 4, 2, 128, decode_only=True, max_context=400),
    Variant(8, 64, 80, 1, 64, decode_only=True),  # two programs for a kv head
    Variant(8, 256, 20, 1, 128, decode_only=True, sliding_window=100, max_context=600),
    Variant(8, 32, 4, 4, 80, decode_only=True),
    Variant(8, 16, 4, 2, 96, decode_only=True),
)
MIXED = (
    Variant(32, 16, 4, 2, 64),  # so few tokens that there are no tiles
    Variant(128, 16, 8, 1, 128, sliding_window=33, row_lengths=LONG_ROWS),
)
QUICK = (*DECODE[:4], *MIXED)


@functools.cache
def compiled(variant: Variant) -> Callable[..., Any]:
    return build(variant)


def build(variant: Variant) -> Callable[..., Any]:
    v = variant
    return jax.jit(
        functools.partial(
            pallas_mosaic_gpu.paged_attention,
            scale=v.D**-0.5,
            sliding_window=v.sliding_window,
            soft_cap=v.soft_cap,
            decode_only=v.decode_only,
            interpret=plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan"),
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


@simulated
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

    cases()


@simulated
def test_a_step_without_rows_writes_nothing() -> None:
    case = Case(DECODE[0], [], seed=0)
    before = case.poisoned()
    out, pool = run(case)
    assert not out.any()
    np.testing.assert_array_equal(np.asarray(pool, np.float32), np.asarray(before, np.float32))
