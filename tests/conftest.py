"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.demo_model import fetch_demo_model
from jaxserve.errors import ModelLoadError


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    try:
        return fetch_demo_model()
    except ModelLoadError as error:
        pytest.fail(str(error))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernel-cases", type=int, default=8, help="drawn cases for each kernel (the full run: 200)"
    )


@pytest.fixture(scope="session")
def kernel_cases(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--kernel-cases"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with heavy tests come first: with several processes, the one that is left with one of them would otherwise
    be waited for."""
    heavy = {item.path for item in items if item.get_closest_marker("heavy")}
    items.sort(key=lambda item: item.path not in heavy)
