"""The package works from a bare checkout, as a wheel and installed editable, from any directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import jaxserve

ROOT = Path(__file__).parents[1]


def run_module(cwd: Path, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m …` with only `path` on the path before the environment's packages."""
    command = [sys.executable, "-m", *arguments]
    environment = {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def can_build_here() -> bool:
    """Whether the build needs no environment of its own, which would take longer and a package index."""
    try:
        return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for the build leaves files behind in its source."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    unwanted = shutil.ignore_patterns("__pycache__")
    for folder in ("jaxserve", "api", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=unwanted)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation"] * can_build_here() + ["--wheel-dir", str(directory), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = directory.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    expected = {"jaxserve/py.typed", "jaxserve/api/docs.html", "jaxserve/api/docs.css"}
    for folder, name in (("jaxserve", "jaxserve"), ("api", "jaxserve/api"), ("kernels", "jaxserve/kernels")):
        modules = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py"))
        expected |= {f"{name}/{module}" for module in modules}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (license_file,) = [name for name in names if name.endswith("/LICENSE")]
        assert b"Apache License" in archive.read(license_file)
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"jaxserve/api/app.py", "jaxserve/kernels/reference.py", "jaxserve/models/llama.py"} <= expected


def test_the_wheel_runs_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    result = run_module(tmp_path, tmp_path / "site", "jaxserve.api", "--version")
    assert (result.returncode, result.stdout) == (0, f"jaxserve {jaxserve.__version__}\n")


def test_the_wheel_has_the_version_that_the_program_says(wheel: Path) -> None:
    assert wheel.name == f"jaxserve-{jaxserve.__version__}-py3-none-any.whl"


@pytest.mark.parametrize("from_checkout", [True, False])
def test_the_bare_checkout_runs_from_anywhere(from_checkout: bool, tmp_path: Path) -> None:
    result = run_module(ROOT if from_checkout else tmp_path, ROOT, "jaxserve.api", "--version")
    assert (result.returncode, result.stdout) == (0, f"jaxserve {jaxserve.__version__}\n")


def test_the_api_process_and_the_package_itself_import_no_jax(tmp_path: Path) -> None:
    program = """import sys, jaxserve, jaxserve.api.server, jaxserve.engine_client
print(sorted({"jax", "jaxlib", "flax", "torch"} & sys.modules.keys()))"""
    command, environment = [sys.executable, "-c", program], {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert (result.returncode, result.stdout) == (0, "[]\n")


def test_the_engine_begins_before_the_web_stack_is_imported(tmp_path: Path) -> None:
    program = """import sys, jaxserve.api.__main__
print(sorted({"quart", "flask", "jaxserve.api.app", "jaxserve.api.server"} & sys.modules.keys()))"""
    command, environment = [sys.executable, "-c", program], {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert (result.returncode, result.stdout) == (0, "[]\n")
