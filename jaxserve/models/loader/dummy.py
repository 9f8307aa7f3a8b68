"""Random weights of the right shape (`--load-format dummy`): to time an engine without a checkpoint."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxserve.models.config import ModelConfig

NUM_NUMBERS = (1 << 20) + 7  # that all tensors repeat: cheap for any size; odd, so that rows differ


class DummyCheckpoint:
    """A checkpoint that makes its tensors up, the same ones every time."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        rng = np.random.default_rng(0)
        self._numbers = rng.standard_normal(NUM_NUMBERS, np.float32)

    @property
    def config(self) -> ModelConfig:
        return self._config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        c = self._config
        q_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        attention = {
            "q_proj": (q_rows, c.hidden_size),
            "k_proj": (kv_rows, c.hidden_size),
            "v_proj": (kv_rows, c.hidden_size),
            "o_proj": (c.hidden_size, q_rows),
        }
        mlp = {
            "gate_proj": (c.intermediate_size, c.hidden_size),
            "up_proj": (c.intermediate_size, c.hidden_size),
            "down_proj": (c.hidden_size, c.intermediate_size),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
        for i in range(c.num_layers):
            layer = f"model.layers.{i}"
            for group, linears, bias in (
                ("self_attn", attention, c.attention_bias),
                ("mlp", mlp, c.mlp_bias),
            ):
                for name, shape in linears.items():
                    shapes[f"{layer}.{group}.{name}.weight"] = shape
                    if bias:
                        shapes[f"{layer}.{group}.{name}.bias"] = shape[:1]
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}.{norm}.weight"] = (c.hidden_size,)
        shapes["model.norm.weight"] = (c.hidden_size,)
        if not c.tie_word_embeddings:
            shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
        return shapes

    def read_into(self, name: str, out: npt.NDArray[Any]) -> None:
        """Norms are ones, biases zeros; products keep the variance of what goes through them."""
        if out.ndim == 1:
            out[...] = 0 if name.endswith(".bias") else 1
            return
        # each tensor begins elsewhere: equal projections of query and key would attend to themselves alone
        numbers = np.roll(self._numbers, zlib.crc32(name.encode()))
        numbers = (numbers * np.float32(1 / math.sqrt(out.shape[1]))).astype(out.dtype)
        flat = out.reshape(-1)
        for start in range(0, flat.size, numbers.size):
            piece = flat[start : start + numbers.size]
            piece[...] = numbers[: piece.size]
