"""Products of the layers against plain ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.layers import matmul, matmul_int8, partial_sums, uses_partial_sums


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 64, 65])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 96), (96, 32)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_product_is_the_same_however_it_is_computed(
    rows: int, outputs: int, inputs: int, dtype: str
) -> None:
    """One row as sums, one row of a width that does not divide, operands swapped (few rows, more inputs than outputs),
    plain."""
    rng = np.random.RandomState(0)
    x, weight = (jnp.asarray(rng.randn(n, inputs), dtype) for n in (rows, outputs))
    product = jax.jit(matmul)(x, weight)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [64, 96, 576, 1536, 2048, 4096])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_partial_sums_of_one_row_add_up_to_its_product(inputs: int, dtype: str) -> None:
    rng = np.random.RandomState(0)
    x = jnp.asarray(rng.randn(1, inputs), jnp.bfloat16)
    weight = jnp.asarray(rng.randint(-127, 128, (24, inputs)), dtype)
    sums = jax.jit(partial_sums)(x[0].astype(jnp.float32), weight)
    assert sums.size * 2 <= weight.size
    expected = np.asarray(weight, np.float64) @ np.asarray(x[0], np.float64)
    np.testing.assert_allclose(np.asarray(sums, np.float64).sum(axis=(1, 2)), expected, rtol=1e-4, atol=1e-2)


def test_only_one_row_of_16_bits_is_summed_up() -> None:
    weight = jnp.zeros((8, 96), jnp.bfloat16)
    assert uses_partial_sums(jnp.zeros((1, 96), jnp.bfloat16), weight)
    assert not uses_partial_sums(jnp.zeros((2, 96), jnp.bfloat16), weight)
    assert not uses_partial_sums(jnp.zeros((1, 96), jnp.float32), weight)
    assert not uses_partial_sums(jnp.zeros((1, 88), jnp.bfloat16), weight[:, :88])


@pytest.mark.parametrize("fine", [False, True])
def test_one_row_beside_int8_weights_is_what_it_is_among_others(fine: bool) -> None:
    rng = np.random.RandomState(0)
    x, weight = (
        jnp.asarray(rng.randn(2, 96), jnp.bfloat16),
        jnp.asarray(rng.randint(-127, 128, (40, 96)), jnp.int8),
    )
    scale = jnp.asarray(rng.rand(40), jnp.float32)
    alone, both = (matmul_int8(rows, weight, scale, fine=fine) for rows in (x[:1], x))
    np.testing.assert_allclose(alone[0], both[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [[0], [5], [0, 5]])
def test_a_row_with_nan_gives_nan(columns: list[int]) -> None:
    x = np.ones((1, 96), np.float32)
    x[0, columns] = np.nan
    assert np.isnan(matmul(jnp.asarray(x, jnp.bfloat16), jnp.ones((4, 96), jnp.bfloat16))).all()
