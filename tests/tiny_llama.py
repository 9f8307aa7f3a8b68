"""Tiny random Llamas, one for each variant of the configuration. Weights follow from a seed, so that only what
transformers computed with them has to be stored (scripts/make_reference.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa 2": {},
    "gqa 1": {"num_key_value_heads": 4},
    "gqa 8": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "head_dim": {"head_dim": 32},
    "rope linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "rope dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "rope llama3": {"rope_scaling": LLAMA3},
    "rope yarn": {"rope_scaling": YARN},
    "sliding window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8},
    "rope yarn tuned": {
        "rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}
    },
    "rope yarn mscale": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}},
    "rope_parameters": {
        "rope_theta": None,
        "rope_parameters": LLAMA3 | {"rope_theta": 5000.0},
    },  # as transformers 5 writes
}


def tiny_config(variant: str) -> dict[str, Any]:
    """A config.json; a variant's None takes the key out."""
    return {key: value for key, value in (BASE | VARIANTS[variant]).items() if value is not None}


def tiny_weights(config: dict[str, Any], seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Weights under Hugging Face's names, large enough that the most likely token stands out."""
    rng = np.random.RandomState(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q_rows, kv_rows = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    weights: dict[str, npt.NDArray[np.float32]] = {}

    def add(name: str, *shape: int, scale: float = 0.15, shift: float = 0.0) -> None:
        weights[name] = (rng.standard_normal(shape) * scale + shift).astype(np.float32)

    def add_linear(name: str, rows: int, columns: int, *, bias: bool) -> None:
        add(f"{name}.weight", rows, columns)
        if bias:
            add(f"{name}.bias", rows)

    add("model.embed_tokens.weight", vocab, hidden, scale=0.5)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{layer}.{norm}.weight", hidden, scale=0.1, shift=1.0)
        bias = config.get("attention_bias", False)
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            add_linear(f"{layer}.self_attn.{name}_proj", rows, hidden, bias=bias)
        add_linear(f"{layer}.self_attn.o_proj", hidden, q_rows, bias=bias)
        bias = config.get("mlp_bias", False)
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            add_linear(f"{layer}.mlp.{name}_proj", rows, columns, bias=bias)
    add("model.norm.weight", hidden, scale=0.1, shift=1.0)
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", vocab, hidden, scale=0.5)
    return weights


def write_tiny_model(directory: Path, variant: str = "gqa 2", seed: int = 0) -> Path:
    """A checkpoint in Hugging Face form, without a tokenizer."""
    from safetensors.numpy import save_file

    config = tiny_config(variant)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tiny_weights(config, seed), str(directory / "model.safetensors"))
    return directory
