"""What a checkpoint is to the loader, and how its tensors become parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from jaxserve.errors import ModelLoadError
from jaxserve.models.config import ModelConfig

T = TypeVar("T")
Array = npt.NDArray[Any]

# Buffers that old exporters saved although they are computed, not learned
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias")
ALIGNMENT = 64  # bytes: XLA:CPU takes an array that begins at a multiple of it as it is, without a copy


class TensorSlot(NamedTuple):
    """Where a checkpoint tensor goes: rows [row, row + shape[0]) of parameter `param`."""

    param: str
    row: int
    shape: tuple[int, ...]


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
    slots: Mapping[str, TensorSlot],
    param_shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype[Any],
    place: Callable[[str, Array], T],
) -> dict[str, T]:
    """Fill every parameter, in file order, and place it as soon as its last tensor has been read.

    Args:
        slots: for every tensor that must be there, where it goes. Together they fill every parameter.
        param_shapes: of every parameter.
        dtype: that parameters are cast to.
        place: puts a finished parameter on the device. It owns the array from then on.

    Raises:
        ModelLoadError: a tensor is missing, surplus, of a wrong shape or beyond the range of `dtype`; the first
            one is named.
    """
    ignored = _check_tensors(checkpoint, slots)
    remaining = dict.fromkeys(param_shapes, 0)
    for slot in slots.values():
        remaining[slot.param] += 1
    buffers: dict[str, Array] = {}
    placed: dict[str, T] = {}
    for name in checkpoint.shapes():
        if name in ignored:
            continue
        param, row, shape = slots[name]
        if param not in buffers:
            buffers[param] = _empty(param_shapes[param], dtype)
        _read(
            checkpoint, name, buffers[param][row : row + shape[0]]
        )  # no name here keeps a placed buffer alive
        remaining[param] -= 1
        if remaining[param] == 0:
            placed[param] = place(param, buffers.pop(param))
    return placed


def _read(checkpoint: Checkpoint, name: str, out: Array) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # looked for here, where the tensor has a name
        checkpoint.read_into(name, out)
    if out.dtype == np.float16 and not np.isfinite(out).all():
        raise ModelLoadError(f"The tensor {name} has values beyond float16's range: use --dtype bfloat16.")


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array whose data begin at a multiple of ALIGNMENT, which numpy's own do not."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
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
        ignored.add(
            "lm_head.weight"
        )  # the config decides: the embedding is the head, whatever a copy of it says
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
