"""Tokens of prompts are rated a few at a time, in a loop or, where a loop would cost a copy of weights, in branches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sharding import ONE_CHIP, VocabShard
from jaxserve.step import PROMPT_GROUP, UNROLLED_PROMPT_GROUP, _prompt_logprobs

VOCAB, MAX_LOGPROBS, TOKENS = 384, 3, 2 * UNROLLED_PROMPT_GROUP + 16


class Model:
    """Only its output layer."""

    def __init__(self, table: jax.Array) -> None:
        self.table = table

    def logits(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.table.T


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "branches"])
@pytest.mark.parametrize("count", [0, 1, PROMPT_GROUP, UNROLLED_PROMPT_GROUP + 1, TOKENS])
def test_each_token_that_is_asked_for_is_rated(count: int, unroll: bool) -> None:
    rng = np.random.RandomState(0)
    hidden, table = rng.randn(TOKENS, 32).astype(np.float32), rng.randn(VOCAB, 32).astype(np.float32)
    tokens, targets = rng.permutation(TOKENS), rng.randint(0, VOCAB, TOKENS)
    inputs = {
        "prompt_tokens": jnp.asarray(tokens, jnp.int32),
        "prompt_targets": jnp.asarray(targets, jnp.int32),
        "counts": jnp.asarray([0, 0, 0, 0, count, 0], jnp.int32),
    }

    def rate(inputs: Any) -> jax.Array:
        model: Any = Model(jnp.asarray(table))
        return _prompt_logprobs(
            model, jnp.asarray(hidden), inputs, VocabShard(VOCAB, ONE_CHIP), MAX_LOGPROBS, unroll=unroll
        )

    out = np.array(jax.jit(rate)(inputs))
    group = UNROLLED_PROMPT_GROUP if unroll else PROMPT_GROUP
    assert not out[-(-count // group) * group :].any()
    rated = out[:count]
    logits = (hidden @ table.T)[tokens[:count]].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = logprobs[np.arange(count), targets[:count]]
    np.testing.assert_allclose(rated[:, 0].view(np.float32), expected, atol=1e-4)
    np.testing.assert_array_equal(rated[:, 1], 1 + (logprobs > expected[:, None]).sum(axis=1))
    np.testing.assert_array_equal(rated[:, 2 : 2 + MAX_LOGPROBS], np.argsort(-logprobs)[:, :MAX_LOGPROBS])
    likeliest = np.ascontiguousarray(rated[:, 2 + MAX_LOGPROBS :]).view(np.float32)
    np.testing.assert_allclose(likeliest, -np.sort(-logprobs)[:, :MAX_LOGPROBS], atol=1e-4)
