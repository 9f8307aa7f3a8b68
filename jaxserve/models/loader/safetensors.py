"""Checkpoints in Hugging Face form: config.json beside one or several .safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from jaxserve.errors import ModelLoadError
from jaxserve.models.config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20  # the format's own limit
DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class SafetensorsCheckpoint:
    """Reads tensors through a memory map: a tensor takes memory only while it is being copied."""

    def __init__(self, directory: Path) -> None:
        self._config = self.read_config(directory)
        self._files = [_File(path) for path in self._shards(directory)]

    @property
    def config(self) -> ModelConfig:
        return self._config

    @staticmethod
    def read_config(directory: Path) -> ModelConfig:
        """Raises ModelLoadError if there is none, or one that is not supported."""
        return ModelConfig.from_hf(_read_json(directory / "config.json"))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for file in self._files for name, entry in file.entries.items()}

    def tensors(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for file in self._files:
            yield from file.tensors()

    @staticmethod
    def _shards(directory: Path) -> list[Path]:
        if (directory / SINGLE_FILE).exists():
            return [directory / SINGLE_FILE]
        if not (directory / INDEX_FILE).exists():
            raise ModelLoadError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}.")
        weight_map = _read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ModelLoadError(f"{directory / INDEX_FILE} has no weight_map of names to files.")
        shards = [directory / Path(name).name for name in sorted(set(weight_map.values()))]
        for shard in shards:
            if not shard.exists():
                raise ModelLoadError(f"{directory / INDEX_FILE} names {shard.name}, which is not there.")
        return shards


class _Entry:
    """One tensor's place in a file."""

    def __init__(self, path: Path, name: str, header: dict[str, Any], num_data_bytes: int) -> None:
        try:
            self.dtype = np.dtype(DTYPES[header["dtype"]])
            self.shape = tuple(int(size) for size in header["shape"])
            self.begin, self.end = (int(offset) for offset in header["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelLoadError(
                f"{path}: the tensor {name} has a header that cannot be read: {error}."
            ) from error
        num_bytes = self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))
        if min(self.shape, default=1) < 0 or self.end - self.begin != num_bytes or self.begin < 0:
            raise ModelLoadError(f"{path}: the tensor {name} has sizes that contradict each other.")
        if self.end > num_data_bytes:
            raise ModelLoadError(
                f"{path} is truncated: the tensor {name} ends {self.end - num_data_bytes:,} bytes beyond it."
            )


class _File:
    """One .safetensors file: an 8-byte length, a JSON header, the data."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise ModelLoadError(f"{path} is truncated or no safetensors file.")
            try:
                header = json.loads(file.read(header_bytes))
            except (ValueError, RecursionError) as error:
                raise ModelLoadError(
                    f"{path} has a header that is no JSON: truncated or no safetensors file."
                ) from error
        if not isinstance(header, dict):
            raise ModelLoadError(f"{path} has a header that is no JSON object.")
        self._path = path
        self._data_start = 8 + header_bytes
        header.pop("__metadata__", None)
        entries = {name: _Entry(path, name, entry, size - self._data_start) for name, entry in header.items()}
        self.entries = dict(sorted(entries.items(), key=lambda item: item[1].begin))

    def tensors(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        data = np.memmap(self._path, mode="r", offset=0)
        for name, entry in self.entries.items():
            raw = data[self._data_start + entry.begin : self._data_start + entry.end]
            # copied: the data need not be aligned in the file
            yield name, np.frombuffer(raw.tobytes(), entry.dtype).reshape(entry.shape)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path} is missing.") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read: {str(error)[:100]}.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is no JSON object.")
    return value
