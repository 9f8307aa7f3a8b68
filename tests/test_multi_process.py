"""One engine in two processes: it serves what one process would, and neither outlives the other."""

from __future__ import annotations

import contextlib
import itertools
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
from jaxserve import lockstep as lockstep_module
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from tests.server_process import ServerProcess, running_server
from tests.tiny_llama import write_tiny_model

TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
LIMITS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 8, "kv_cache_memory_bytes": 4 << 20}
EXIT_LIMIT_S = 30
VALID: dict[str, Any] = {
    "model": "m",
    "coordinator_address": "10.0.0.1:8476",
    "num_processes": 2,
    "tensor_parallel_size": 4,
}
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def two_processes(
    model: Path, tokenizer: Path, directory: Path
) -> Iterator[tuple[ServerProcess, subprocess.Popen[bytes]]]:
    """A server whose engine has two devices here and two in a follower."""
    address = f"127.0.0.1:{free_port()}"
    flags = ["--tokenizer", str(tokenizer), "--served-model-name", "tiny"]
    flags += ["--tensor-parallel-size", "4", "--coordinator-address", address, "--num-processes", "2"]
    environment = TWO_DEVICES | {"JAXSERVE_CACHE": str(model.parent / "cache")}
    command = [sys.executable, "-m", "jaxserve.api", "--model", str(model), *flags]
    with (directory / "follower.log").open("wb") as log:
        follower = subprocess.Popen(
            [*command, "--process-id", "1"], stderr=log, cwd=directory, env=os.environ | environment
        )
    limits = [f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]
    try:
        with running_server(
            directory / "log", "--model", str(model), *flags, *limits, **environment
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


@pytest.mark.heavy
def test_two_processes_serve_what_one_does_until_one_of_them_dies(
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


# --- lockstep, without a model -----------------------------------------------------------------------------


@contextlib.contextmanager
def lockstep(*programs: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes 0 and 1, which have compiled these."""
    address = f"127.0.0.1:{free_port()}"
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.lockstep_process", address]
    processes = [
        subprocess.Popen(
            [*command, str(process_id), programs[process_id]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        for process_id in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    """What a process says next; XLA's collectives write there, too."""
    assert process.stdout is not None
    said = (line.strip() for line in process.stdout)
    return list(itertools.islice((line[2:] for line in said if line.startswith("> ")), count))


def test_followers_take_the_configuration_are_told_everything_in_order_and_end_with_process_0() -> None:
    with lockstep("the same", "the same") as (leader, follower):
        assert lines(leader, 1) == ["model 0 11 99"]
        assert lines(follower, 3) == ["model 1 11 99", "Table [0, 1, 2]", "Step [99998, 99999]"]
        assert leader.stdin is not None
        leader.stdin.close()
        assert (leader.wait(EXIT_LIMIT_S), follower.wait(EXIT_LIMIT_S)) == (0, 0)


@pytest.mark.parametrize("dead", [0, 1])
def test_whoever_loses_another_says_so_and_ends(dead: int) -> None:
    with lockstep("the same", "the same") as processes:
        lines(processes[1], 3)
        processes[dead].kill()
        survivor = processes[1 - dead]
        assert survivor.wait(EXIT_LIMIT_S) == 1
        assert survivor.stderr is not None
        assert f"Process {dead} has ended; its own log says why." in survivor.stderr.read()


def test_different_programs_are_found_before_one_of_them_hangs() -> None:
    with lockstep("a llama", "another") as (leader, follower):
        assert lines(leader, 2)[1] == "Process 1 has another model: it made another, process 0 a llama."
        assert (leader.wait(EXIT_LIMIT_S), follower.wait(EXIT_LIMIT_S)) == (2, 1)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """Of process 0 of two; whoever waits for it or for the others gives up at once."""
    monkeypatch.setattr(lockstep_module, "JOIN_LIMIT_S", 0.3)
    return EngineConfig(**VALID | {"coordinator_address": f"127.0.0.1:{free_port()}"})


def test_missing_processes_are_named(impatient: EngineConfig) -> None:
    reported: list[str] = []
    with pytest.raises(ConfigError, match=r"within 0 s no --process-id 1 came to 127\.0\.0\.1"):
        lockstep_module.join(impatient, report=reported.append)
    assert reported == [f"waiting at {impatient.coordinator_address} for 1 more of 2 processes"]


def test_a_missing_process_0_is_named(impatient: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"process 0 did not come to 127\.0\.0\.1"):
        lockstep_module.join(replace(impatient, process_id=1))


def test_an_address_of_another_machine_is_refused(impatient: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"--coordinator-address 192\.0\.2\.1:99: Cannot assign"):
        lockstep_module.join(replace(impatient, coordinator_address="192.0.2.1:99"))


def test_strangers_take_nobodys_place(impatient: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_are_here(config: EngineConfig, port: int) -> None:
        raise ConfigError(f"{config.num_processes} processes, JAX at {port}")

    ignore: Any = lambda _: None  # noqa: E731
    monkeypatch.setattr(lockstep_module, "JOIN_LIMIT_S", EXIT_LIMIT_S)
    monkeypatch.setattr(lockstep_module, "_initialize", all_are_here)
    host, port = lockstep_module.coordinator(impatient)

    def greet(greeting: bytes) -> bytes:
        """The beginning of the answer; nothing if there is none."""
        with lockstep_module._knock(host, port) as connection:
            connection.sendall(greeting)
            return connection.recv(1)

    ids = [7, 0, 1]  # process 1 is the only one that is missing
    greetings = [b"GET / HTTP", *(lockstep_module.GREETING + bytes([i, 0]) for i in ids)]
    with ThreadPoolExecutor(1) as executor:
        answers = executor.submit(lambda: [greet(greeting) for greeting in greetings])
        with pytest.raises(ConfigError, match="2 processes, JAX at"):
            lockstep_module.join(impatient, on_loss=ignore)
        assert [bool(answer) for answer in answers.result(EXIT_LIMIT_S)] == [False, False, False, True]


# --- flags -------------------------------------------------------------------------------------------------


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
