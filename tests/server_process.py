"""A real server in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

START_LIMIT_S = 120
EXIT_LIMIT_S = 30
POLL_S = 0.05


class ServerProcess:
    """A running server.

    Attributes:
        url: without a path.
        log: what it has written to stderr goes there.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    @property
    def engine(self) -> psutil.Process:
        """The engine process."""
        return self._child("jaxserve.engine_server")

    @property
    def template_worker(self) -> psutil.Process:
        """The process that renders what requests bring."""
        return self._child("jaxserve.template_worker")

    def _child(self, module: str) -> psutil.Process:
        (child,) = (c for c in psutil.Process(self.process.pid).children() if module in c.cmdline())
        return child

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10, **options)

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def metric(self, name: str) -> float:
        """The value of a metric without further labels."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"jaxserve:{name}{{"):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def wait_for_status(self, path: str, status: int, limit_s: float = 20.0) -> httpx.Response:
        """Poll until `path` answers with `status`."""
        deadline = time.monotonic() + limit_s
        while True:
            with contextlib.suppress(httpx.TransportError):
                response = self.get(path)
                if response.status_code == status:
                    return response
            assert self.process.poll() is None, f"the server has ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"{path} does not answer {status}:\n{self.log.read_text()}"
            time.sleep(POLL_S)

    def wait_until_idle(self, limit_s: float = 20.0) -> None:
        """Poll until nothing runs, nothing waits and every KV block is free."""
        deadline = time.monotonic() + limit_s
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        while any(self.metric(name) for name in names) or self.get("/load").json()["server_load"]:
            assert time.monotonic() < deadline, {name: self.metric(name) for name in names}
            time.sleep(POLL_S)


@contextlib.contextmanager
def running_server(log: Path, *flags: str, ready: bool = True, **environment: str) -> Iterator[ServerProcess]:
    """Start a server, wait until it is ready, and end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxserve.api", "--port", str(port), *flags]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, cwd=log.parent, env=os.environ | environment)
    server = ServerProcess(process, port, log)
    try:
        if ready:
            server.wait_for_status("/health/ready", 200, START_LIMIT_S)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(EXIT_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
