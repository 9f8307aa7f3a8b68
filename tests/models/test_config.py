"""Configurations: the same meaning as in transformers and llama.cpp; every fault names its key."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig

from jaxserve.errors import ModelLoadError
from jaxserve.models.config import ModelConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.vocab_size": 320,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 512,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("given", [{}, {"num_key_value_heads": 2}, {"head_dim": 6}], ids=str)
@pytest.mark.parametrize(("base", "theirs_class"), [(LLAMA, LlamaConfig), (MISTRAL, MistralConfig)])
def test_what_a_config_leaves_out_is_what_transformers_takes_it_to_be(
    base: dict[str, Any], theirs_class: Any, given: dict[str, Any]
) -> None:
    ours, theirs = ModelConfig.from_hf(base | given), theirs_class(**base | given)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert (ours.attention_bias, ours.mlp_bias) == (False, False)


def test_null_says_no_more_than_absence() -> None:
    nulls = dict.fromkeys(
        ("num_key_value_heads", "head_dim", "rope_scaling", "attention_bias", "torch_dtype")
    )
    assert ModelConfig.from_hf(LLAMA | nulls) == ModelConfig.from_hf(LLAMA)


def test_what_a_config_says_is_taken_over() -> None:
    config = ModelConfig.from_hf(
        LLAMA
        | {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "torch_dtype": "float16",
        }
    )
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (320, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 16, 8, 4)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 4096)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (True, True, True)
    assert config.dtype == "float16"


def test_a_sliding_window_is_mistrals_alone() -> None:
    assert ModelConfig.from_hf(MISTRAL | {"sliding_window": 1024}).sliding_window == 1024
    assert ModelConfig.from_hf(MISTRAL | {"sliding_window": None}).sliding_window is None
    assert ModelConfig.from_hf(LLAMA | {"sliding_window": 1024}).sliding_window is None


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
    ],
    ids=str,
)
def test_the_dtype_is_the_configs_or_else_the_files(said: dict[str, str], dtype: str) -> None:
    assert ModelConfig.from_hf(LLAMA | said, default_dtype="float16").dtype == dtype


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": []}, r"architecture \[\]"),
        ({"architectures": "Llama"}, "architecture 'Llama'"),
        ({"hidden_size": 64.0}, r"hidden_size .* got 64\.0"),
        ({"hidden_size": True}, "hidden_size .* got True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers .* got 0"),
        ({"num_hidden_layers": 1 << 20}, "num_hidden_layers .* from 1 to 4,096"),
        ({"hidden_size": 72}, r"hidden_size \(72\) is no multiple of num_attention_heads \(16\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(16\) .* num_key_value_heads \(3\)"),
        ({"head_dim": 5}, r"head_dim \(5\) must be even"),
        ({"head_dim": 0}, "head_dim .* got 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps .* got '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps .* got nan"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"hidden_act": ["silu"]}, r"hidden_act \['silu'\]"),
        ({"rope_theta": 1.0}, r"rope_theta \(1\.0\)"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "'full_attention'"),
        ({"rope_parameters": {"rope_type": ["default"]}}, r"rope_parameters: rope_type \['default'\]"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling: rope_type 'su'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, "factor must be a positive number, got -2"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, r"high_freq_factor \(1\.0\)"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 0}}, "truncate must be"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, r"head_dim \(2\)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"dtype": {"text": "float16"}}, "dtype .*'text'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadError, match=said) as raised:
        ModelConfig.from_hf(LLAMA | change)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 400


def test_mistrals_window_is_checked() -> None:
    with pytest.raises(ModelLoadError, match=r"sliding_window .* got 0"):
        ModelConfig.from_hf(MISTRAL | {"sliding_window": 0})


def test_gguf_metadata_say_what_a_config_says() -> None:
    config = ModelConfig.from_gguf(
        GGUF
        | {
            "llama.attention.head_count_kv": 2,
            "llama.attention.key_length": 32,
            "llama.rope.dimension_count": 32,
            "llama.rope.freq_base": 5e5,
        },
        tied=True,
        attention_bias=True,
    )
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (320, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 32)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 512)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (True, True, False)
    assert (config.rope.theta, config.rope.rope_type) == (5e5, "default")


def test_gguf_files_without_a_vocabulary_size_have_as_many_tokens_as_they_list() -> None:
    metadata = {key: value for key, value in GGUF.items() if key != "llama.vocab_size"}
    tokens = {"tokenizer.ggml.tokens": ["a", "b", "c"]}
    assert ModelConfig.from_gguf(metadata | tokens, tied=True).vocab_size == 3


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({}, ("default", 1.0, 512)),
        ({"llama.rope.scaling.type": "none"}, ("default", 1.0, 512)),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, ("linear", 2.0, 512)),
        ({"llama.rope.scale_linear": 4.0}, ("linear", 4.0, 512)),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 8.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            ("yarn", 8.0, 64),
        ),
    ],
    ids=str,
)
def test_gguf_rope_scaling(scaling: dict[str, Any], expected: tuple[str, float, int]) -> None:
    rope = ModelConfig.from_gguf(GGUF | scaling, tied=True).rope
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"general.architecture": "gemma3"}, "general.architecture 'gemma3'"),
        ({"general.architecture": None}, "general.architecture None"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.attention.head_count": [4, 4]}, r"llama\.attention\.head_count .* got \[4, 4\]"),
        ({"llama.embedding_length": 66}, r"llama\.embedding_length \(66\) is no multiple"),
        ({"llama.rope.dimension_count": 8}, r"llama\.rope\.dimension_count 8 of 16"),
        ({"llama.block_count": None}, r"llama\.block_count is missing"),
        ({"llama.vocab_size": None, "tokenizer.ggml.tokens": 5}, r"llama\.vocab_size is missing"),
        ({"llama.rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type 'longrope'"),
        ({"llama.rope.scaling.attn_factor": 2.0}, r"llama\.rope\.scaling\.attn_factor"),
    ],
    ids=str,
)
def test_a_gguf_value_that_cannot_be_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        ModelConfig.from_gguf(GGUF | change, tied=True)


@pytest.mark.parametrize(
    "factors", [(1.0,) * 7, (0.0,) * 8, (float("nan"),) * 8, (float("inf"),) * 8], ids=str
)
def test_rotary_frequency_factors_are_checked(factors: tuple[float, ...]) -> None:
    with pytest.raises(ModelLoadError, match="rotary frequency factors"):
        ModelConfig.from_gguf(GGUF, tied=True, frequency_factors=factors)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 4096),
        ({"rope_type": "linear", "factor": 2.5}, 10240),
        ({"rope_type": "linear", "factor": 0.5}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        (LLAMA3 | {"original_max_position_embeddings": 1024}, 4096),
    ],
)
def test_a_scaling_factor_stretches_the_context_that_can_be_served(
    scaling: dict[str, Any] | None, longest: int
) -> None:
    config = ModelConfig.from_hf(LLAMA | {"max_position_embeddings": 4096, "rope_scaling": scaling})
    assert config.longest_context == longest
