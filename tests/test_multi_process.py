"""One engine in two processes: it serves what one process would, and neither outlives the other."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from tests.server_process import ServerProcess, running_server
from tests.tiny_llama import write_tiny_model

TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
LIMITS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "kv_cache_memory_bytes": 4 << 20}
EXIT_LIMIT_S = 30
PROMPTS = [[5, 6, 7], list(range(20, 60)), [9] * 17]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9},
    {"temperature": 0.8, "seed": 4, "allowed_token_ids": list(range(40, 90))},
    {"temperature": 0.0, "logit_bias": {"17": 8.0, "230": 7.0}, "frequency_penalty": 1.5},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@contextlib.contextmanager
def two_processes(
    model: Path, tokenizer: Path, directory: Path, other_model: Path | None = None, *, ready: bool = True
) -> Iterator[tuple[ServerProcess, subprocess.Popen[bytes]]]:
    """A server whose engine has two devices here and two in a follower. The second start finds its programs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = ["--tokenizer", str(tokenizer), "--served-model-name", "tiny"]
    flags += ["--tensor-parallel-size", "4", "--coordinator-address", address, "--num-processes", "2"]
    environment = TWO_DEVICES | {"JAXSERVE_CACHE": str(model.parent / "cache")}
    command = [sys.executable, "-m", "jaxserve.api", "--model", str(other_model or model), *flags]
    with (directory / "follower.log").open("wb") as log:
        follower = subprocess.Popen(
            [*command, "--process-id", "1"], stderr=log, cwd=directory, env=os.environ | environment
        )
    limits = [f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]
    try:
        with running_server(
            directory / "log", "--model", str(model), *flags, *limits, ready=ready, **environment
        ) as server:
            yield server, follower
    finally:
        follower.kill()
        follower.wait()


def completion(server: ServerProcess, prompt: list[int], **options: Any) -> list[int]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}
    response = server.post("/v1/completions", body | options | {"return_tokens_as_token_ids": True})
    assert response.status_code == 200, response.text
    tokens = response.json()["choices"][0]["logprobs"]["tokens"]
    return [int(token.removeprefix("token_id:")) for token in tokens]


def test_two_processes_serve_what_one_does_and_end_together(
    model: Path, demo_model_path: Path, tmp_path: Path
) -> None:
    llm = LLM(str(model), skip_tokenizer=True, compilation_cache=False, **LIMITS)
    cases = [(prompt, settings) for prompt in PROMPTS for settings in SETTINGS]
    params = []
    for _, settings in cases:
        fields = settings | {"max_tokens": 12, "ignore_eos": True}
        if "logit_bias" in fields:
            fields["logit_bias"] = tuple((int(i), bias) for i, bias in fields["logit_bias"].items())
        params.append(SamplingParams(**fields))
    expected = [r.outputs[0].token_ids for r in llm.generate([prompt for prompt, _ in cases], params)]
    with two_processes(model, demo_model_path, tmp_path) as (server, follower):
        with ThreadPoolExecutor(len(cases)) as executor:
            found = list(executor.map(lambda case: completion(server, case[0], **case[1]), cases))
        assert found == expected
        assert server.metric("xla_compilations_total") == 0
        server.process.terminate()
        assert server.process.wait(EXIT_LIMIT_S) == 0
        assert follower.wait(EXIT_LIMIT_S) == 0, (tmp_path / "follower.log").read_text()


def test_a_follower_that_dies_takes_the_engine_with_it(
    model: Path, demo_model_path: Path, tmp_path: Path
) -> None:
    with two_processes(model, demo_model_path, tmp_path) as (server, follower):
        engine = server.engine
        with ThreadPoolExecutor(1) as executor:
            body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 250, "n": 64, "ignore_eos": True}
            running = executor.submit(server.post, "/v1/completions", body)
            while not server.metric("num_requests_running"):
                assert not running.done()
            follower.kill()
            response = running.result(EXIT_LIMIT_S)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
        assert server.wait_for_status("/health", 503).json()["error"]["code"] == "engine_dead"
        assert server.get("/health/live").status_code == 503
        engine.wait(EXIT_LIMIT_S)


def test_processes_with_different_models_end_before_a_step_hangs(
    model: Path, demo_model_path: Path, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", "attention bias")
    with two_processes(model, demo_model_path, tmp_path, other, ready=False) as (server, follower):
        assert server.process.wait(EXIT_LIMIT_S) == 2
        assert "Process 1 has another model" in server.log.read_text().splitlines()[-1]
        assert follower.wait(EXIT_LIMIT_S) == 1
        assert "Process 0 has ended" in (tmp_path / "follower.log").read_text()


# --- flags -------------------------------------------------------------------------------------------------

VALID: dict[str, Any] = {
    "model": "m",
    "coordinator_address": "10.0.0.1:8476",
    "num_processes": 2,
    "tensor_parallel_size": 4,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator_address": None}, "--coordinator-address and --num-processes .* given together"),
        ({"num_processes": 1}, "--coordinator-address and --num-processes .* given together"),
        ({"num_processes": 0}, "--num-processes must be an integer of at least 1"),
        ({"process_id": 2}, "--process-id must be between 0 and 1"),
        ({"process_id": -1}, "--process-id must be between 0 and 1"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size must be a multiple of --num-processes 2"),
        ({"coordinator_address": "host"}, "--coordinator-address must be host:port"),
        ({"coordinator_address": ":80"}, "--coordinator-address must be host:port"),
        ({"coordinator_address": "host:99999"}, "--coordinator-address must be host:port"),
    ],
)
def test_processes_that_cannot_meet_are_refused(changes: dict[str, Any], message: str) -> None:
    assert asdict(EngineConfig(**VALID))["num_processes"] == 2
    with pytest.raises(ConfigError, match=message):
        replace(EngineConfig(**VALID), **changes)
