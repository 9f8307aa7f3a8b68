"""The whole model over the accelerators' kernels, interpreted: what the serving step makes of them is what it makes of
the reference."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels import pallas_tpu, pallas_triton
from jaxserve.kernels.metadata import AttentionMetadata
from jaxserve.kernels.paged_attention import PoolShape, paged_attention, pool_struct
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import Llama
from jaxserve.sampling_params import SamplingParams
from jaxserve.sequence import Sequence
from jaxserve.step import ModelDefinition
from jaxserve.step_inputs import pack_step
from jaxserve.step_plan import ScheduledRow, StepPlan
from jaxserve.step_shapes import StepProgram, StepShape
from tests.tiny_llama import tiny_config

pytestmark = pytest.mark.heavy

B, M, NUM_BLOCKS, MAX_MODEL_LEN = 16, 8, 20, 128
KERNELS = {
    "pallas_triton": functools.partial(pallas_triton.paged_attention, interpret=True),
    "pallas_tpu": functools.partial(pallas_tpu.paged_attention, interpret=pltpu.InterpretParams()),
}
PLATFORMS = {"pallas_triton": "gpu", "pallas_tpu": "tpu", "reference": "gpu"}


@functools.cache
def tiny_model() -> Llama:
    config = ModelConfig.from_hf(tiny_config("sliding window"))
    definition = ModelDefinition.of(
        lambda: Llama(config, dtype=jnp.dtype("float32"), max_model_len=MAX_MODEL_LEN)
    )
    rng = np.random.RandomState(0)
    return definition.build(
        [jnp.asarray(rng.randn(*shape) * 0.2, jnp.float32) for shape in definition.shapes]
    )


def two_steps(backend: str, attend: Callable[..., Any]) -> list[np.ndarray]:
    """Hidden states after a step of two prompts, one of them long, and after one that decodes."""
    model = tiny_model()
    rng = np.random.RandomState(1)
    rows = []
    for length, blocks in ((5, [3, 7]), (70, [1, 12, 9, 18, 4])):
        tokens = [int(token) for token in rng.randint(0, model.config.vocab_size, length)]
        sequence = Sequence("r", 0, tokens, SamplingParams(), seed=0, max_model_len=MAX_MODEL_LEN)
        sequence.block_table = array("i", blocks)
        rows.append(sequence)
    shape = PoolShape(NUM_BLOCKS, model.config.num_kv_heads, B, model.config.head_dim, jnp.dtype("float32"))
    layer: Any = pool_struct(backend, shape, PLATFORMS[backend])
    pool = jnp.zeros((model.config.num_layers, *layer.shape), layer.dtype)
    outputs = []
    for step in (StepShape(128, 8, M), StepShape(8, 8, M, decode_only=True)):
        plan = StepPlan([ScheduledRow(s, s.num_uncomputed_tokens, ()) for s in rows])
        inputs = {
            k: jnp.asarray(v) for k, v in step.unpack(pack_step(plan, StepProgram((step,)), step, B)).items()
        }
        names = (
            "block_tables",
            "seq_lens",
            "query_start_loc",
            "positions",
            "token_rows",
            "slot_mapping",
            "tiles",
        )
        single, num_tiles = inputs["counts"][:2]
        metadata = AttentionMetadata(
            **{name: inputs[name] for name in names}, num_single_tokens=single, num_tiles=num_tiles
        )
        # each kernel by itself: the TPU's simulator calls back into Python, which hangs inside of larger programs
        call = jax.jit(
            functools.partial(attend, decode_only=step.decode_only),
            static_argnames=("scale", "sliding_window"),
        )
        embedded = model.embed_tokens(inputs["token_ids"])
        hidden, pool = model(embedded, inputs["positions"], pool, metadata, call, block_size=B, unroll=True)
        outputs.append(np.asarray(hidden)[: plan.num_tokens])
        for sequence in rows:
            sequence.num_computed_tokens = len(sequence)
            sequence.token_ids.append(int(rng.randint(model.config.vocab_size)))
    return outputs


@pytest.mark.parametrize("backend", KERNELS)
def test_the_model_computes_what_it_computes_over_the_reference(backend: str) -> None:
    ours = two_steps(backend, KERNELS[backend])
    expected = two_steps("reference", functools.partial(paged_attention, backend="reference"))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
