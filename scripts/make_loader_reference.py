"""Make tests/data/rope.json and tests/data/demo_sha256.json: what transformers computes, for our tests to compare with.

Needs torch, transformers and safetensors; run it in an environment that has them:
    python scripts/make_loader_reference.py SAFETENSORS   (the demo model, as transformers saves it in bfloat16)
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

DATA = Path(__file__).parents[1] / "tests" / "data"
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "max_position_embeddings": 8192,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
CASES: dict[str, dict[str, Any]] = {
    "no rope key at all": {},
    "theta outside": {"rope_theta": 500000.0},
    "theta in rope_parameters": {"rope_theta": 1.5e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1.3e5}},
    "theta outside of rope_parameters": {"rope_theta": 1.5e6, "rope_parameters": {"rope_type": "default"}},
    "head_dim given": {"head_dim": 128, "rope_theta": 1e6},
    "linear, keyed type": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "linear, new form": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 50000.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama3 (3.1 8B)": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    "llama3 (3.2 1B, factor 32, head_dim 64)": {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3, "factor": 32.0},
    },
    "llama3, original length outside": {
        "original_max_position_embeddings": 1024,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    "yarn": {"rope_scaling": YARN},
    "yarn, original length left out": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, factor null": {"rope_scaling": YARN | {"factor": None}},
    "yarn, attention_factor": {"rope_scaling": YARN | {"attention_factor": 0.75}},
    "yarn, mscale": {"rope_scaling": YARN | {"mscale": 1.5, "mscale_all_dim": 0.8}},
    "yarn, mscale alone": {"rope_scaling": YARN | {"mscale": 1.5}},
    "yarn, betas": {"rope_scaling": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}},
    "yarn, not truncated": {"rope_scaling": YARN | {"truncate": False}},
    "yarn, factor below 1": {"rope_scaling": YARN | {"factor": 0.5}},
}  # fmt: skip
LENGTHS = {"dynamic": [8192, 8193, 20000]}  # of sequences; the frequencies of "dynamic" depend on it


def rope(config: dict[str, Any], length: int) -> dict[str, Any]:
    """The table that a sequence of so many tokens is computed with."""
    embedding = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(config))))
    embedding(torch.zeros(1), torch.tensor([[length - 1]]))
    return {
        "config": config,
        "length": length,
        "inv_freq": embedding.inv_freq.tolist(),
        "attention_factor": float(embedding.attention_scaling),
    }


def main(safetensors: str) -> None:
    tables = {
        f"{name}, {length} tokens": rope(BASE | case, length)
        for name, case in CASES.items()
        for length in LENGTHS.get(name, [100])
    }
    (DATA / "rope.json").write_text(json.dumps(tables, indent=0) + "\n")
    hashes = {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in sorted(load_file(safetensors).items())
        if tensor.dtype == torch.bfloat16
    }
    (DATA / "demo_sha256.json").write_text(json.dumps(hashes, indent=0) + "\n")
    print(f"{len(tables)} rope tables, {len(hashes)} tensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
