"""The scripts, with a stand-in for the environment's Python that notes what it is asked to run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELL_SCRIPTS = (
    ".ci/run",
    "scripts/_environment.sh",
    "scripts/aot_check",
    "scripts/check",
    "scripts/serve",
    "scripts/test",
)
LIMIT_S = 30

# `python -m pip …` and `-m jaxserve.demo_model` are noted; the server notes its process id and waits for a signal.
STAND_IN = """#!/usr/bin/env bash
[ "$1" = -c ] && exit 0
[[ $1 == *_when_ready.py ]] && exit 0
echo "$@" >>"$NOTES"
case "$2" in
  pip) [ -z "${PIP_FAILS:-}" ] || { echo "pip says why" >&2; exit 1; } ;;
  jaxserve.demo_model) echo /models/demo.gguf ;;
  jaxserve.api)
    trap 'exit 7' TERM
    echo "$$"
    [ -n "${ENDS_WITH:-}" ] && exit "$ENDS_WITH"
    while :; do sleep 0.05; done ;;
esac
"""


class Environment:
    """A virtual environment with the stand-in.

    Attributes:
        variables: what scripts are run with.
    """

    def __init__(self, directory: Path) -> None:
        self._notes = directory / "notes"
        python = directory / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(STAND_IN)
        python.chmod(0o755)
        own = {"JAXSERVE_VENV": str(directory / "venv"), "NOTES": str(self._notes)}
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "JAXSERVE_JAX")}
        self.directory = directory
        self.variables = inherited | own

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """scripts/serve, from a directory that is not the checkout."""
        return subprocess.Popen(
            [ROOT / "scripts" / "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env=self.variables | variables,
        )

    def serve(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """scripts/serve with a server that ends at once; → exit status and stderr."""
        process = self.start(*arguments, **{"ENDS_WITH": "0"} | variables)
        _, errors = process.communicate(timeout=LIMIT_S)
        return process.returncode, errors

    def check_chips(self, **variables: str) -> tuple[int, str]:
        """scripts/aot_check --quick; → exit status and stderr."""
        result = subprocess.run(
            [ROOT / "scripts" / "aot_check", "--quick"],
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
            env=self.variables | {"JAXSERVE_AOT_VENV": self.variables["JAXSERVE_VENV"]} | variables,
        )
        return result.returncode, result.stderr

    def notes(self) -> list[str]:
        """What was run since the last call."""
        lines = self._notes.read_text().splitlines() if self._notes.exists() else []
        self._notes.unlink(missing_ok=True)
        return lines


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", [s for s in SHELL_SCRIPTS if "/_" not in s])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


def test_the_first_start_installs_and_the_second_does_not(environment: Environment) -> None:
    assert environment.serve("--port", "9000") == (
        0,
        "Installing jaxserve and what it needs (about a minute) …\n",
    )
    install, *rest = environment.notes()
    assert install.startswith("-m pip install")
    assert install.endswith(f"--editable {ROOT}")
    serve = "-m jaxserve.api --port 9000 --model /models/demo.gguf --served-model-name smollm2"
    assert rest == ["-m jaxserve.demo_model", serve]
    assert environment.serve("--port", "9000") == (0, "")
    assert environment.notes() == rest


def test_another_jax_is_another_installation(environment: Environment) -> None:
    environment.serve()
    environment.notes()
    environment.serve(JAXSERVE_JAX="jax==0.10.2")
    assert environment.notes()[0].endswith(" jax==0.10.2")


def test_an_installation_that_fails_shows_pips_words_and_is_tried_again(environment: Environment) -> None:
    status, errors = environment.serve(PIP_FAILS="1")
    assert status == 1
    assert errors.endswith("pip says why\n")
    environment.notes()
    assert environment.serve()[0] == 0
    assert "-m pip install" in environment.notes()[0]


def test_chips_are_not_taken_for_checked_where_there_are_no_compilers(environment: Environment) -> None:
    status, errors = environment.check_chips(PIP_FAILS="1")
    assert status == 1
    assert errors.endswith(
        "pip says why\naot_check: its compilers could not be installed, so nothing was checked.\n"
    )
    assert environment.check_chips()[0] == 0
    assert environment.notes()[-1] == f"{ROOT}/scripts/aot_check.py --quick"


@pytest.mark.parametrize(
    "arguments", [["--model", "DIR"], ["--model=DIR"], ["serve", "DIR"], ["--help"], ["-h"], ["--version"]]
)
def test_no_demo_model_where_none_is_needed(environment: Environment, arguments: Sequence[str]) -> None:
    environment.serve(*arguments)
    assert environment.notes()[1:] == ["-m jaxserve.api " + " ".join(arguments)]


def test_the_demo_models_name_can_be_chosen(environment: Environment) -> None:
    environment.serve("--served-model-name", "mine")
    assert environment.notes()[-1] == "-m jaxserve.api --served-model-name mine --model /models/demo.gguf"


def test_the_servers_exit_status_is_the_scripts(environment: Environment) -> None:
    assert environment.serve(ENDS_WITH="3")[0] == 3


def test_the_server_is_the_process_that_signals_reach(environment: Environment) -> None:
    process = environment.start()
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 7


def test_a_python_that_does_not_do_is_refused_by_name(environment: Environment) -> None:
    status, errors = environment.serve(
        PYTHON="/nowhere/python3", JAXSERVE_VENV=str(environment.directory / "new")
    )
    assert status == 1
    assert (
        errors
        == "PYTHON=/nowhere/python3 is not a Python of at least 3.11 with the modules venv and ensurepip.\n"
    )


@contextmanager
def answering(*statuses: int) -> Iterator[int]:
    """A server that answers with these, then with the last for ever; → its port."""
    remaining = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/health/ready"
            self.send_response(remaining.pop(0) if len(remaining) > 1 else remaining[0])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def when_ready(*flags: str, server: int | None = None, **variables: str) -> str:
    """What the watcher of a server prints; the server's process is this one unless it is given."""
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "_when_ready.py", str(server or os.getpid()), *flags],
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_S,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
    )
    assert result.stderr == ""
    return result.stdout


def test_the_example_comes_when_the_server_is_ready_with_its_address_and_model() -> None:
    with answering(503, 503, 200) as port:
        text = when_ready(
            "--model", "DIR", "--served-model-name", "a", "b", "--port", str(port), "--host", "0.0.0.0"
        )
    assert f"jaxserve is ready at http://127.0.0.1:{port}." in text
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in text
    assert f'OpenAI(base_url="http://127.0.0.1:{port}/v1", api_key="none")' in text
    assert text.count('"a"') == 2
    assert "Authorization" not in text


def test_keys_are_asked_for_and_not_shown() -> None:
    with answering(503, 200) as port:
        text = when_ready("--model", "DIR", "--port", str(port), JAXSERVE_API_KEY="key-of-the-variable")
    assert "-H 'Authorization: Bearer YOUR-KEY'" in text
    assert "key-of-the-variable" not in text


def test_a_server_that_was_there_before_is_not_taken_for_ours() -> None:
    with answering(200) as port:
        assert when_ready("--model", "DIR", "--port", str(port)) == ""


def test_the_watcher_ends_with_a_server_that_never_became_ready() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert when_ready("--model", "DIR", "--port", str(unused.getsockname()[1]), server=ended.pid) == ""


@pytest.mark.parametrize(
    "flags", [["--help"], ["--version"], ["--nonsense"], [], ["--model", "M", "--uds", "s"]]
)
def test_the_watcher_is_silent_where_there_is_no_address(flags: Sequence[str]) -> None:
    assert when_ready(*flags) == ""
