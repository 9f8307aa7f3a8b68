"""GGUF files (llama.cpp's format): metadata, and tensors that are dequantized to float32 by the `gguf` package.

The header is parsed here and not by the package's reader: every size in it is untrusted and is checked against
the file before anything is allocated, and a vocabulary of 100,000 strings is read in a tenth of the time.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxserve.errors import ModelLoadError
from jaxserve.models.config import ModelConfig

MAGIC = b"GGUF"
MAX_METADATA_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 16
MAX_ARRAY_LENGTH = 1 << 22
MAX_STRING_BYTES = 1 << 24
MAX_METADATA_BYTES = 1 << 26  # several times what the largest vocabularies take
MAX_DIMENSIONS = 4
PIECE_SIZE = 1 << 19  # numbers read at once
# numbers that the package is told are a row: it dequantizes 16 rows at once, which the cache should hold
ROW_SIZE = 1 << 13
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9

SUPPORTED_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip

ROPE_FREQS = "rope_freqs.weight"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BLOCK_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class TensorInfo(NamedTuple):
    """One tensor's place: row-major shape, ggml type, absolute offset."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All metadata: numbers, strings, and arrays as lists.

    Raises:
        ModelLoadError: the file is truncated, corrupt or no GGUF file.
    """
    return _Header(path).metadata


class GGUFCheckpoint:
    """The tensors of a GGUF file under Hugging Face's names, dequantized to float32 as they are read."""

    def __init__(self, path: Path) -> None:
        import gguf  # imports numpy tables: only where a GGUF file is read

        self._path = path
        self._types = {value.value: value for value in gguf.GGMLQuantizationType}
        self._blocks = gguf.GGML_QUANT_SIZES
        header = _Header(path)
        file_bytes = path.stat().st_size
        self._infos: dict[str, TensorInfo] = {}
        for info in header.tensors:
            name = _hugging_face_name(info.name)
            if name in self._infos:
                raise ModelLoadError(f"{path} has the tensor {info.name!r:.200} twice.")
            self._check(info, file_bytes)
            self._infos[name] = info
        rope_freqs = self._infos.pop(ROPE_FREQS, None)
        self._config = ModelConfig.from_gguf(
            header.metadata,
            tied="lm_head.weight" not in self._infos,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in self._infos,
            mlp_bias="model.layers.0.mlp.gate_proj.bias" in self._infos,
            frequency_factors=None if rope_freqs is None else self._read_factors(rope_freqs),
            dtype=self._dtype(),
        )

    @property
    def config(self) -> ModelConfig:
        return self._config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self._infos.items()}

    def read_into(self, name: str, out: npt.NDArray[Any]) -> None:
        info, head_dim = self._infos[name], self._config.head_dim
        permuted = ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
        num_rows, *row_shape = info.shape
        step = num_rows  # of one dimension: a single row, which holds blocks that cannot be cut
        if row_shape:
            unit = head_dim if permuted else 1
            step = max(1, PIECE_SIZE // (math.prod(row_shape) * unit)) * unit
        with self._path.open("rb") as file:
            file.seek(info.offset)
            for start in range(0, num_rows, step):
                count = min(step, num_rows - start)
                piece = self._dequantize(file, info, (count, *row_shape))
                out[start : start + count] = _unpermute(piece, head_dim) if permuted else piece

    def _dequantize(
        self, file: BinaryIO, info: TensorInfo, shape: tuple[int, ...]
    ) -> npt.NDArray[np.float32]:
        """The next rows of a tensor, as many as `shape` has."""
        from gguf.quants import dequantize

        raw = np.fromfile(file, np.uint8, self._num_bytes(info, shape))
        if raw.size < self._num_bytes(info, shape):
            raise ModelLoadError(f"{self._path} ended while {info.name!r:.200} was being read.")
        block, block_bytes = self._blocks[self._types[info.type]]
        num_blocks = raw.size // int(block_bytes)
        per_row = next(n for n in range(max(1, ROW_SIZE // int(block)), 0, -1) if num_blocks % n == 0)
        rows = dequantize(raw.reshape(-1, per_row * int(block_bytes)), self._types[info.type])
        return np.asarray(rows, np.float32).reshape(shape)

    def _num_bytes(self, info: TensorInfo, shape: tuple[int, ...]) -> int:
        block, block_bytes = self._blocks[self._types[info.type]]
        return math.prod(shape) // int(block) * int(block_bytes)

    def _check(self, info: TensorInfo, file_bytes: int) -> None:
        kind = self._types.get(info.type)
        if kind is None or kind.name not in SUPPORTED_TYPES:
            shown = info.type if kind is None else kind.name
            raise ModelLoadError(
                f"{self._path}: the tensor {info.name!r:.200} is of type {shown}; "
                f"supported are {', '.join(SUPPORTED_TYPES)}."
            )
        if info.shape[-1] % self._blocks[kind][0]:
            raise ModelLoadError(
                f"{self._path}: the tensor {info.name!r:.200} has rows of {info.shape[-1]}, no whole blocks."
            )
        end = info.offset + self._num_bytes(info, info.shape)
        if end > file_bytes:
            raise ModelLoadError(
                f"{self._path} is truncated: the tensor {info.name!r:.200} ends {end - file_bytes:,} bytes beyond it."
            )

    def _read_factors(self, info: TensorInfo) -> tuple[float, ...]:
        with self._path.open("rb") as file:
            file.seek(info.offset)
            return tuple(self._dequantize(file, info, info.shape).reshape(-1).tolist())

    def _dtype(self) -> str:
        """That of most weights; bfloat16 for quantized ones, which have none of their own."""
        sizes: Counter[str] = Counter()
        for info in self._infos.values():
            sizes[self._types[info.type].name] += math.prod(info.shape)
        most = max(sizes, key=lambda name: sizes[name], default="F32")
        return {"F32": "float32", "F16": "float16"}.get(most, "bfloat16")


def _hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight → model.layers.3.self_attn.q_proj.weight; unknown names stay, to be reported."""
    if match := BLOCK_TENSOR.fullmatch(name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{NAMES.get(part, part)}.{kind}"
    base, _, kind = name.rpartition(".")
    return f"{NAMES[base]}.{kind}" if base in NAMES else name


def _unpermute(rows: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
    """llama.cpp interleaves the two halves of every head's rotary dimensions; Hugging Face keeps them apart.

    Args:
        rows: [heads * D, …] of any number of whole heads.
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


class _Header:
    """Metadata and list of tensors, read with every size bounded by the file's own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._data: mmap.mmap = data
                self._position = 0
                self._parse()
        except FileNotFoundError as error:
            raise ModelLoadError(f"{path} is missing.") from error
        except OSError as error:
            raise ModelLoadError(f"{path} cannot be read: {error.strerror}.") from error
        except (struct.error, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelLoadError(f"{path} is truncated or no GGUF file.") from error

    def _parse(self) -> None:
        if self._take(4) != MAGIC:
            raise ModelLoadError(f"{self._path} is no GGUF file.")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ModelLoadError(f"{self._path} is of GGUF version {version}; 2 and 3 are supported.")
        num_tensors, num_entries = self._scalar("<Q"), self._scalar("<Q")
        if num_tensors > MAX_TENSORS or num_entries > MAX_METADATA_ENTRIES:
            raise ModelLoadError(
                f"{self._path} claims {num_tensors:,} tensors and {num_entries:,} entries: corrupt."
            )
        self.metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
            if self._position > MAX_METADATA_BYTES:
                raise ModelLoadError(
                    f"{self._path}: more than {MAX_METADATA_BYTES:,} bytes of metadata: corrupt."
                )
        tensors = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ModelLoadError(f"{self._path}: general.alignment {alignment!r:.50} is corrupt.")
        start = -(-self._position // alignment) * alignment
        self.tensors = [info._replace(offset=start + info.offset) for info in tensors]

    def _tensor_info(self) -> TensorInfo:
        name = self._string()
        num_dimensions = self._scalar("<I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise ModelLoadError(
                f"{self._path}: the tensor {name!r:.200} has {num_dimensions} dimensions: corrupt."
            )
        # ggml lists the fastest dimension first
        shape = tuple(self._scalar("<Q") for _ in range(num_dimensions))[::-1]
        if not all(1 <= size <= 1 << 32 for size in shape):
            raise ModelLoadError(f"{self._path}: the tensor {name!r:.200} has the shape {shape}: corrupt.")
        return TensorInfo(name, shape, self._scalar("<I"), self._scalar("<Q"))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._array()
        if kind not in SCALARS:
            raise ModelLoadError(f"{self._path}: metadata of the unknown type {kind}: corrupt.")
        return self._scalar(SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, length = self._scalar("<I"), self._scalar("<Q")
        if length > MAX_ARRAY_LENGTH:
            raise ModelLoadError(f"{self._path}: an array of {length:,} members: corrupt.")
        if kind == STRING:
            return [self._string() for _ in range(length)]
        if kind not in SCALARS:
            raise ModelLoadError(f"{self._path}: an array of the unknown type {kind}: corrupt.")
        code = SCALARS[kind][1]
        return list(struct.unpack(f"<{length}{code}", self._take(length * struct.calcsize(f"<{code}"))))

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._data, self._position)
        self._position += 8
        if length > MAX_STRING_BYTES:
            raise ModelLoadError(f"{self._path}: a string of {length:,} bytes: corrupt.")
        return self._take(length).decode("utf-8", "surrogateescape")

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._data, self._position)
        self._position += struct.calcsize(code)
        return value

    def _take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise struct.error("beyond the end of the file")
        chunk = self._data[self._position : end]
        self._position = end
        return chunk
