"""int8 weights: the product by hand, rows on their own, and what loading makes of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import ModelLoadError
from jaxserve.model_runner import ModelRunner
from jaxserve.models.layers import matmul_int8
from jaxserve.models.loader import TensorSlot, load_params
from jaxserve.models.loader.checkpoint import Part, quantize_rows
from tests.argmax_sampler import argmax_alone
from tests.models.test_loader import F32, Scripted
from tests.tiny_llama import tiny_config, tiny_weights, write_tiny_model

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 8, 64])
def test_integers_are_multiplied_exactly(num_rows: int, fine: bool) -> None:
    """Rows whose largest element is 127 are their own quantization; the sums go beyond what float32 counts."""
    rng = np.random.RandomState(0)
    x, weight = rng.randint(-127, 128, (num_rows, 3000)), rng.randint(-127, 128, (40, 3000))
    x[:, 0] = 127
    x[0], weight[0] = 127, 127
    scale = 2.0 ** rng.randint(-9, 0, 40)
    out = matmul_int8(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(weight, jnp.int8),
        jnp.asarray(scale, jnp.float32),
        fine=fine,
    )
    exact = x.astype(np.int64) @ weight.T.astype(np.int64)
    assert exact[0, 0] > 1 << 24
    np.testing.assert_array_equal(np.asarray(out), exact.astype(np.float32) * scale.astype(np.float32))


@pytest.mark.parametrize(("fine", "steps_a_side"), [(False, 127), (True, 127 * 254)])
def test_inputs_are_rounded_to_the_nearest_step(fine: bool, steps_a_side: int) -> None:
    rng = np.random.RandomState(0)
    x, weight = rng.randn(8, 96).astype(np.float32).astype(np.float64), rng.randint(-127, 128, (40, 96))
    out = matmul_int8(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.int8), jnp.ones(40), fine=fine)
    steps = np.abs(x).max(axis=1, keepdims=True) / steps_a_side
    half_a_step_each = 0.5 * steps * np.abs(weight).sum(axis=1)
    error = np.abs(np.asarray(out) - x @ weight.T)
    assert (error <= 1.001 * half_a_step_each).all()
    assert error.max() > 0


@pytest.mark.parametrize("fine", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(fine: bool) -> None:
    rng = np.random.RandomState(0)
    x, weight, scale = rng.randn(64, 96) * 10.0, rng.randint(-127, 128, (40, 96)), rng.rand(40)
    x[5] = 0.0
    arguments = jnp.asarray(weight, jnp.int8), jnp.asarray(scale, jnp.float32)
    together = matmul_int8(jnp.asarray(x, jnp.float32), *arguments, fine=fine)
    for row in (0, 5, 63):
        alone = matmul_int8(jnp.asarray(x[row : row + 1], jnp.float32), *arguments, fine=fine)
        np.testing.assert_array_equal(np.asarray(alone[0]), np.asarray(together[row]))
    assert not np.asarray(together[5]).any()


def test_every_row_of_a_weight_has_a_scale_of_its_own() -> None:
    weight = np.array([[0.5, -1.27, 0.006], [0.0, 0.0, 0.0], [254.0, 1.0, -3.0]], np.float32)
    values, scales = quantize_rows(weight)
    np.testing.assert_array_equal(values, [[50, -127, 1], [0, 0, 0], [127, 0, -2]])
    np.testing.assert_allclose(scales, [0.01, 0.0, 2.0])


def test_tensors_of_a_fused_weight_are_quantized_one_by_one_and_cut_afterwards() -> None:
    weights = {"q": tiny_weights(tiny_config("gqa 2"))["model.layers.0.self_attn.q_proj.weight"]}
    weights |= {"k": 3 * weights["q"][:32], "o": weights["q"], "norm": np.ones(4, np.float32)}
    shards = [
        {
            "q": TensorSlot("qk.weight", 0, (64, 64), Part(0, 32 * i, 32 * i + 32)),
            "k": TensorSlot("qk.weight", 32, (32, 64), Part(0, 16 * i, 16 * i + 16)),
            "o": TensorSlot("o.weight", 0, (64, 64), Part(1, 32 * i, 32 * i + 32)),
            "norm": TensorSlot("norm.weight", 0, (4,)),
        }
        for i in range(2)
    ]
    shapes = {"qk.weight": (48, 64), "o.weight": (64, 32), "norm.weight": (4,)}
    loaded = load_params(
        Scripted(weights), shards, shapes, F32, lambda *p: p[2], quantized=("qk.weight", "o.weight")
    )
    values, scales = quantize_rows(weights["q"])
    for i, params in enumerate(loaded):
        assert params["norm.weight"].dtype == np.float32
        np.testing.assert_array_equal(params["o.weight"], values[:, 32 * i : 32 * i + 32])
        np.testing.assert_array_equal(params["o.scale"], scales)
        np.testing.assert_array_equal(params["qk.weight"][:32], values[32 * i : 32 * i + 32])
        restored = params["qk.weight"] * params["qk.scale"][:, None]
        step = params["qk.scale"][32:, None]
        assert (np.abs(restored[32:] - weights["k"][16 * i : 16 * i + 16]) <= 0.501 * step).all()


def test_a_weight_that_is_no_number_is_refused() -> None:
    weights = {"q": np.array([[1.0, np.nan]], np.float32)}
    slots = {"q": TensorSlot("q.weight", 0, (1, 2))}
    with pytest.raises(ModelLoadError, match="tensor q has values that are no finite numbers"):
        load_params(
            Scripted(weights), [slots], {"q.weight": (1, 2)}, F32, lambda *p: p[2], quantized=("q.weight",)
        )


@pytest.mark.heavy
def test_logits_stay_close_to_transformers(tmp_path: Path) -> None:
    """The table is read by row for tokens and multiplied for logits. Random weights have no outliers, and no
    redundancy either: 8 bits leave a few percent of error."""
    stored = np.load(DATA / "tiny_llama.npz")
    config = EngineConfig(
        model=str(write_tiny_model(tmp_path / "model", "gqa 2")),
        dtype="float32",
        quantization="int8",
        max_num_seqs=1,
        max_num_batched_tokens=8,
        kv_cache_memory_bytes=4 << 20,
    )
    with argmax_alone():
        logits = ModelRunner(config).prompt_logits(stored["gqa 2/prompt"].tolist())
    error = logits - stored["gqa 2/logits"]
    assert 0 < error.std() < 0.05 * stored["gqa 2/logits"].std()
