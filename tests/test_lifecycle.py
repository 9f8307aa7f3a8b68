"""How the server starts, drains, fails and ends: real processes, a tiny model."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server_process import running_server
from tests.tiny_llama import write_tiny_model

pytestmark = [pytest.mark.model, pytest.mark.timing]
UNAUTHORIZED = {
    "error": {
        "message": "Missing or wrong API key. Send it as `Authorization: Bearer <key>`.",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
}
STREAM: dict[str, Any] = {"model": "tiny", "prompt": [5, 6, 7], "stream": True, "ignore_eos": True}
# two sequences run at once: this one goes on for 16,000 steps, far longer than any signal takes
LONG_STREAM = STREAM | {"max_tokens": 250, "n": 128}


@pytest.fixture(scope="module")
def flags(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model with the demo model's tokenizer: prompts are ids."""
    model = write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    return [
        *("--model", str(model), "--tokenizer", str(demo_model_path), "--served-model-name", "tiny"),
        *("--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--kv-cache-memory-bytes", str(4 << 20)),
    ]


@pytest.fixture
def start(flags: list[str], tmp_path: Path) -> Any:
    def start(*more: str, **options: Any) -> Any:
        return running_server(tmp_path / "log", *flags, *more, **options)

    return start


def events(lines: Iterator[str]) -> Iterator[str]:
    """The data of an event stream."""
    for line in lines:
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(start: Any) -> None:
    with start() as server, ThreadPoolExecutor(1) as executor:
        engine = server.engine
        engine.suspend()  # so that the request is accepted and cannot end before all questions are asked
        running = executor.submit(server.post, "/v1/completions", STREAM | {"max_tokens": 50})
        deadline = time.monotonic() + 10
        while server.get("/load").json()["server_load"] == 0:
            assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGTERM)
        refused = server.wait_for_status("/health/ready", 503)
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["Retry-After"]) >= 1
        late = server.post("/v1/completions", STREAM)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        engine.resume()
        received = list(events(iter(running.result(30).text.splitlines())))
        assert received[-1] == "[DONE]"
        assert json.loads(received[-2])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(20) == 0


def test_what_is_left_at_the_shutdown_limit_ends_with_an_error(start: Any) -> None:
    with start("--shutdown-timeout", "0.2") as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG_STREAM, timeout=60) as response:
            received = events(response.iter_lines())
            next(received)
            server.process.send_signal(signal.SIGTERM)
            rest = list(received)
        assert json.loads(rest[-2])["error"]["code"] == "draining"
        assert rest[-1] == "[DONE]"
        assert server.process.wait(20) == 0


def test_a_second_signal_ends_it_at_once(start: Any) -> None:
    with start() as server:
        engine = server.engine
        engine.suspend()
        thread = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import httpx; httpx.post({server.url + '/v1/completions'!r}, json={STREAM!r}, timeout=30)",
            ],
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while server.get("/load").json()["server_load"] == 0:
            assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGINT)
        server.wait_for_status("/health/ready", 503)  # two signals at the same instant would be one
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(5) == 1
        assert not engine.is_running()
        thread.wait(10)


def test_a_dead_engine_turns_health_red_and_ends_open_streams(start: Any) -> None:
    with start() as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG_STREAM, timeout=60) as response:
            received = events(response.iter_lines())
            next(received)
            server.engine.kill()
            rest = list(received)
        assert rest[-1] == "[DONE]"
        error = json.loads(rest[-2])["error"]
        assert error["code"] == "engine_dead"
        for path in ("/health", "/health/ready", "/health/live", "/ping"):
            response = server.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead"), path
        late = server.post("/v1/completions", STREAM)
        assert (late.status_code, late.json()["error"]["type"]) == (503, "service_unavailable_error")
        assert server.get("/version").status_code == 200
        assert server.get("/load").json() == {"server_load": 0}


def test_a_stalled_engine_turns_health_red_until_it_moves_again(start: Any) -> None:
    with start("--stall-limit", "0.5") as server:
        engine = server.engine
        engine.suspend()
        try:
            failed = server.post("/v1/completions", STREAM | {"stream": False})
            assert (failed.status_code, failed.json()["error"]["code"]) == (503, "engine_stalled")
            assert server.get("/health/live").status_code == 503
        finally:
            engine.resume()
        server.wait_for_status("/health", 200)
        assert server.post("/v1/completions", STREAM | {"stream": False, "max_tokens": 2}).status_code == 200


def test_no_process_outlives_a_server_that_is_killed(start: Any) -> None:
    with start() as server:
        others = [server.engine, server.template_worker]
        server.process.kill()
        for process in others:
            process.wait(10)


def test_no_process_outlives_a_server_that_ends(start: Any) -> None:
    with start() as server:
        others = [server.engine, server.template_worker]
        server.process.terminate()
        assert server.process.wait(20) == 0
        assert not any(process.is_running() for process in others)


def test_a_full_queue_refuses_with_429_and_retry_after(start: Any) -> None:
    with start("--max-num-queued-reqs", "1") as server:
        server.engine.suspend()
        command = f"import httpx; httpx.post({server.url + '/v1/completions'!r}, json={STREAM!r}, timeout=30)"
        clients = [
            subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL) for _ in range(3)
        ]
        deadline = time.monotonic() + 20
        while server.get("/load").json()["server_load"] < 3:
            assert time.monotonic() < deadline
        refused = server.post("/v1/completions", STREAM)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["Retry-After"]) >= 1
        server.engine.resume()
        for client in clients:
            assert client.wait(30) == 0
        server.wait_until_idle()


def test_health_is_503_while_the_model_loads(start: Any) -> None:
    with start(ready=False) as server:
        early = server.wait_for_status("/health", 503)
        assert early.json()["error"]["code"] == "starting"
        assert server.get("/health/live").status_code == 200
        assert server.get("/v1/models").status_code == 503
        server.wait_for_status("/health", 200, 60)
        lines = server.log.read_text().splitlines()
        ours = [line for line in lines if re.fullmatch(r"[-\d]{10} [:,\d]{12} INFO jaxserve[.\w]*: .+", line)]
        assert lines == ours
        assert not [line for line in lines if "/health" in line and "jaxserve.access" in line]
        assert any("GET /v1/models 503" in line for line in lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_engine_begins_ends_it_with_status_0(
    start: Any, number: signal.Signals, tmp_path: Path
) -> None:
    socket_path = tmp_path / "api.sock"
    with start("--uds", str(socket_path), ready=False) as server:
        deadline = time.monotonic() + 20
        while not (children := psutil.Process(server.process.pid).children()):
            assert time.monotonic() < deadline
        server.process.send_signal(number)  # the web stack is being imported
        assert server.process.wait(20) == 0
        assert not socket_path.exists()
        gone, _ = psutil.wait_procs(children, 10)
        assert gone == children
        assert "Traceback" not in server.log.read_text()


def test_both_processes_honour_the_log_level(start: Any) -> None:
    with start("--log-level", "warning") as server:
        assert server.get("/v1/models").status_code == 200
        assert server.log.read_text() == ""
        assert {"--log-level", "warning"} <= set(server.engine.cmdline())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max-model-len", "100000"], "--max-model-len"),
        (["--kv-cache-memory-bytes", "1000"], "KV cache"),
        (["--tokenizer", "/nowhere"], "/nowhere"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--chat-template", "{% if %}"], "--chat-template"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--port", "many"], "--port"),
        (["--dtype", "int3"], "--dtype"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size"),
    ],
    ids=str,
)
def test_a_wrong_model_or_flag_ends_with_status_2_and_one_line(
    flags: list[str], more: list[str], said: str
) -> None:
    command = [sys.executable, "-m", "jaxserve.api", "--port", "0", *flags, *more]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if not line.startswith("20")]  # but for the log
    assert len(lines) == 1, result.stderr
    assert said in lines[0]


def test_keys_guard_every_route_but_the_probes(start: Any) -> None:
    with start("--api-key", "first", JAXSERVE_API_KEY="second,third") as server:
        for path in ("/health", "/health/live", "/health/ready", "/ping", "/version"):
            assert server.get(path).status_code == 200, path
        # sent as they are: clients would tidy some of these paths up
        for path in (
            "/v1/models",
            "/metrics",
            "/load",
            "/nope",
            "//health",
            "/v1/../health",
            "/health/",
            "/%2e/health",
        ):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            connection.request("GET", path, headers={"Host": "localhost/health"})
            refused = connection.getresponse()
            assert (refused.status, json.load(refused)) == (401, UNAUTHORIZED), path
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            connection.close()
        for key in ("first", "second", "third"):
            assert server.get("/v1/models", headers={"Authorization": f"bearer {key}"}).status_code == 200
        assert server.get("/v1/models", headers={"Authorization": "Bearer fourth"}).status_code == 401
        for process in (server.engine, server.template_worker):
            assert "second" not in "".join(process.environ().values())
        for secret in ("first", "second", "third"):
            assert secret not in server.log.read_text()


def test_only_the_engine_process_has_jax(start: Any) -> None:
    with start() as server:
        for pid in (server.process.pid, server.template_worker.pid):
            assert "jaxlib" not in Path(f"/proc/{pid}/maps").read_text()
        assert "jaxlib" in Path(f"/proc/{server.engine.pid}/maps").read_text()
