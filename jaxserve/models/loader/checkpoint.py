"""What a checkpoint is to the loader, and how its tensors become parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from jaxserve.errors import ModelLoadError
from jaxserve.models.config import ModelConfig

T = TypeVar("T")
Array = npt.NDArray[Any]

# Buffers that old exporters saved although they are computed, not learned
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
QUANTIZED_PIECE = 1 << 20  # numbers quantized at once: what they take in float32 is little beside a tensor
INT8_MAX = 127.0
ALIGNMENT = 64  # bytes: XLA:CPU takes an array that begins at a multiple of it as it is, without a copy


class Part(NamedTuple):
    """[first, stop) of a tensor along one axis."""

    axis: int
    first: int
    stop: int


class TensorSlot(NamedTuple):
    """Where a checkpoint tensor of `shape` goes: its part (None: all of it) to the rows of parameter `param` from
    `row` on. Rows that no tensor fills are zero."""

    param: str
    row: int
    shape: tuple[int, ...]
    part: Part | None = None


class Checkpoint(Protocol):
    """Named tensors, under Hugging Face's names for the Llama family."""

    @property
    def config(self) -> ModelConfig: ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in file order."""
        ...

    def read_into(self, name: str, out: Array) -> None:
        """Copy a tensor into `out` (of the tensor's shape, C-contiguous), cast to its dtype.

        It is read in pieces of a few megabytes, so that `out` is all the memory that a tensor takes.

        Raises:
            ModelLoadError: the file ended early; the message names it.
        """
        ...


def load_params(
    checkpoint: Checkpoint,
    shards: Sequence[Mapping[str, TensorSlot]],
    param_shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype[Any],
    place: Callable[[int, str, Array], T],
    quantized: Collection[str] = (),
) -> list[dict[str, T]]:
    """Fill every parameter of every shard, in file order, and place it as soon as its last tensor has been read.

    A tensor is read once, whatever the number of shards; one that is cut exists whole until all have their part.

    Args:
        shards: for each chip to load for: for every tensor that must be there, where it goes. Together they fill
            every parameter. All cut the same tensors.
        param_shapes: of every parameter; a shard's.
        dtype: that parameters are cast to.
        place: puts a finished parameter of the n-th shard on its device. It owns the array from then on.
        quantized: parameters that become int8, tensor by tensor. Each brings a parameter `scale_name`, float32, of
            one number a row. The tensor at hand exists in `dtype` as well.

    Raises:
        ModelLoadError: a tensor is missing, surplus, of a wrong shape or beyond the range of `dtype`; the first
            one is named.
    """
    ignored = _check_tensors(checkpoint, shards[0])
    if HEAD in ignored:
        _check_tie(checkpoint, dtype)
    remaining = Counter(slot.param for slot in shards[0].values())
    buffers: dict[str, list[Array]] = {}
    placed: list[dict[str, T]] = [{} for _ in shards]
    for name in checkpoint.shapes():
        if name in ignored:
            continue
        param = shards[0][name].param
        own_slots = [slots[name] for slots in shards]
        # no name here keeps a placed buffer alive
        if param in quantized:
            if param not in buffers:
                buffers[param] = [_zeros(param_shapes[param], np.dtype(np.int8)) for _ in shards]
                buffers[scale_name(param)] = [
                    _zeros(param_shapes[param][:1], np.dtype(np.float32)) for _ in shards
                ]
            _fill_quantized(checkpoint, name, own_slots, dtype, buffers[param], buffers[scale_name(param)])
        else:
            if param not in buffers:
                buffers[param] = [_zeros(param_shapes[param], dtype) for _ in shards]
            _fill(checkpoint, name, own_slots, buffers[param])
        remaining[param] -= 1
        if remaining[param] > 0:
            continue
        for finished_name in (param, scale_name(param)) if param in quantized else (param,):
            finished = buffers.pop(finished_name)
            for shard in reversed(range(len(shards))):
                placed[shard][finished_name] = place(shard, finished_name, finished.pop())
    return placed


def scale_name(param: str) -> str:
    """The parameter with the scales of a quantized weight."""
    return f"{param.removesuffix('weight')}scale"


def quantize_rows(tensor: Array) -> tuple[Array, Array]:
    """[rows, columns] → int8 of the same shape and the rows' scales, float32 [rows]: what is largest in a row
    becomes ±127."""
    values, scales = np.empty(tensor.shape, np.int8), np.empty(len(tensor), np.float32)
    step = max(1, QUANTIZED_PIECE // tensor.shape[1])
    for start in range(0, len(tensor), step):
        rows = tensor[start : start + step].astype(np.float32)
        largest = np.abs(rows).max(axis=1)
        scales[start : start + step] = largest / np.float32(INT8_MAX)
        rows /= np.where(largest > 0, scales[start : start + step], np.float32(1))[:, None]
        values[start : start + step] = np.rint(rows)
    return values, scales


def _fill(checkpoint: Checkpoint, name: str, slots: list[TensorSlot], buffers: list[Array]) -> None:
    """Read a tensor and put its parts where they belong."""
    row, shape = slots[0].row, slots[0].shape
    if slots[0].part is None:
        first, *others = (buffer[row : row + shape[0]] for buffer in buffers)
        _read(checkpoint, name, first)
        for other in others:
            other[...] = first
        return
    tensor = _zeros(shape, buffers[0].dtype)
    _read(checkpoint, name, tensor)
    for slot, buffer in zip(slots, buffers, strict=True):
        _put(tensor, slot, buffer)


def _fill_quantized(
    checkpoint: Checkpoint,
    name: str,
    slots: list[TensorSlot],
    dtype: np.dtype[Any],
    values: list[Array],
    scales: list[Array],
) -> None:
    """Likewise, quantized before it is cut: every chip has the scales of whole rows."""
    tensor = _zeros(slots[0].shape, dtype)
    _read(checkpoint, name, tensor)
    if not np.isfinite(tensor).all():
        raise ModelLoadError(
            f"The tensor {name} has values that are no finite numbers: int8 cannot hold them."
        )
    quantized, row_scales = quantize_rows(tensor)
    for slot, value_buffer, scale_buffer in zip(slots, values, scales, strict=True):
        _put(quantized, slot, value_buffer)
        _put(row_scales, slot, scale_buffer)


def _put(tensor: Array, slot: TensorSlot, buffer: Array) -> None:
    """A chip's part of a tensor, or of its rows' scales."""
    part = tensor
    if slot.part is not None:
        axis, start, stop = slot.part
        if axis < tensor.ndim:  # a cut through the columns leaves the rows as they are
            part = tensor[start:stop] if axis == 0 else tensor[:, start:stop]
    buffer[slot.row : slot.row + len(part)] = part


def _read(checkpoint: Checkpoint, name: str, out: Array) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # looked for here, where the tensor has a name
        checkpoint.read_into(name, out)
    if out.dtype == np.float16 and not np.isfinite(out).all():
        raise ModelLoadError(f"The tensor {name} has values beyond float16's range: use --dtype bfloat16.")


def _check_tie(checkpoint: Checkpoint, dtype: np.dtype[Any]) -> None:
    """Raise unless the output matrix that a tied model's checkpoint brings is its embedding: there would be no telling
    which of the two was meant."""
    shapes = checkpoint.shapes()
    equal = shapes[HEAD] == shapes[EMBEDDING]
    if equal:
        head, embedding = _zeros(shapes[HEAD], dtype), _zeros(shapes[HEAD], dtype)
        _read(checkpoint, HEAD, head)
        _read(checkpoint, EMBEDDING, embedding)
        equal = bool(np.array_equal(head, embedding))
    if not equal:
        raise ModelLoadError(
            f"config.json says tie_word_embeddings, but the checkpoint's {HEAD} is not its {EMBEDDING}: "
            "set tie_word_embeddings to false, or take one of the two out."
        )


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros whose data begin at a multiple of ALIGNMENT, which numpy's own do not."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _check_tensors(checkpoint: Checkpoint, slots: Mapping[str, TensorSlot]) -> set[str]:
    """Compare names and shapes before anything is read; returns the names to pass over."""
    found = checkpoint.shapes()
    missing = [name for name in slots if name not in found]
    if missing:
        raise ModelLoadError(f"The checkpoint lacks {_first(missing)}.")
    ignored = {name for name in found if name.endswith(IGNORED_SUFFIXES)}
    if checkpoint.config.tie_word_embeddings:
        ignored.add(HEAD)  # a copy of the embedding, which `_check_tie` makes sure of
    surplus = [name for name in found if name not in slots and name not in ignored]
    if surplus:
        raise ModelLoadError(
            f"The checkpoint has tensors that the model has no place for: {_first(surplus)}."
        )
    for name, slot in slots.items():
        if found[name] != slot.shape:
            raise ModelLoadError(
                f"The tensor {name} has the shape {found[name]}, the config asks for {slot.shape}."
            )
    return ignored & set(found)


def _first(names: list[str]) -> str:
    shown = names[0] if names[0].isprintable() else ascii(names[0])  # it may come from a file
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{shown:.200}{rest}"
