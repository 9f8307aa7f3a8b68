"""Parts of the jitted step by themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.step import FEW_ROWS, _logits_of_rows


@pytest.mark.parametrize("num_rows", [1, FEW_ROWS, FEW_ROWS + 1, 64])
def test_rows_that_are_in_use_have_logits(num_rows: int) -> None:
    """Where at most FEW_ROWS of a program's rows are in use, the others are left out."""
    rng = np.random.RandomState(0)
    hidden, weight = rng.randn(100, 8).astype(np.float32), rng.randn(8, 50).astype(np.float32)
    index = rng.permutation(100)[:64]
    inputs = {
        "logits_index": jnp.asarray(index),
        "seq_lens": jnp.asarray(np.where(np.arange(64) < num_rows, 5, 0)),
    }
    model: Any = SimpleNamespace(logits=lambda rows: rows @ weight)
    logits = np.asarray(_logits_of_rows(model, jnp.asarray(hidden), inputs, skip_padding=True))
    np.testing.assert_allclose(logits[:num_rows], hidden[index[:num_rows]] @ weight, rtol=1e-5, atol=1e-5)
    assert (logits[FEW_ROWS:] == 0).all() == (num_rows <= FEW_ROWS)
    everything = _logits_of_rows(model, jnp.asarray(hidden), inputs, skip_padding=False)
    np.testing.assert_allclose(everything, hidden[index] @ weight, rtol=1e-5, atol=1e-5)
