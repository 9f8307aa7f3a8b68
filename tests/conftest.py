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
