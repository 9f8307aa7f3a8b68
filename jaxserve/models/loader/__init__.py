"""Checkpoints → arrays, name by name, shapes checked. Nothing here imports jax."""

from __future__ import annotations

from pathlib import Path

from jaxserve.config import LoadFormat
from jaxserve.errors import ModelLoadError
from jaxserve.models.loader.checkpoint import Checkpoint, Part, TensorSlot, load_params, scale_name
from jaxserve.models.loader.dummy import DummyCheckpoint
from jaxserve.models.loader.gguf import GGUFCheckpoint
from jaxserve.models.loader.hub import resolve_model
from jaxserve.models.loader.safetensors import SafetensorsCheckpoint

__all__ = [
    "Checkpoint",
    "Part",
    "TensorSlot",
    "load_params",
    "open_checkpoint",
    "resolve_model",
    "scale_name",
]


def open_checkpoint(path: Path, load_format: LoadFormat) -> Checkpoint:
    """Open a directory in Hugging Face form or a GGUF file.

    Raises:
        ModelLoadError: it is not what `load_format` says, or broken; one line that names the file.
    """
    is_gguf = path.suffix == ".gguf" and not path.is_dir()
    match load_format:
        case "dummy":
            return DummyCheckpoint(
                GGUFCheckpoint(path).config if is_gguf else SafetensorsCheckpoint.read_config(path)
            )
        case "gguf" if not is_gguf:
            raise ModelLoadError(f"--load-format gguf needs a .gguf file, got {path}.")
        case "safetensors" if is_gguf:
            raise ModelLoadError(f"--load-format safetensors needs a directory, got {path}.")
    return GGUFCheckpoint(path) if is_gguf else SafetensorsCheckpoint(path)
