"""A program that has been traced once is found again where all that its trace depends on is the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve import LLM, SamplingParams, model_runner, trace_cache
from jaxserve.kernels.reference import QuantizedPool
from jaxserve.logits_processors import SlotTables
from jaxserve.step import Pools, StepOutputs
from jaxserve.trace_cache import TraceCache
from tests.argmax_sampler import argmax_alone
from tests.tiny_llama import write_tiny_model


@pytest.fixture(autouse=True)
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path))
    return tmp_path / "traced"


class Doubling:
    """Functions that count how often they are traced; each start of a process has one of its own."""

    def __init__(self) -> None:
        self.num_traces = 0

    def anew(self) -> Callable[[jax.Array], jax.Array]:
        def double(x: jax.Array) -> jax.Array:
            self.num_traces += 1
            return 2 * x

        return double


ARGUMENTS = (jax.ShapeDtypeStruct((3,), jnp.float32),)


def test_what_has_been_traced_is_not_traced_again() -> None:
    function = Doubling()
    for _ in range(3):
        lowered = TraceCache("model").lower(function.anew(), ARGUMENTS, "program", donate=0)
        assert lowered.compile()(jnp.arange(3.0)).tolist() == [0.0, 2.0, 4.0]
    assert function.num_traces == 1


@pytest.mark.parametrize("differs", ["model", "program", "shape", "dtype", "code", "jax's settings"])
def test_another_program_is_traced_by_itself(differs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = Doubling()
    TraceCache("model").lower(function.anew(), ARGUMENTS, "program", donate=0)
    model, program, arguments = "model", "program", ARGUMENTS
    match differs:
        case "model":
            model = "another"
        case "program":
            program = "another"
        case "shape":
            arguments = (jax.ShapeDtypeStruct((4,), jnp.float32),)
        case "dtype":
            arguments = (jax.ShapeDtypeStruct((3,), jnp.bfloat16),)
        case "code":
            monkeypatch.setattr(trace_cache, "LOADED_CODE", "another version")
            monkeypatch.setattr(trace_cache, "code_digest", lambda: "another version")
    with jax.default_matmul_precision("float32" if differs == "jax's settings" else None):
        TraceCache(model).lower(function.anew(), arguments, program, donate=0)
    assert function.num_traces == 2


def test_a_change_of_any_module_makes_another_program() -> None:
    loaded = {
        Path(module.__file__).relative_to(trace_cache.ROOT)
        for name, module in sys.modules.items()
        if name.startswith("jaxserve.") and module.__file__
    }
    assert loaded >= {
        Path("step.py"),
        Path("kernels/blocked_attention.py"),
        Path("models/loader/__init__.py"),
    }
    assert loaded <= set(trace_cache.source_files())


def test_nothing_is_kept_or_found_where_the_source_is_no_longer_what_was_imported(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = Doubling()
    TraceCache("model").lower(function.anew(), ARGUMENTS, donate=0)
    before = sorted(directory.iterdir())
    monkeypatch.setattr(trace_cache, "code_digest", lambda: "upgraded meanwhile")
    for model in ("model", "another"):
        lowered = TraceCache(model).lower(function.anew(), ARGUMENTS, donate=0)
        assert lowered.compile()(jnp.ones(3)).tolist() == [2.0] * 3
    assert function.num_traces == 3
    assert sorted(directory.iterdir()) == before


def test_without_source_there_is_nothing_to_tell_versions_apart_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert trace_cache.code_digest() == trace_cache.LOADED_CODE is not None
    for root in (tmp_path, tmp_path / "missing"):
        monkeypatch.setattr(trace_cache, "ROOT", root)
        monkeypatch.setattr(trace_cache, "__file__", str(root / "trace_cache.pyc"))
        assert trace_cache.code_digest() is None


def test_what_jax_does_not_export_is_lowered_as_it_is(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def export(*_: Any) -> Any:
        raise ValueError("a custom call without guarantees")

    monkeypatch.setattr(jax.export, "export", export)
    lowered = TraceCache("model").lower(Doubling().anew(), ARGUMENTS, donate=0)
    assert lowered.compile()(jnp.ones(3)).tolist() == [2.0] * 3
    assert "cannot be kept: a custom call without guarantees" in caplog.text
    assert not directory.exists()


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_written_again(damage: bytes | None, directory: Path) -> None:
    function = Doubling()
    TraceCache("model").lower(function.anew(), ARGUMENTS, donate=0)
    (path,) = directory.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    for _ in range(2):
        lowered = TraceCache("model").lower(function.anew(), ARGUMENTS, donate=0)
        assert lowered.compile()(jnp.ones(3)).tolist() == [2.0] * 3
    assert function.num_traces == 2
    assert [file.name for file in directory.iterdir()] == [path.name]


def test_a_directory_that_cannot_be_written_costs_only_the_time(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory.write_text("a file")
    lowered = TraceCache("model").lower(Doubling().anew(), ARGUMENTS, donate=0)
    assert lowered.compile()(jnp.ones(3)).tolist() == [2.0] * 3
    assert f"cannot keep traced programs in {directory}" in caplog.text


@pytest.mark.parametrize("kv_dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_a_steps_structures_are_kept_and_its_pools_donated(kv_dtype: Any) -> None:
    def step(pools: Pools, tables: SlotTables) -> tuple[Pools, StepOutputs]:
        assert isinstance(pools.kv, QuantizedPool)
        outputs = StepOutputs(tables.bias_ids, pools.sampled, pools.tokens)
        kv = pools.kv._replace(scales=pools.kv.scales + tables.bias_values[0, 0])
        return pools._replace(kv=kv), outputs

    arguments = (
        Pools(
            QuantizedPool(jnp.zeros((2, 4), kv_dtype), jnp.ones(2)),
            jnp.zeros((2, 2), jnp.int32),
            jnp.array([5], jnp.int32),
            hidden=jnp.zeros((2, 1, 1)),
        ),
        SlotTables(jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 3.0), jnp.zeros((1, 1), jnp.uint32)),
    )
    for _ in range(2):  # traced, kept
        compiled = TraceCache().lower(step, arguments, donate=0).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.alias_size_in_bytes >= 2 * 4 + 2 * 4
        pools, outputs = compiled(jax.tree.map(jnp.copy, arguments[0]), arguments[1])
        assert isinstance(pools, Pools)
        assert pools.kv.scales.tolist() == [4.0, 4.0]
        assert outputs.candidates.tolist() == [5]
        assert pools.logits is None


def test_an_engine_started_from_what_was_traced_before_gives_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model_runner, "enable_compilation_cache", lambda: None)  # it would stay on
    model = write_tiny_model(tmp_path / "model")

    def generate() -> list[list[int]]:
        with argmax_alone():
            llm = LLM(
                str(model),
                skip_tokenizer=True,
                max_num_seqs=8,
                max_num_batched_tokens=16,
                kv_cache_memory_bytes=1 << 20,
            )
        outputs = llm.generate([[1, 2, 3], [4] * 20], SamplingParams(max_tokens=6))
        return [output.outputs[0].token_ids for output in outputs]

    traced = generate()

    def make_step(*args: Any, **kwargs: Any) -> Any:
        def step(*args: Any) -> None:
            raise AssertionError("it was traced again")

        return step

    monkeypatch.setattr(model_runner, "make_step", make_step)
    assert generate() == traced
