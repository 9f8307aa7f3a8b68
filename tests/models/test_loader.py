"""Loading: what a file claims is checked, what is read is placed at once, and every fault names its culprit."""

from __future__ import annotations

import json
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.errors import ModelLoadError
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import checkpoint_slots
from jaxserve.models.loader import Checkpoint, TensorSlot, load_params, open_checkpoint, resolve_model
from tests.tiny_llama import tiny_config, tiny_weights, write_tiny_model

Array = np.ndarray[Any, Any]
CONFIG = ModelConfig.from_hf(tiny_config("gqa 2"))
F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def param_shapes(slots: dict[str, TensorSlot]) -> dict[str, tuple[int, ...]]:
    """Of parameters that are as large as what goes into them."""
    rows: dict[str, int] = {}
    for slot in slots.values():
        rows[slot.param] = max(rows.get(slot.param, 0), slot.row + slot.shape[0])
    return {slot.param: (rows[slot.param], *slot.shape[1:]) for slot in slots.values()}


def load(checkpoint: Checkpoint, dtype: np.dtype[Any] = F32) -> dict[str, Array]:
    slots = checkpoint_slots(checkpoint.config)
    return load_params(checkpoint, [slots], param_shapes(slots), dtype, lambda *placed: placed[2])[0]


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    """A .safetensors file with any header."""
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


class Scripted:
    """A checkpoint of given tensors, which keeps a record of what was read."""

    def __init__(self, tensors: dict[str, Array]) -> None:
        self.stored = tensors
        self.log: list[str] = []
        self.config = CONFIG

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.stored.items()}

    def read_into(self, name: str, out: Array) -> None:
        self.log.append(f"read {name}")
        out[...] = self.stored[name]


def test_a_parameter_is_placed_as_soon_as_its_last_tensor_was_read() -> None:
    ones = np.ones((2, 4), np.float32)
    checkpoint = Scripted({"q": ones, "norm": np.ones(4, np.float32), "k": 2 * ones, "up": ones})
    slots = {
        "k": TensorSlot("qk", 2, (2, 4)),
        "q": TensorSlot("qk", 0, (2, 4)),
        "norm": TensorSlot("norm", 0, (4,)),
        "up": TensorSlot("up", 0, (2, 4)),
    }

    def place(_: int, name: str, array: Array) -> Array:
        checkpoint.log.append(f"place {name}")
        return array

    (params,) = load_params(checkpoint, [slots], param_shapes(slots), F32, place)
    assert checkpoint.log == [
        "read q", "read norm", "place norm", "read k", "place qk", "read up", "place up",
    ]  # fmt: skip
    np.testing.assert_array_equal(params["qk"], np.concatenate([ones, 2 * ones]))


@pytest.mark.parametrize("stored", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("wanted", [F32, F16, BF16], ids=str)
def test_parameters_norms_included_are_cast_as_numpy_casts(
    stored: np.dtype[Any], wanted: np.dtype[Any], tmp_path: Path
) -> None:
    path = write_tiny_model(tmp_path)
    weights = {name: tensor.astype(stored) for name, tensor in tiny_weights(tiny_config("gqa 2")).items()}
    save_file(weights, str(path / "model.safetensors"))
    params = load(open_checkpoint(path, "auto"), wanted)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        param = params[name.removeprefix("model.")]
        assert param.dtype == wanted
        np.testing.assert_array_equal(param, weights[name].astype(wanted))


def test_parameters_begin_where_the_cpu_backend_takes_them_without_a_copy() -> None:
    tensors = {str(i): np.ones((3, 5), np.float32) for i in range(20)}
    slots = {name: TensorSlot(name, 0, (3, 5)) for name in tensors}
    (params,) = load_params(Scripted(tensors), [slots], param_shapes(slots), BF16, lambda *placed: placed[2])
    assert {array.ctypes.data % 64 for array in params.values()} == {0}


@pytest.mark.parametrize("stored", [F32, BF16], ids=str)
def test_a_weight_beyond_float16_is_refused_and_not_made_infinite(
    stored: np.dtype[Any], tmp_path: Path
) -> None:
    path = write_tiny_model(tmp_path)
    weights = {name: tensor.astype(stored) for name, tensor in tiny_weights(tiny_config("gqa 2")).items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, str(path / "model.safetensors"))
    with pytest.raises(ModelLoadError, match=r"layers\.1\.mlp\.up_proj\.weight .* float16"):
        load(open_checkpoint(path, "auto"), F16)
    assert load(open_checkpoint(path, "auto"), BF16)


def test_nothing_is_read_of_a_checkpoint_that_does_not_fit() -> None:
    checkpoint = Scripted({"a": np.ones((2, 2), np.float32)})
    slots = {"a": TensorSlot("a", 0, (2, 2)), "b": TensorSlot("b", 0, (2,)), "c": TensorSlot("c", 0, (2,))}
    with pytest.raises(ModelLoadError, match="lacks b and 1 more"):
        load_params(checkpoint, [slots], param_shapes(slots), F32, lambda *placed: placed[2])
    assert checkpoint.log == []


def test_the_memory_that_loading_takes_is_the_parameters_and_a_few_megabytes(tmp_path: Path) -> None:
    config = tiny_config("untied") | {"vocab_size": 73_728, "hidden_size": 512, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {name: slot.shape for name, slot in checkpoint_slots(ModelConfig.from_hf(config)).items()}
    weights = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, str(tmp_path / "model.safetensors"))
    assert sum(w.nbytes for w in weights.values()) > 300e6
    del weights
    largest = 73_728 * 512
    for dtype in (F32, BF16):
        checkpoint = open_checkpoint(tmp_path, "auto")
        slots = checkpoint_slots(checkpoint.config)
        tracemalloc.start()
        load_params(checkpoint, [slots], param_shapes(slots), dtype, lambda *placed: placed[2].shape)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < largest * dtype.itemsize + 32e6


# --- safetensors --------------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ([1], "no JSON object"),
        ({"w": 5}, "tensor 'w' has a header that cannot be read"),
        ({"w": ENTRY | {"shape": [2.0]}}, "'w' has a header that cannot be read"),
        ({"w": ENTRY | {"shape": ["2"]}}, "'w' has a header that cannot be read"),
        ({"w": ENTRY | {"shape": [-2]}}, "'w' has a header that cannot be read"),
        ({"w": ENTRY | {"shape": [1] * 64}}, "'w' has a header that cannot be read"),
        ({"w": ENTRY | {"shape": [1 << 70]}}, "'w' has a header that cannot be read"),
        ({"w": ENTRY | {"shape": [1 << 62, 4]}}, "'w' has sizes that contradict"),
        ({"w": ENTRY | {"data_offsets": [8]}}, "'w' has a header that cannot be read"),
        ({"w": ENTRY | {"data_offsets": [8, 0]}}, "'w' has sizes that contradict"),
        ({"w": ENTRY | {"data_offsets": [8, 16]}}, "truncated: the tensor 'w' ends 8 bytes beyond"),
        ({"w": ENTRY | {"dtype": "F8_E4M3"}}, "'w' is of dtype 'F8_E4M3'; supported are F32, F16, BF16"),
        ({"w": {"dtype": "F32"}}, "'w' has a header that cannot be read"),
        ({"w\n" * 300: 5}, "has a header that cannot be read"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_safetensors_header_is_not_believed(header: object, said: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    write_header(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(ModelLoadError, match=said) as raised:
        open_checkpoint(tmp_path, "auto")
    message = str(raised.value)
    assert str(tmp_path / "model.safetensors") in message
    assert len(message.splitlines()) == 1
    assert len(message) < 600


@pytest.mark.parametrize("raw", [b"{", b"[" * 100_000, b"\xff\xfe"], ids=["cut", "nested", "no text"])
def test_a_safetensors_header_that_is_no_json_is_said_to_be(raw: bytes, tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors has a header that is no JSON"):
        open_checkpoint(tmp_path, "auto")


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    checkpoint = open_checkpoint(path, "auto")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors ended while model\."):
        load(checkpoint)


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "config.json").write_text(json.dumps(tiny_config("gqa 2")))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({}, "has no weight_map"),
        ("a.safetensors", "has no weight_map"),
        ({"w": 5}, "names 5, which is no file beside it"),
        ({"w": "../a.safetensors"}, r"names '\.\./a\.safetensors', which is no file beside it"),
        ({"w": "missing.safetensors"}, r"names missing\.safetensors, which is not there"),
        ({"w": "a.safetensors", "x": "b.safetensors"}, r"a\.safetensors lacks the tensor 'w'"),
    ],
    ids=str,
)
def test_an_index_is_checked_against_the_files(weight_map: object, said: str, tmp_path: Path) -> None:
    write_index(tmp_path, weight_map)
    for name in "ab":
        write_header(tmp_path / f"{name}.safetensors", {"x": ENTRY}, bytes(8))
    with pytest.raises(ModelLoadError, match=said):
        open_checkpoint(tmp_path, "auto")


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    write_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    write_header(tmp_path / "a.safetensors", {"x": ENTRY}, bytes(8))
    write_header(tmp_path / "b.safetensors", {"x": ENTRY, "y": ENTRY}, bytes(8))
    with pytest.raises(
        ModelLoadError, match=r"tensor 'x' is both in .*a\.safetensors and in .*b\.safetensors"
    ):
        open_checkpoint(tmp_path, "auto")


def test_a_config_without_a_dtype_has_that_of_the_weights(tmp_path: Path) -> None:
    config = {key: value for key, value in tiny_config("gqa 2").items() if key != "dtype"}
    weights = {name: tensor.astype(BF16) for name, tensor in tiny_weights(config).items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(F32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, str(tmp_path / "model.safetensors"))
    assert open_checkpoint(tmp_path, "auto").config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "is no JSON object"),
        ("[" * 100_000, "cannot be read"),
        ("\ud800", "cannot be read"),
    ],
    ids=["cut", "list", "nested", "no text"],
)
def test_a_config_that_is_no_json_object_is_said_to_be(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelLoadError, match=rf"config\.json {said}"):
        open_checkpoint(tmp_path, "auto")


# --- dummy weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gqa 2", "untied", "attention bias", "mlp bias", "head_dim"])
def test_dummy_weights_have_the_shapes_that_the_model_asks_for(variant: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(variant)))
    checkpoint = open_checkpoint(tmp_path, "dummy")
    assert checkpoint.shapes() == {
        name: slot.shape for name, slot in checkpoint_slots(checkpoint.config).items()
    }


def test_dummy_weights_keep_the_variance_of_what_goes_through_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("attention bias") | {"hidden_size": 256}))
    params = load(open_checkpoint(tmp_path, "dummy"), BF16)
    gate_up = params["layers.0.mlp.gate_up_proj.weight"].astype(np.float32)
    assert gate_up.std() == pytest.approx(256**-0.5, rel=0.05)
    assert abs(gate_up.mean()) < 0.01
    gate, up = np.split(gate_up, 2)
    assert abs(np.corrcoef(gate.ravel(), up.ravel())[0, 1]) < 0.05
    assert (params["norm.weight"] == 1).all()
    assert (params["layers.0.self_attn.o_proj.bias"] == 0).all()


def test_dummy_weights_are_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gqa 2")))
    first, second = (load(open_checkpoint(tmp_path, "dummy")) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


# --- which model --------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.mark.usefixtures("no_network")
def test_local_paths_are_taken_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    Path("org/model.gguf").write_bytes(b"")
    assert resolve_model("org/name") == tmp_path / "org/name"
    assert resolve_model("org/model.gguf") == tmp_path / "org/model.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org/name") == tmp_path / "org/name"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "model", ["name", "a/b/c", "/no/where", "./a/b", "../a", "a/", "-a/b", "https://a/b"]
)
def test_what_is_neither_a_path_nor_a_hub_id_is_refused_without_the_network(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match="There is no model at") as raised:
        resolve_model(model)
    assert model in str(raised.value)


@pytest.mark.usefixtures("no_network")
def test_a_file_that_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"model\.bin is neither a directory nor a \.gguf file"):
        resolve_model(str(tmp_path / "model.bin"))


def test_a_hub_id_is_downloaded_weights_config_and_tokenizer_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: list[tuple[str, Any]] = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("meta-llama/Llama-3.1-8B-Instruct") == tmp_path
    [(repo_id, options)] = asked
    assert repo_id == "meta-llama/Llama-3.1-8B-Instruct"
    wanted = {
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    others = {
        "README.md", "pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "original/consolidated.00.pth",
        "original/params.json", "model.Q4_1.gguf", ".gitattributes",
    }  # fmt: skip
    assert set(filter_repo_objects(sorted(wanted | others), **options)) == wanted


@pytest.mark.parametrize("kind", ["LocalEntryNotFoundError", "HFValidationError", "OSError", "HTTPError"])
def test_a_download_that_fails_says_why_in_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    # the last is the HTTP client's own, of whichever client the hub uses
    error = {"OSError": OSError, "HTTPError": errors.HfHubHTTPError.__bases__[0]}.get(kind) or getattr(
        errors, kind
    )

    def fail(*_: object, **__: object) -> None:
        raise error("no route to the hub\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelLoadError, match=r"^org/name could not be downloaded .*: no route to the hub$"):
        resolve_model("org/name")


@pytest.mark.parametrize(
    ("name", "load_format", "said"),
    [("m.gguf", "safetensors", "needs a directory"), ("m", "gguf", r"needs a \.gguf file")],
)
def test_a_load_format_that_the_path_contradicts_is_refused(
    name: str, load_format: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=said):
        open_checkpoint(tmp_path / name, load_format)


def test_a_directory_without_weights_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gqa 2")))
    with pytest.raises(ModelLoadError, match=r"has neither model\.safetensors nor model\.safetensors\.index"):
        open_checkpoint(tmp_path, "auto")


def test_a_directory_may_be_named_like_a_gguf_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "model.gguf"), "auto")
    assert checkpoint.config == ModelConfig.from_hf(tiny_config("gqa 2"))
