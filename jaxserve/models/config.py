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
MAX_LAYERS = 1 << 12  # likewise: each is a program's text and hundreds of objects
# where Mistral's defaults in transformers differ from Llama's, for a key that config.json lacks
MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}


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

    def __post_init__(self) -> None:
        if self.theta <= 1.0:
            raise ModelLoadError(f"rope_theta ({self.theta}) must be greater than 1.")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ModelLoadError(
                f"high_freq_factor ({self.high_freq_factor}) must be greater than low_freq_factor "
                f"({self.low_freq_factor})."
            )
        if not all(0.0 < factor < 1e30 for factor in self.frequency_factors or ()):
            raise ModelLoadError("The rotary frequency factors (rope_freqs.weight) must be positive numbers.")


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
        if self.rope.rope_type == "dynamic" and self.head_dim < 4:
            raise ModelLoadError(f"head_dim ({self.head_dim}) must be at least 4 for rope_type dynamic.")
        factors = self.rope.frequency_factors
        if factors is not None and len(factors) != self.head_dim // 2:
            raise ModelLoadError(
                f"{len(factors)} rotary frequency factors for a head_dim of {self.head_dim}: half as many are needed."
            )

    @property
    def longest_context(self) -> int:
        """Positions for which the model's rotary embedding is made: `max_position_embeddings`, which linear, dynamic
        and yarn scaling stretch by their factor (yarn from the original length, which may be shorter)."""
        rope, trained = self.rope, self.max_position_embeddings
        match rope.rope_type:
            case "linear" | "dynamic":
                return max(trained, int(trained * rope.factor))
            case "yarn":
                return max(trained, int(rope.original_max_position_embeddings * rope.factor))
        return trained

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, default_dtype: str = "float32") -> ModelConfig:
        """From a Hugging Face `config.json`.

        Args:
            default_dtype: of the weights, if the config does not say.

        Raises:
            ModelLoadError: an unsupported architecture or value; the message names the key.
        """
        architecture = _architecture(config)
        is_mistral = architecture == "MistralForCausalLM"
        if is_mistral:
            config = MISTRAL_DEFAULTS | dict(config)
        values = _Values("config.json", config)
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelLoadError(
                f"config.json: hidden_act {activation!r:.100} is not supported; only silu is."
            )
        if config.get("quantization_config"):
            raise ModelLoadError("config.json: quantization_config: quantized safetensors are not supported.")
        num_heads = values.size("num_attention_heads")
        max_position_embeddings = values.size("max_position_embeddings", 2048)
        # Llama has no sliding window and Mistral no biases, whatever their configs say
        sliding = is_mistral and config["sliding_window"] is not None
        return cls(
            architecture=architecture,
            vocab_size=values.size("vocab_size"),
            hidden_size=values.size("hidden_size"),
            intermediate_size=values.size("intermediate_size"),
            num_layers=values.size("num_hidden_layers", maximum=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=values.size("num_key_value_heads", num_heads),
            head_dim=values.head_dim("head_dim", "hidden_size", "num_attention_heads"),
            rms_norm_eps=values.number("rms_norm_eps", 1e-6),
            rope=_rope_from_hf(config, max_position_embeddings),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=values.flag("tie_word_embeddings", default=False),
            attention_bias=not is_mistral and values.flag("attention_bias", default=False),
            mlp_bias=not is_mistral and values.flag("mlp_bias", default=False),
            sliding_window=values.size("sliding_window") if sliding else None,
            dtype=_dtype(config, default_dtype),
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        tied: bool,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        frequency_factors: tuple[float, ...] | None = None,
        dtype: str = "bfloat16",
    ) -> ModelConfig:
        """From a GGUF file's metadata and what its list of tensors shows.

        Raises:
            ModelLoadError: an unsupported architecture or value; the message names the key.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise ModelLoadError(
                f"GGUF metadata: general.architecture {architecture!r:.100} is not supported; only llama is."
            )
        values = _Values("GGUF metadata", metadata)
        if metadata.get("llama.expert_count"):
            raise ModelLoadError("GGUF metadata: llama.expert_count: mixtures of experts are not supported.")
        num_heads = values.size("llama.attention.head_count")
        head_dim = values.head_dim(
            "llama.attention.key_length", "llama.embedding_length", "llama.attention.head_count"
        )
        rotated = values.size("llama.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise ModelLoadError(
                f"GGUF metadata: llama.rope.dimension_count {rotated} of {head_dim}: partial rotation is not supported."
            )
        max_position_embeddings = values.size("llama.context_length")
        tokens = metadata.get("tokenizer.ggml.tokens")
        return cls(
            architecture="LlamaForCausalLM",
            vocab_size=values.size("llama.vocab_size", len(tokens) if isinstance(tokens, list) else None),
            hidden_size=values.size("llama.embedding_length"),
            intermediate_size=values.size("llama.feed_forward_length"),
            num_layers=values.size("llama.block_count", maximum=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=values.size("llama.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=values.number("llama.attention.layer_norm_rms_epsilon"),
            rope=_rope_from_gguf(values, metadata, max_position_embeddings, frequency_factors),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=tied,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
            dtype=dtype,
        )


class _Values:
    """Checked look-ups; faults name the source and the key."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self._source = source
        self._values = values

    def size(self, key: str, default: int | None = None, *, maximum: int = MAX_SIZE) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise ModelLoadError(
                f"{self._source}: {key} must be an integer from 1 to {maximum:,}, got {value!r:.100}."
            )
        return value

    def head_dim(self, key: str, hidden_size_key: str, num_heads_key: str) -> int:
        """Given, or derived: then the heads must share the hidden size evenly."""
        if self._values.get(key) is not None:
            return self.size(key)
        hidden_size, num_heads = self.size(hidden_size_key), self.size(num_heads_key)
        if hidden_size % num_heads:
            raise ModelLoadError(
                f"{self._source}: {hidden_size_key} ({hidden_size}) is no multiple of {num_heads_key} ({num_heads}), "
                f"and there is no {key}."
            )
        return hidden_size // num_heads

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise ModelLoadError(f"{self._source}: {key} must be true or false, got {value!r:.100}.")
        return default if value is None else value

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
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if name not in ARCHITECTURES:
        raise ModelLoadError(
            f"config.json: the architecture {name!r:.100} is not supported; these are: {', '.join(ARCHITECTURES)}."
        )
    return str(name)


def _dtype(config: Mapping[str, Any], default: str) -> str:
    """`dtype`, or `torch_dtype` as older files have it."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or default).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ModelLoadError(
            f"config.json: dtype {dtype!r:.100} is not supported; these are: {', '.join(DTYPES)}."
        )
    return dtype


def _rope_from_hf(config: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """`rope_parameters`, or `rope_scaling` beside `rope_theta` as older files have it."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = config.get(key) or {}
    if not isinstance(parameters, Mapping):
        raise ModelLoadError(f"config.json: {key} must be an object, got {parameters!r:.100}.")
    if nested := [name for name, value in parameters.items() if isinstance(value, Mapping)]:
        raise ModelLoadError(
            f"config.json: {key}: parameters of their own for some layers ({nested[0]!r:.100}) are not supported."
        )
    merged = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    merged |= {name: value for name, value in parameters.items() if value is not None}
    values = _Values(f"config.json: {key}", merged)
    rope_type = merged.get("rope_type", merged.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ModelLoadError(
            f"config.json: {key}: rope_type {rope_type!r:.100} is not supported; these are: {', '.join(ROPE_TYPES)}."
        )
    if values.number("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError("config.json: partial_rotary_factor other than 1 is not supported.")
    if config.get("original_max_position_embeddings") is not None:  # outside, it has precedence
        merged["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    original = values.size("original_max_position_embeddings", max_position_embeddings)
    # YaRN without a factor stretches from the original length to the present one
    default_factor = {"default": 1.0, "yarn": max_position_embeddings / original}.get(rope_type)
    required = rope_type == "llama3"
    return RopeConfig(
        theta=values.number("rope_theta", 10_000.0),
        rope_type=rope_type,
        factor=values.number("factor", default_factor),
        original_max_position_embeddings=original,
        low_freq_factor=values.number("low_freq_factor", None if required else 1.0),
        high_freq_factor=values.number("high_freq_factor", None if required else 4.0),
        beta_fast=values.number("beta_fast", 32.0),
        beta_slow=values.number("beta_slow", 1.0),
        attention_factor=values.optional_number("attention_factor"),
        mscale=values.optional_number("mscale"),
        mscale_all_dim=values.optional_number("mscale_all_dim"),
        truncate=values.flag("truncate", default=True),
    )


def _rope_from_gguf(
    values: _Values,
    metadata: Mapping[str, Any],
    max_position_embeddings: int,
    frequency_factors: tuple[float, ...] | None,
) -> RopeConfig:
    prefix = "llama.rope.scaling"
    # files from before 2023-10 know linear scaling only
    linear = metadata.get("llama.rope.scale_linear")
    rope_type = metadata.get(f"{prefix}.type", "none" if linear is None else "linear")
    if rope_type not in ("none", "linear", "yarn"):
        raise ModelLoadError(
            f"GGUF metadata: {prefix}.type {rope_type!r:.100} is not supported; these are: none, linear, yarn."
        )
    for key in ("yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier", "attn_factor"):
        if f"{prefix}.{key}" in metadata:
            raise ModelLoadError(f"GGUF metadata: {prefix}.{key} is not supported.")
    factor_key = "llama.rope.scale_linear" if f"{prefix}.factor" not in metadata else f"{prefix}.factor"
    return RopeConfig(
        theta=values.number("llama.rope.freq_base", 10_000.0),
        rope_type="default" if rope_type == "none" else rope_type,
        factor=values.number(factor_key, 1.0),
        original_max_position_embeddings=values.size(
            f"{prefix}.original_context_length", max_position_embeddings
        ),
        beta_fast=values.number(f"{prefix}.yarn_beta_fast", 32.0),
        beta_slow=values.number(f"{prefix}.yarn_beta_slow", 1.0),
        frequency_factors=frequency_factors,
    )
