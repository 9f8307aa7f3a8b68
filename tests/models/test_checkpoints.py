"""Checkpoints: every format gives the same numbers, and every fault one line that names it."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

from jaxserve.errors import ModelLoadError
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import checkpoint_slots
from jaxserve.models.loader import load_params, open_checkpoint, resolve_model
from jaxserve.models.loader.gguf import SUPPORTED_TYPES, GGUFCheckpoint, read_gguf_metadata
from tests.tiny_llama import tiny_config, tiny_weights, write_tiny_model

Weights = dict[str, np.ndarray]
TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(tensor: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: the halves of each head's dimensions interleaved."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(path: Path, config: dict[str, Any], weights: Weights, **metadata: str) -> Path:
    """A float32 GGUF file of a Hugging Face checkpoint."""
    writer = gguf.GGUFWriter(str(path), metadata.get("architecture", "llama"))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    for name, tensor in weights.items():
        if ".q_proj." in name:
            tensor = permuted(tensor, config["num_attention_heads"])
        elif ".k_proj." in name:
            tensor = permuted(tensor, config["num_key_value_heads"])
        parts = name.split(".")
        if parts[1] == "layers":
            name = f"blk.{parts[2]}.{TO_GGUF['.'.join(parts[3:-1])]}.{parts[-1]}"
        else:
            name = f"{TO_GGUF['.'.join(parts[:-1])]}.{parts[-1]}"
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(path: Path, dtype: Any = np.float32) -> Weights:
    checkpoint = open_checkpoint(path, "auto")
    tensors = {name: np.empty(shape, dtype) for name, shape in checkpoint.shapes().items()}
    for name, tensor in tensors.items():
        checkpoint.read_into(name, tensor)
    return tensors


@pytest.mark.parametrize("variant", ["gqa 2", "untied", "gqa 8"])
def test_gguf_and_safetensors_of_the_same_weights_are_equal_bit_for_bit(variant: str, tmp_path: Path) -> None:
    config = tiny_config(variant)
    weights = tiny_weights(config)
    from_gguf = read_all(write_gguf(tmp_path / "m.gguf", config, weights))
    from_safetensors = read_all(write_tiny_model(tmp_path / "hf", variant))
    assert from_gguf.keys() == from_safetensors.keys() == weights.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(from_gguf[name], tensor)
        np.testing.assert_array_equal(from_safetensors[name], tensor)
    ours, theirs = GGUFCheckpoint(tmp_path / "m.gguf").config, ModelConfig.from_hf(config)
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (
        theirs.num_heads,
        theirs.num_kv_heads,
        theirs.head_dim,
    )
    assert (ours.tie_word_embeddings, ours.rope.theta) == (theirs.tie_word_embeddings, theirs.rope.theta)


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_every_quantization_type_is_what_the_gguf_package_makes_of_it(kind: str, tmp_path: Path) -> None:
    config = tiny_config("gqa 2") | {"hidden_size": 256, "intermediate_size": 256}
    weights = tiny_weights(config)
    qtype = gguf.GGMLQuantizationType[kind]
    name = "model.layers.1.mlp.down_proj.weight"
    try:
        raw = quantize(weights[name], qtype)
    except NotImplementedError:  # the package can only read this type: any bytes are some numbers
        block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
        raw = np.random.RandomState(0).randint(0, 60, (256, 256 // block * block_bytes)).astype(np.uint8)
    path = write_gguf(tmp_path / "m.gguf", config, weights)
    expected = np.asarray(dequantize(raw, qtype), np.float32).reshape(256, 256)
    header = gguf.GGUFReader(str(path))
    writer = gguf.GGUFWriter(str(tmp_path / "q.gguf"), "llama")
    for key, field in header.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in header.tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            writer.add_tensor(tensor.name, raw, raw_dtype=qtype)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(read_all(tmp_path / "q.gguf")[name], expected)


def test_sharded_checkpoints_are_read_whole(tmp_path: Path) -> None:
    config = tiny_config("gqa 2")
    weights = tiny_weights(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, members in shards.items():
        save_file({name: weights[name] for name in members}, str(tmp_path / file))
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    read = read_all(tmp_path)
    assert read.keys() == weights.keys()
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"b\.safetensors"):
        open_checkpoint(tmp_path, "auto")


def test_bfloat16_is_read_as_it_is(tmp_path: Path) -> None:
    config = tiny_config("gqa 2") | {"dtype": "bfloat16"}
    weights = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tiny_weights(config).items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, str(tmp_path / "model.safetensors"))
    for name, tensor in read_all(tmp_path, ml_dtypes.bfloat16).items():
        np.testing.assert_array_equal(tensor.view(np.uint16), weights[name].view(np.uint16))


def place_all(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path, "auto")
    slots = checkpoint_slots(checkpoint.config)
    shapes: dict[str, tuple[int, ...]] = {}
    for slot in slots.values():
        rows = shapes.get(slot.param, (0,))[0]
        shapes[slot.param] = (max(rows, slot.row + slot.shape[0]), *slot.shape[1:])
    return load_params(checkpoint, [slots], shapes, np.dtype(np.float32), lambda *placed: placed[2])[0]


def test_projections_are_fused_in_the_order_q_k_v_and_gate_up(tmp_path: Path) -> None:
    weights = tiny_weights(tiny_config("gqa 2"))
    params = place_all(write_tiny_model(tmp_path / "m"))
    layer = "model.layers.0"
    qkv = [weights[f"{layer}.self_attn.{n}_proj.weight"] for n in "qkv"]
    np.testing.assert_array_equal(params["layers.0.self_attn.qkv_proj.weight"], np.concatenate(qkv))
    gate_up = [weights[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up")]
    np.testing.assert_array_equal(params["layers.0.mlp.gate_up_proj.weight"], np.concatenate(gate_up))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.norm.weight": None}, r"lacks model\.norm\.weight"),
        ({"model.extra": np.zeros(3, np.float32)}, r"no place for: model\.extra"),
        ({"model.norm.weight": np.zeros(3, np.float32)}, r"model\.norm\.weight has the shape \(3,\)"),
    ],
    ids=["missing", "surplus", "wrong shape"],
)
def test_a_wrong_tensor_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    weights = {**tiny_weights(tiny_config("gqa 2")), **change}
    save_file({k: v for k, v in weights.items() if v is not None}, str(tmp_path / "model.safetensors"))
    with pytest.raises(ModelLoadError, match=said):
        place_all(tmp_path)


def test_a_tied_models_copy_of_its_embedding_and_computed_buffers_are_passed_over(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    weights = tiny_weights(tiny_config("gqa 2"))
    weights |= {
        "lm_head.weight": weights["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
    }
    save_file(weights, str(tmp_path / "model.safetensors"))
    assert "lm_head.weight" not in place_all(tmp_path)


@pytest.mark.parametrize("shape", [(320, 64), (319, 64)])
def test_a_tied_model_with_an_output_matrix_of_its_own_is_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    write_tiny_model(tmp_path)
    weights = tiny_weights(tiny_config("gqa 2")) | {"lm_head.weight": np.zeros(shape, np.float32)}
    save_file(weights, str(tmp_path / "model.safetensors"))
    with pytest.raises(ModelLoadError, match="tie_word_embeddings, but the checkpoint's lm_head"):
        place_all(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, 600, 0.5, 0.99])
def test_truncated_files_are_said_to_be(keep: float, tmp_path: Path) -> None:
    safetensors = write_tiny_model(tmp_path / "hf") / "model.safetensors"
    gguf_file = write_gguf(tmp_path / "m.gguf", tiny_config("gqa 2"), tiny_weights(tiny_config("gqa 2")))
    for file, path in ((safetensors, safetensors.parent), (gguf_file, gguf_file)):
        data = file.read_bytes()
        file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        with pytest.raises(ModelLoadError, match=f"{file.name}.*(truncated|no GGUF)"):
            open_checkpoint(path, "auto")


@pytest.mark.parametrize("offset", [8, 16], ids=["tensor count", "entry count"])
def test_sizes_in_a_gguf_file_are_not_believed(offset: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_config("gqa 2"), tiny_weights(tiny_config("gqa 2")))
    data = bytearray(path.read_bytes())
    data[offset : offset + 8] = struct.pack("<Q", 1 << 60)
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"m\.gguf claims"):
        read_gguf_metadata(path)


@pytest.mark.parametrize("seed", range(200))
def test_corrupt_gguf_headers_end_in_one_clear_error_or_none(seed: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_config("gqa 2"), {})
    rng = np.random.RandomState(seed)
    data = bytearray(path.read_bytes())
    for position in rng.randint(4, len(data), 3):
        data[position] = rng.randint(256)
    path.write_bytes(data)
    faults = []
    try:
        read_gguf_metadata(path)
    except ModelLoadError as error:
        faults.append(str(error))
    assert all("m.gguf" in fault and "\n" not in fault for fault in faults)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architecture"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"vocab_size": "320"}, "vocab_size"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"dtype": "int8"}, "int8"),
    ],
    ids=str,
)
def test_a_config_that_is_not_supported_is_said_to_be(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        ModelConfig.from_hf(tiny_config("gqa 2") | change)


def test_things_that_are_no_model_are_refused_without_the_network(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    for thing in ("/nowhere/at/all", str(tmp_path / "file.txt"), "just-a-name", "a/b/c"):
        with pytest.raises(ModelLoadError):
            resolve_model(thing)
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path, "auto")


def test_loading_holds_little_more_than_one_parameter(tmp_path: Path) -> None:
    config = tiny_config("untied") | {"vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tiny_weights(config), str(tmp_path / "model.safetensors"))
    checkpoint = open_checkpoint(tmp_path, "auto")
    slots = checkpoint_slots(checkpoint.config)
    shapes = {slot.param: slot.shape for slot in slots.values()}
    for slot in slots.values():
        shapes[slot.param] = (max(shapes[slot.param][0], slot.row + slot.shape[0]), *slot.shape[1:])
    largest = 40_000 * 512 * 4
    tracemalloc.start()
    load_params(checkpoint, [slots], shapes, np.dtype(np.float32), lambda *placed: placed[2].shape)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * largest


@pytest.mark.model
def test_the_demo_model_is_the_one_that_was_checked(demo_model_path: Path) -> None:
    config = open_checkpoint(demo_model_path, "auto").config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert config.tie_word_embeddings
