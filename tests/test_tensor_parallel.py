"""A model on several devices says what it says on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.model_runner import ModelRunner
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import checkpoint_slots
from jaxserve.models.loader import TensorSlot, load_params, open_checkpoint
from jaxserve.sharding import SHARDED, DeviceGroup, TensorParallel, VocabShard, shard_config
from tests.tensor_parallel_worker import CASES, NUM_REQUESTS, case_name
from tests.tiny_llama import tiny_config, tiny_weights, write_tiny_model
from tests.two_devices_worker import PARTS

Array = npt.NDArray[Any]
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What 100 requests gave on each number of devices."""
    root = Path(__file__).parents[1]
    worker = [sys.executable, "-m", "tests.tensor_parallel_worker", str(tmp_path_factory.mktemp("tp"))]
    output = subprocess.check_output(
        worker, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, timeout=300
    )
    parsed: Results = json.loads(output)
    return parsed


@pytest.mark.heavy
@pytest.mark.parametrize(("kv_heads", "devices", "quantization"), [case for case in CASES if case[1] > 1])
def test_tokens_and_logprobs_are_those_of_one_device(
    results: Results, kv_heads: int, devices: int, quantization: str
) -> None:
    one, several = (results[case_name(kv_heads, n, quantization)] for n in (1, devices))
    assert len(one) == NUM_REQUESTS[quantization]
    for expected, found in zip(one, several, strict=True):
        assert found["tokens"] == expected["tokens"]
        assert found["top_ids"] == expected["top_ids"]
        for logprobs, those_of_one in zip(found["logprobs"], expected["logprobs"], strict=True):
            np.testing.assert_allclose(logprobs, those_of_one, rtol=0, atol=1e-5)


@pytest.mark.heavy
def test_the_requests_differ_from_each_other(results: Results) -> None:
    for outcome in results.values():
        assert len({str(request["tokens"]) for request in outcome}) > 0.9 * len(outcome)


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Any]]:
    """What parts of a step gave on one device and on two."""
    root = Path(__file__).parents[1]
    output = subprocess.check_output(
        [sys.executable, "-m", "tests.two_devices_worker"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        timeout=120,
    )
    parsed: dict[str, list[Any]] = json.loads(output)
    return parsed


@pytest.mark.heavy
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_step_is_what_it_is_on_one_device(parts: dict[str, list[Any]], part: str) -> None:
    one, two = (np.array(values) for values in parts[part])
    assert len(np.unique(one)) > 10
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-4)


# --- what each device gets ---------------------------------------------------------------------------------


def shapes_of(slots: dict[str, TensorSlot]) -> dict[str, tuple[int, ...]]:
    """Of a shard's parameters: as large as what goes into them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for slot in slots.values():
        shape = list(slot.shape)
        if slot.part is not None:
            shape[slot.part.axis] = slot.part.stop - slot.part.first
        rows = max(shapes.get(slot.param, (0,))[0], slot.row + shape[0])
        shapes[slot.param] = (rows, *shape[1:])
    return shapes


def load_shards(directory: Path, num_shards: int) -> list[dict[str, Array]]:
    checkpoint = open_checkpoint(directory, "auto")
    shards = [
        checkpoint_slots(checkpoint.config, num_shards=num_shards, shard=shard) for shard in range(num_shards)
    ]
    return load_params(
        checkpoint, shards, shapes_of(shards[0]), np.dtype(np.float32), lambda *placed: placed[2]
    )


def test_a_device_gets_the_rows_of_its_own_heads(tmp_path: Path) -> None:
    """4 heads and 2 kv heads of 8 dimensions on 4 devices: two of them share a kv head."""
    config = tiny_config("gqa 2")
    weights = tiny_weights(config)
    shards = load_shards(write_tiny_model(tmp_path / "m"), 4)
    D = config["hidden_size"] // config["num_attention_heads"]
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in ("q", "k", "v", "o")]
    q, k, v, o = (weights[name] for name in names)
    for i, shard in enumerate(shards):
        own, kv = slice(i * D, (i + 1) * D), slice(i // 2 * D, (i // 2 + 1) * D)
        expected = np.concatenate([q[own], k[kv], v[kv]])
        np.testing.assert_array_equal(shard["layers.1.self_attn.qkv_proj.weight"], expected)
        np.testing.assert_array_equal(shard["layers.1.self_attn.o_proj.weight"], o[:, own])


def test_each_tensor_is_read_once_and_whole_for_all_devices(tmp_path: Path) -> None:
    config = tiny_config("untied") | {"vocab_size": 65_536, "hidden_size": 256, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {n: s.shape for n, s in checkpoint_slots(ModelConfig.from_hf(config)).items()}
    save_file({n: np.ones(s, np.float32) for n, s in shapes.items()}, str(tmp_path / "model.safetensors"))
    checkpoint = open_checkpoint(tmp_path, "auto")
    read: list[str] = []
    read_into = checkpoint.read_into

    def count(name: str, out: Array) -> None:
        read.append(name)
        read_into(name, out)

    checkpoint.read_into = count  # type: ignore[method-assign]
    # a host with two of eight devices: the whole checkpoint is 128 MiB and more
    shards = [checkpoint_slots(checkpoint.config, num_shards=8, shard=shard) for shard in (2, 3)]
    tracemalloc.start()
    loaded = load_params(
        checkpoint, shards, shapes_of(shards[0]), np.dtype(np.float32), lambda *placed: placed[2]
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(read) == sorted(shapes)
    own = sum(array.nbytes for shard in loaded for array in shard.values())
    largest = 65_536 * 256 * 4
    assert own < 0.6 * largest
    assert peak < own + largest + 16e6


@pytest.mark.parametrize("vocab_size", [1, 127, 300, 32_000, 128_256])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
def test_the_devices_shares_are_the_vocabulary(vocab_size: int, size: int) -> None:
    share = VocabShard(vocab_size, TensorParallel(size)).num_local
    assert share * size >= vocab_size
    assert share * size <= vocab_size * (1 + size / 128) + 128 * size or vocab_size < 128


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 3, "--tensor-parallel-size 3 must divide the model's 4 attention heads"),
        ({}, 8, "--tensor-parallel-size 8 must divide the model's 4 attention heads"),
        ({"intermediate_size": 63}, 2, "must divide the model's 63 MLP columns"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96},
            2,
            "must divide the model's 3 kv heads, or be a multiple of them",
        ),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(changes: dict[str, int], size: int, message: str) -> None:
    config = ModelConfig.from_hf(tiny_config("gqa 2") | changes)
    with pytest.raises(ConfigError, match=message):
        shard_config(config, size)


def test_one_device_needs_no_mesh() -> None:
    group = DeviceGroup.of(1)
    assert isinstance(group.put_shards([np.ones(3, np.float32)]).sharding, SingleDeviceSharding)
    assert isinstance(group.put_everywhere(np.ones(3, np.float32)).sharding, SingleDeviceSharding)

    def step(x: jax.Array) -> jax.Array:
        return x

    assert group.spread(step, in_specs=(SHARDED,), out_specs=SHARDED) is step


def test_more_devices_than_there_are_is_refused(tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "m"))
    with pytest.raises(
        ConfigError, match="--tensor-parallel-size 4 needs 4 devices in each process; process 0 has 1"
    ):
        ModelRunner(EngineConfig(model=model, tensor_parallel_size=4))
