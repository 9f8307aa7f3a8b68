"""Rotary frequencies against Hugging Face transformers. scripts/make_loader_reference.py made the values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.models.config import ModelConfig, RopeConfig
from jaxserve.models.rope import rope_frequencies

TABLES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "rope.json").read_text("utf-8")
)
DYNAMIC = TABLES["dynamic, 8192 tokens"]["config"]


@pytest.mark.parametrize("name", TABLES)
def test_frequencies_and_attention_factor_are_those_of_transformers(name: str) -> None:
    table = TABLES[name]
    inv_freq, attention_factor = rope_frequencies(
        ModelConfig.from_hf(table["config"]), max_model_len=table["length"]
    )
    assert inv_freq.dtype == np.float32
    np.testing.assert_allclose(inv_freq, np.array(table["inv_freq"]), rtol=1e-6)
    assert attention_factor == pytest.approx(table["attention_factor"], rel=1e-12)


@pytest.mark.parametrize("max_model_len", [1, 4096, 8192])
def test_dynamic_frequencies_are_the_unstretched_ones_up_to_the_trained_length(max_model_len: int) -> None:
    inv_freq, _ = rope_frequencies(ModelConfig.from_hf(DYNAMIC), max_model_len)
    plain, _ = rope_frequencies(ModelConfig.from_hf(DYNAMIC | {"rope_scaling": None}), max_model_len)
    np.testing.assert_array_equal(inv_freq, plain)


def test_llama3_frequencies_follow_from_the_factors_that_a_gguf_file_brings_instead() -> None:
    stretched = TABLES["llama3 (3.1 8B), 100 tokens"]
    plain = ModelConfig.from_hf(stretched["config"] | {"rope_scaling": None})
    expected = np.array(stretched["inv_freq"])
    factors = rope_frequencies(plain, 100)[0] / expected
    rope = RopeConfig(theta=plain.rope.theta, frequency_factors=tuple(factors.tolist()))
    inv_freq, attention_factor = rope_frequencies(dataclasses.replace(plain, rope=rope), 100)
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-6)
    assert attention_factor == 1.0
    assert factors.max() == pytest.approx(8.0)
