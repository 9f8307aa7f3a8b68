"""Checkpoints in Hugging Face form: config.json beside one or several .safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np
import numpy.typing as npt

from jaxserve.errors import ModelLoadError
from jaxserve.models.config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20  # the format's own limit
PIECE_BYTES = 4 << 20
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class SafetensorsCheckpoint:
    """The tensors of one or several .safetensors files. Headers are checked now, data are read when asked for."""

    def __init__(self, directory: Path) -> None:
        config = _read_json(directory / "config.json")
        ModelConfig.from_hf(config)  # an unsupported model is said to be, whatever its files hold
        self._tensors = _Tensors()
        for shard, expected in _shards(directory).items():
            self._tensors.add(shard, expected)
        self._config = ModelConfig.from_hf(config, default_dtype=self._tensors.most_common_dtype())

    @property
    def config(self) -> ModelConfig:
        return self._config

    @staticmethod
    def read_config(directory: Path) -> ModelConfig:
        """Raises ModelLoadError if there is none, or one that is not supported."""
        return ModelConfig.from_hf(_read_json(directory / "config.json"))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._tensors.items()}

    def read_into(self, name: str, out: npt.NDArray[Any]) -> None:
        entry = self._tensors[name]
        flat = out.reshape(-1)
        piece_size = PIECE_BYTES // entry.dtype.itemsize
        with entry.path.open("rb") as file:
            file.seek(entry.begin)
            for start in range(0, flat.size, piece_size):
                target = flat[start : start + piece_size]
                piece = np.fromfile(file, entry.dtype, target.size)
                if piece.size < target.size:
                    raise ModelLoadError(f"{entry.path} ended while {name} was being read.")
                target[...] = piece


class _Entry(NamedTuple):
    """One tensor's place: `begin` and `end` are offsets in the file."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


class _Tensors(dict[str, _Entry]):
    """The tensors of all files, in their order there."""

    def add(self, path: Path, expected: set[str]) -> None:
        """Read a file's header.

        Args:
            expected: the tensors that the index says are there.
        """
        entries = sorted(_entries(path), key=lambda item: item[1].begin)
        for name, entry in entries:
            if name in self:
                raise ModelLoadError(f"The tensor {name!r:.200} is both in {self[name].path} and in {path}.")
            self[name] = entry
        lacking = expected.difference(name for name, _ in entries)
        if lacking:
            raise ModelLoadError(
                f"{path} lacks the tensor {min(lacking)!r:.200}, which {INDEX_FILE} says it has."
            )

    def most_common_dtype(self) -> str:
        """Of the weights, by size; float32 if there are none."""
        sizes = dict.fromkeys(DTYPES.values(), 0)
        for entry in self.values():
            sizes[entry.dtype] += math.prod(entry.shape)
        return max(sizes, key=lambda dtype: sizes[dtype]).name


def _shards(directory: Path) -> dict[Path, set[str]]:
    """The files of a checkpoint, each with the tensors that the index, if there is one, says it has."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        raise ModelLoadError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}.")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} has no weight_map of names to files.")
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise ModelLoadError(f"{index} names {file!r:.100}, which is no file beside it.")
        shards.setdefault(directory / file, set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise ModelLoadError(f"{index} names {shard.name}, which is not there.")
    return dict(sorted(shards.items()))


def _entries(path: Path) -> Iterator[tuple[str, _Entry]]:
    """A file is an 8-byte length, a header in JSON of that length, and the data that it tells of."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise ModelLoadError(f"{path} is truncated or no safetensors file.")
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(
            f"{path} has a header that is no JSON: truncated or no safetensors file."
        ) from error
    if not isinstance(header, dict):
        raise ModelLoadError(f"{path} has a header that is no JSON object.")
    for name, value in header.items():
        if name != "__metadata__":
            yield name, _entry(path, name, value, 8 + header_bytes, size)


def _entry(path: Path, name: str, header: object, data_start: int, file_bytes: int) -> _Entry:
    fields = header if isinstance(header, dict) else {}
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ModelLoadError(f"{path}: the tensor {name!r:.200} has a header that cannot be read.")
    dtype = DTYPES.get(str(fields.get("dtype")))
    if dtype is None:
        raise ModelLoadError(
            f"{path}: the tensor {name!r:.200} is of dtype {fields.get('dtype')!r:.50}; "
            f"supported are {', '.join(DTYPES)}."
        )
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ModelLoadError(f"{path}: the tensor {name!r:.200} has sizes that contradict each other.")
    begin, end = data_start + offsets[0], data_start + offsets[1]
    if end > file_bytes:
        raise ModelLoadError(
            f"{path} is truncated: the tensor {name!r:.200} ends {end - file_bytes:,} bytes beyond it."
        )
    return _Entry(path, dtype, tuple(shape), begin, end)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """Whether it is a short list of integers, none negative."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
    )


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
