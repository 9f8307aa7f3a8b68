"""GGUF files: the demo model tensor by tensor, what is special about llama.cpp's layout, and corrupt files."""

from __future__ import annotations

import hashlib
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

from jaxserve.errors import ModelLoadError
from jaxserve.models.loader import gguf as loader
from jaxserve.models.loader import open_checkpoint
from jaxserve.models.loader.gguf import GGUFCheckpoint, read_gguf_metadata

Array = np.ndarray[Any, Any]
DATA = Path(__file__).parents[1] / "data"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 64, 4, 2, 16, 96, 128
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def new_writer(path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(path: Path, tensors: dict[str, Array], raw_dtype: Any = None) -> Path:
    """A file of these tensors, already in the form of `raw_dtype` if one is given."""
    writer = new_writer(path)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=raw_dtype)
    finish(writer)
    return path


def read(path: Path, name: str, dtype: Any = np.float32) -> Array:
    checkpoint = open_checkpoint(path, "auto")
    out = np.empty(checkpoint.shapes()[name], dtype)
    checkpoint.read_into(name, out)
    return out


def interleaved(tensor: Array, heads: int) -> Array:
    """llama.cpp's rows of q and k: of every head 0, D/2, 1, D/2 + 1, …, one by one."""
    order = [
        head * HEAD_DIM + half * HEAD_DIM // 2 + i
        for head in range(heads)
        for i in range(HEAD_DIM // 2)
        for half in range(2)
    ]
    return np.ascontiguousarray(tensor[order])


@pytest.mark.model
def test_every_tensor_of_the_demo_model_in_bfloat16_is_the_one_that_transformers_reads(
    demo_model_path: Path,
) -> None:
    expected: dict[str, str] = json.loads((DATA / "demo_sha256.json").read_text("utf-8"))
    checkpoint = open_checkpoint(demo_model_path, "auto")
    shapes = checkpoint.shapes()
    assert shapes.keys() == expected.keys()
    for name, shape in shapes.items():
        tensor = np.empty(shape, ml_dtypes.bfloat16)
        checkpoint.read_into(name, tensor)
        assert hashlib.sha256(tensor.tobytes()).hexdigest() == expected[name], name


@pytest.mark.parametrize("piece_size", [1, HIDDEN * HEAD_DIM + 1, HIDDEN * HEAD_DIM * 3, 1 << 30])
def test_pieces_of_any_size_make_up_the_same_tensor(
    piece_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((h * HEAD_DIM, HIDDEN), np.float32) for h in (HEADS, KV_HEADS))
    embedding = quantize(rng.standard_normal((VOCAB, HIDDEN), np.float32), Q8_0)
    writer = new_writer(tmp_path / "m.gguf")
    writer.add_tensor("blk.0.attn_q.weight", interleaved(q, HEADS))
    writer.add_tensor("blk.0.attn_k.weight", interleaved(k, KV_HEADS))
    writer.add_tensor("token_embd.weight", embedding, raw_dtype=Q8_0)
    finish(writer)
    monkeypatch.setattr(loader, "PIECE_SIZE", piece_size)
    path, layer = tmp_path / "m.gguf", "model.layers.0.self_attn"
    np.testing.assert_array_equal(read(path, f"{layer}.q_proj.weight"), q)
    np.testing.assert_array_equal(read(path, f"{layer}.k_proj.weight"), k)
    np.testing.assert_array_equal(read(path, "model.embed_tokens.weight"), dequantize(embedding, Q8_0))


def test_biases_of_q_and_k_are_unpermuted_like_their_weights(tmp_path: Path) -> None:
    q = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    k = np.arange(KV_HEADS * HEAD_DIM, dtype=np.float32)
    path = write(
        tmp_path / "m.gguf",
        {
            "blk.0.attn_q.bias": interleaved(q, HEADS),
            "blk.0.attn_k.bias": interleaved(k, KV_HEADS),
            "blk.0.attn_v.bias": k,
        },
    )
    for name, expected in (("q", q), ("k", k), ("v", k)):
        np.testing.assert_array_equal(read(path, f"model.layers.0.self_attn.{name}_proj.bias"), expected)
    assert open_checkpoint(path, "auto").config.attention_bias
    assert not open_checkpoint(path, "auto").config.mlp_bias


def test_what_a_gguf_file_does_not_state_is_read_from_its_list_of_tensors(tmp_path: Path) -> None:
    ones = np.ones((VOCAB, HIDDEN), np.float32)
    tied = write(tmp_path / "tied.gguf", {"token_embd.weight": ones})
    untied = write(tmp_path / "untied.gguf", {"token_embd.weight": ones, "output.weight": ones})
    biased = write(tmp_path / "biased.gguf", {"blk.0.ffn_gate.bias": np.ones(INNER, np.float32)})
    assert open_checkpoint(tied, "auto").config.tie_word_embeddings
    assert not open_checkpoint(untied, "auto").config.tie_word_embeddings
    assert open_checkpoint(biased, "auto").config.mlp_bias


def test_rope_factors_go_to_the_config_and_are_no_tensor(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", {"rope_freqs.weight": factors}), "auto")
    assert checkpoint.config.rope.frequency_factors == tuple(factors.tolist())
    assert checkpoint.shapes() == {}


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")]
)
def test_the_dtype_is_that_of_most_weights(kind: str, dtype: str, tmp_path: Path) -> None:
    qtype = gguf.GGMLQuantizationType[kind]
    writer = new_writer(tmp_path / "m.gguf")
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    writer.add_tensor(
        "token_embd.weight", quantize(np.ones((VOCAB, HIDDEN), np.float32), qtype), raw_dtype=qtype
    )
    finish(writer)
    assert open_checkpoint(tmp_path / "m.gguf", "auto").config.dtype == dtype


def test_a_dummy_of_a_gguf_file_needs_its_metadata_only(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", {}), "dummy")
    assert checkpoint.shapes()["model.embed_tokens.weight"] == (VOCAB, HIDDEN)


def test_a_large_quantized_tensor_is_dequantized_in_pieces(tmp_path: Path) -> None:
    blocks = np.zeros((32_768, 16, 34), np.uint8)  # Q8_0: a float16 scale and 32 bytes
    path = write(tmp_path / "m.gguf", {"token_embd.weight": blocks.reshape(32_768, -1)}, Q8_0)
    checkpoint = open_checkpoint(path, "auto")
    out = np.ones((32_768, 512), ml_dtypes.bfloat16)
    tracemalloc.start()
    checkpoint.read_into("model.embed_tokens.weight", out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not out.any()
    assert peak < 16e6 < out.nbytes


# --- files that lie -----------------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(
    *entries: bytes, tensors: tuple[bytes, ...] = (), version: int = 3, num_entries: int | None = None
) -> bytes:
    count = len(entries) if num_entries is None else num_entries
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), count)
    return start + b"".join(entries) + b"".join(tensors)


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, length: int, members: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + members


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def test_metadata_of_every_type_are_read(tmp_path: Path) -> None:
    scalars = {
        0: ("B", 200), 1: ("b", -100), 2: ("H", 60_000), 3: ("h", -30_000), 4: ("I", 1 << 31), 5: ("i", -(1 << 30)),
        6: ("f", 0.5), 7: ("?", True), 10: ("Q", 1 << 63), 11: ("q", -(1 << 62)), 12: ("d", 1e-300),
    }  # fmt: skip
    entries = [entry(f"k{kind}".encode(), kind, struct.pack(f"<{c}", v)) for kind, (c, v) in scalars.items()]
    lists = [
        entry(f"a{k}".encode(), 9, array(k, 2, struct.pack(f"<2{c}", v, v))) for k, (c, v) in scalars.items()
    ]
    entries += [*lists, entry(b"s", 8, string("é".encode()))]
    entries += [entry(b"l", 9, array(8, 2, string(b"a") + string(b"\xff"))), entry(b"e", 9, array(4, 0))]
    (tmp_path / "m.gguf").write_bytes(header(*entries))
    expected: dict[str, Any] = {f"k{kind}": value for kind, (_, value) in scalars.items()}
    expected |= {f"a{kind}": [value, value] for kind, (_, value) in scalars.items()}
    expected |= {"s": "é", "l": ["a", "\udcff"], "e": []}
    assert read_gguf_metadata(tmp_path / "m.gguf") == expected


HUGE = 1 << 62
LIES = {
    "no magic": (b"GGML" + bytes(100), "is no GGUF file"),
    "version 1": (header(version=1), "version 1; 2 and 3 are supported"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), "version 50331648"),
    "entries": (header(num_entries=1 << 20), "claims 0 tensors and 1,048,576 entries"),
    "entries beyond the end": (header(num_entries=5), "is truncated"),
    "string": (header(entry(b"k", 8, struct.pack("<Q", HUGE))), "a string of 4,6.* bytes: corrupt"),
    "string beyond the end": (header(entry(b"k", 8, struct.pack("<Q", 1000))), "is truncated"),
    "key": (header(struct.pack("<Q", HUGE)), "a string of 4,6.* bytes: corrupt"),
    "array": (header(entry(b"k", 9, array(0, HUGE))), "an array of 4,6.* members: corrupt"),
    "array beyond the end": (header(entry(b"k", 9, array(12, 1 << 20))), "is truncated"),
    "strings beyond the end": (header(entry(b"k", 9, array(8, 1 << 20))), "is truncated"),
    "array of arrays": (header(entry(b"k", 9, array(9, 1, array(9, 1)))), "an array of the unknown type 9"),
    "type": (header(entry(b"k", 77, bytes(8))), "metadata of the unknown type 77"),
    "alignment 0": (header(entry(b"general.alignment", 4, bytes(4))), "general.alignment 0 is corrupt"),
    "alignment text": (header(entry(b"general.alignment", 8, string(b"x"))), "general.alignment 'x' is corrupt"),
    "dimensions": (header(tensors=(tensor(b"w", (1,) * 5),)), "'w' has 5 dimensions"),
    "no dimension": (header(tensors=(tensor(b"w", ()),)), "'w' has 0 dimensions"),
    "empty dimension": (header(tensors=(tensor(b"w", (0,)),)), r"'w' has the shape \(0,\)"),
    "dimension": (header(tensors=(tensor(b"w", (HUGE,)),)), "'w' has the shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(name: str, tmp_path: Path) -> None:
    raw, said = LIES[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(ModelLoadError, match=said) as raised:
        read_gguf_metadata(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(raised.value)
    assert peak < 1e6


def test_more_metadata_than_any_model_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "MAX_METADATA_BYTES", 1000)
    (tmp_path / "m.gguf").write_bytes(header(*(entry(b"k", 9, array(0, 600, bytes(600))) for _ in range(3))))
    with pytest.raises(ModelLoadError, match="more than 1,000 bytes of metadata"):
        read_gguf_metadata(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([tensor(b"w", (32,), 99)], "'w' is of type 99; supported are F32, F16"),
        ([tensor(b"w", (256,), int(gguf.GGMLQuantizationType.IQ4_XS))], "'w' is of type IQ4_XS; supported"),
        ([tensor(b"w", (33, 2), int(Q8_0))], "'w' has rows of 33, no whole blocks"),
        ([tensor(b"w", (1 << 32,) * 4)], "truncated: the tensor 'w' ends"),
        ([tensor(b"w", (8,), 0, HUGE)], "truncated: the tensor 'w' ends"),
        ([tensor(b"w\n" * 400, (8,), 99)], "is of type 99"),
        ([tensor(b"output.weight", (8,)), tensor(b"output.weight", (8,))], "'output.weight' twice"),
        ([tensor(b"rope_freqs.weight", (8,))], "rotary frequency factors .* must be positive"),
    ],
    ids=range(8),
)
def test_a_list_of_tensors_that_lies_is_refused(tensors: list[bytes], said: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    metadata = {b"embedding_length": HIDDEN, b"attention.head_count": HEADS, b"feed_forward_length": INNER}
    metadata |= {b"block_count": 1, b"context_length": 128, b"vocab_size": VOCAB}
    entries = [entry(b"llama." + key, 4, struct.pack("<I", value)) for key, value in metadata.items()]
    entries.append(entry(b"llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)))
    entries.append(entry(b"general.architecture", 8, string(b"llama")))
    path.write_bytes(header(*entries, tensors=tuple(tensors)) + bytes(128))
    with pytest.raises(ModelLoadError, match=said) as raised:
        GGUFCheckpoint(path)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 600


def test_a_gguf_file_that_is_missing_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"m\.gguf is missing"):
        GGUFCheckpoint(tmp_path / "m.gguf")
    with pytest.raises(ModelLoadError, match=r"cannot be read: Is a directory"):
        read_gguf_metadata(tmp_path)
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"empty\.gguf is truncated or no GGUF file"):
        read_gguf_metadata(tmp_path / "empty.gguf")


def test_a_gguf_file_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"token_embd.weight": np.ones((VOCAB, HIDDEN), np.float32)})
    checkpoint = GGUFCheckpoint(path)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(ModelLoadError, match=r"m\.gguf ended while 'token_embd\.weight' was being read"):
        checkpoint.read_into("model.embed_tokens.weight", np.empty((VOCAB, HIDDEN), np.float32))
