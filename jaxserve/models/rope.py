"""Rotary frequencies and their stretched forms, equal to Hugging Face transformers' for each `rope_type`."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from jaxserve.models.config import ModelConfig, RopeConfig

Floats = npt.NDArray[np.float32]


def rope_frequencies(config: ModelConfig, max_model_len: int) -> tuple[Floats, float]:
    """Angle per position for every pair of dimensions, and the factor of cos and sin.

    "dynamic" (NTK-aware) recomputes its frequencies in transformers whenever a sequence grows beyond the trained
    length, so that old keys no longer fit new queries. Here a result must not depend on when it was computed:
    the frequencies are those for `max_model_len`, once and for all, which for models that are served within
    their trained length are transformers' own.

    Returns:
        (inv_freq [D/2] float32, attention factor).
    """
    rope, D = config.rope, config.head_dim
    attention_factor = 1.0
    match rope.rope_type:
        case "linear":
            inv_freq = (_inverse(rope.theta, D) / rope.factor).astype(np.float32)
        case "dynamic":
            stretch = max(max_model_len, config.max_position_embeddings) / config.max_position_embeddings
            theta = rope.theta * math.pow(rope.factor * stretch - (rope.factor - 1), D / (D - 2))
            inv_freq = _inverse(theta, D)
        case "llama3":
            inv_freq = _llama3(rope, D)
        case "yarn":
            inv_freq, attention_factor = _yarn(rope, D)
        case _:
            inv_freq = _inverse(rope.theta, D)
    if rope.frequency_factors is not None:
        inv_freq = np.divide(inv_freq, np.asarray(rope.frequency_factors, np.float32), dtype=np.float32)
    return inv_freq, attention_factor


def _inverse(theta: float, D: int) -> Floats:
    exponents = np.arange(0, D, 2, dtype=np.float32) / np.float32(D)
    frequencies: Floats = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    return frequencies


def _llama3(rope: RopeConfig, D: int) -> Floats:
    """Long wavelengths are stretched, short ones kept, those between blended (Llama 3.1)."""
    inv_freq = _inverse(rope.theta, D)
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / inv_freq
    blend = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * inv_freq / rope.factor + blend * inv_freq
    long = wavelengths > original / rope.low_freq_factor
    short = wavelengths < original / rope.high_freq_factor
    return np.where(long, inv_freq / rope.factor, np.where(short, inv_freq, blended)).astype(np.float32)


def _yarn(rope: RopeConfig, D: int) -> tuple[Floats, float]:
    """YaRN (Peng et al. 2023, section 3.2 "NTK-by-parts" and 3.3 for the attention factor)."""

    def dimension_of(rotations: float) -> float:
        """Where a dimension turns `rotations` times over the original length."""
        original = rope.original_max_position_embeddings
        return D * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    ramp = np.clip((np.arange(D // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    inv_freq = _inverse(rope.theta, D)
    mixed = inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)
    factor = rope.attention_factor
    if factor is None:
        if rope.mscale and rope.mscale_all_dim:
            factor = _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
        else:
            factor = _mscale(rope.factor, 1.0)
    return mixed.astype(np.float32), factor


def _mscale(scale: float, weight: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0
