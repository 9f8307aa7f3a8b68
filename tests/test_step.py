"""Parts of the jitted step by themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.step import FEWEST_ROWS, _logits_of_rows


@pytest.mark.parametrize("num_rows", [0, 1, 8, 9, 16, 17, 33, 64])
def test_rows_that_are_in_use_have_logits(num_rows: int) -> None:
    """Of the others only as many are computed as the next larger product takes."""
    rng = np.random.RandomState(0)
    hidden, weight = rng.randn(100, 8).astype(np.float32), rng.randn(8, 50).astype(np.float32)
    index = rng.permutation(100)[:64]
    model: Any = SimpleNamespace(logits=lambda rows: rows @ weight)
    room = jnp.full((72, 50), -1.0)
    logits = _logits_of_rows(model, jnp.asarray(hidden), jnp.asarray(index), jnp.int32(num_rows), room)
    computed = max(FEWEST_ROWS, 1 << (num_rows - 1).bit_length()) if num_rows else 0
    np.testing.assert_allclose(logits[:computed], hidden[index[:computed]] @ weight, rtol=1e-5, atol=1e-5)
    assert (np.asarray(logits[computed:]) == -1.0).all()
