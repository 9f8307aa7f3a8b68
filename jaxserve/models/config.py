"""What a checkpoint says about its model. Its values are untrusted: each is checked, and a fault names its key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import ModelLoadError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("bfloat16", "float16", "float32")
MAX_SIZE = 1 << 24  # of any one dimension: far above every model, far below what would exhaust memory


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding and how it is stretched; the fields mean what they mean in Hugging Face's
    `rope_parameters`.

    Attributes:
        frequency_factors: per pair of dimensions, divides its frequency (GGUF files of Llama 3 bring these
            instead of the llama3 parameters).
    """

    theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_factors: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family.

    Attributes:
        sliding_window: tokens that a token sees, itself included; None: all before it.
        dtype: of the checkpoint's weights.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"num_attention_heads ({self.num_heads}) is no multiple of num_key_value_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise ModelLoadError(f"head_dim ({self.head_dim}) must be even for rotary positions.")
        factors = self.rope.frequency_factors
        if factors is not None and len(factors) != self.head_dim // 2:
            raise ModelLoadError(
                f"{len(factors)} rotary frequency factors for a head_dim of {self.head_dim}."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """From a Hugging Face `config.json`.

        Raises:
            ModelLoadError: an unsupported architecture or value; the message names the key.
        """
        values = _Values("config.json", config)
        architecture = _architecture(config)
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelLoadError(f"config.json: hidden_act {activation!r} is not supported; only silu is.")
        if config.get("quantization_config"):
            raise ModelLoadError("config.json: quantization_config: quantized safetensors are not supported.")
        hidden_size, num_heads = values.size("hidden_size"), values.size("num_attention_heads")
        sliding_window = config.get("sliding_window") if architecture == "MistralForCausalLM" else None
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        if dtype not in DTYPES:
            raise ModelLoadError(
                f"config.json: dtype {dtype!r} is not supported; these are: {', '.join(DTYPES)}."
            )
        max_position_embeddings = values.size("max_position_embeddings", 2048)
        return cls(
            architecture=architecture,
            vocab_size=values.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=values.size("intermediate_size"),
            num_layers=values.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=values.size("num_key_value_heads", num_heads),
            head_dim=values.size("head_dim", hidden_size // num_heads),
            rms_norm_eps=values.number("rms_norm_eps", 1e-6),
            rope=_rope_from_hf(config, max_position_embeddings),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            sliding_window=None if sliding_window is None else values.size("sliding_window"),
            dtype=dtype,
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        tied: bool,
        attention_bias: bool,
        frequency_factors: tuple[float, ...] | None,
    ) -> ModelConfig:
        """From a GGUF file's metadata and what its list of tensors shows.

        Raises:
            ModelLoadError: an unsupported architecture or value; the message names the key.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise ModelLoadError(f"general.architecture {architecture!r} is not supported; only llama is.")
        values = _Values("GGUF metadata", metadata)
        hidden_size, num_heads = (
            values.size("llama.embedding_length"),
            values.size("llama.attention.head_count"),
        )
        head_dim = values.size("llama.attention.key_length", hidden_size // num_heads)
        rotated = values.size("llama.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise ModelLoadError(
                f"llama.rope.dimension_count {rotated} of {head_dim}: partial rotation is not supported."
            )
        max_position_embeddings = values.size("llama.context_length")
        rope_type = metadata.get("llama.rope.scaling.type", "none")
        if rope_type not in ("none", "linear", "yarn"):
            raise ModelLoadError(f"llama.rope.scaling.type {rope_type!r} is not supported.")
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        return cls(
            architecture="LlamaForCausalLM",
            vocab_size=values.size("llama.vocab_size", len(tokens) or None),
            hidden_size=hidden_size,
            intermediate_size=values.size("llama.feed_forward_length"),
            num_layers=values.size("llama.block_count"),
            num_heads=num_heads,
            num_kv_heads=values.size("llama.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=values.number("llama.attention.layer_norm_rms_epsilon"),
            rope=RopeConfig(
                theta=values.number("llama.rope.freq_base", 10_000.0),
                rope_type="default" if rope_type == "none" else rope_type,
                factor=values.number("llama.rope.scaling.factor", 1.0),
                original_max_position_embeddings=values.size(
                    "llama.rope.scaling.original_context_length", max_position_embeddings
                ),
                frequency_factors=frequency_factors,
            ),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=tied,
            attention_bias=attention_bias,
            dtype="bfloat16",  # what quantized weights are computed in
        )


class _Values:
    """Checked look-ups; faults name the source and the key."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self._source = source
        self._values = values

    def size(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            raise ModelLoadError(
                f"{self._source}: {key} must be an integer from 1 to {MAX_SIZE:,}, got {value!r:.100}."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ModelLoadError(f"{self._source}: {key} must be a positive number, got {value!r:.100}.")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self._values.get(key) is None else self.number(key)

    def _get(self, key: str, default: float | None) -> Any:
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise ModelLoadError(f"{self._source}: {key} is missing.")
            return default
        return value


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    if name not in ARCHITECTURES:
        raise ModelLoadError(
            f"config.json: the architecture {name!r:.100} is not supported; these are: {', '.join(ARCHITECTURES)}."
        )
    return str(name)


def _rope_from_hf(config: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """`rope_parameters`, or `rope_scaling` beside `rope_theta` as older files have it."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ModelLoadError(f"config.json: rope_parameters must be an object, got {parameters!r:.100}.")
    merged = {"rope_theta": config.get("rope_theta"), **parameters}
    if merged["rope_theta"] is None:
        merged["rope_theta"] = config.get("rope_theta")
    values = _Values("config.json: rope_parameters", merged)
    rope_type = merged.get("rope_type") or merged.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ModelLoadError(
            f"config.json: rope_type {rope_type!r:.100} is not supported; these are: {', '.join(ROPE_TYPES)}."
        )
    if merged.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError("config.json: partial_rotary_factor other than 1 is not supported.")
    original = values.size("original_max_position_embeddings", max_position_embeddings)
    # YaRN without a factor stretches from the original length to the present one
    default_factor = {"default": 1.0, "yarn": max_position_embeddings / original}.get(rope_type)
    return RopeConfig(
        theta=values.number("rope_theta", 10_000.0),
        rope_type=rope_type,
        factor=values.number("factor", default_factor),
        original_max_position_embeddings=original,
        low_freq_factor=values.number("low_freq_factor", None if rope_type == "llama3" else 1.0),
        high_freq_factor=values.number("high_freq_factor", None if rope_type == "llama3" else 4.0),
        beta_fast=values.number("beta_fast", 32.0),
        beta_slow=values.number("beta_slow", 1.0),
        attention_factor=values.optional_number("attention_factor"),
        mscale=values.optional_number("mscale"),
        mscale_all_dim=values.optional_number("mscale_all_dim"),
        truncate=bool(merged.get("truncate", True)),
    )
