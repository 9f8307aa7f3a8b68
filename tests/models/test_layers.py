"""Products of the layers against plain ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.layers import matmul


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 64, 65])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 96), (96, 32)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_product_is_the_same_however_it_is_computed(
    rows: int, outputs: int, inputs: int, dtype: str
) -> None:
    """One row, operands swapped (few rows, more inputs than outputs), plain."""
    rng = np.random.RandomState(0)
    x, weight = (jnp.asarray(rng.randn(n, inputs), dtype) for n in (rows, outputs))
    product = jax.jit(matmul)(x, weight)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)
