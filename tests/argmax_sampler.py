"""The argmax in place of the sampler, where that is not what a test is about: it is most of what is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jaxserve import sampler, step, trace_cache
from jaxserve.sampler import SampleOutputs, SamplingInputs
from jaxserve.sharding import VocabShard


@contextmanager
def argmax_alone() -> Iterator[None]:
    """Engines that are made meanwhile take the likeliest token, whatever they are asked, and report no logprobs."""
    code = f"{trace_cache.LOADED_CODE} with the argmax"
    with (
        mock.patch.object(step, "sample", _sample),
        mock.patch.multiple(trace_cache, LOADED_CODE=code, code_digest=lambda: code),
    ):
        yield


def _sample(
    logits: jax.Array,
    _: Any,
    read: Callable[[], SamplingInputs],
    vocab: VocabShard,
    *,
    max_logprobs: int,
    **__: Any,
) -> SampleOutputs:
    S = read().temperature.shape[0]
    candidates = 3 * min(sampler.NUM_BEAM_CANDIDATES, vocab.size)
    return SampleOutputs(
        vocab.argmax(vocab.mask_padding(logits[:S])),
        jnp.zeros((S, 2 + 2 * max_logprobs), jnp.int32),
        jnp.zeros((S, candidates), jnp.int32),
    )
