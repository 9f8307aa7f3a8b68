"""What a checkpoint is to the loader, and how its tensors become parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from jaxserve.errors import ModelLoadError
from jaxserve.models.config import ModelConfig

T = TypeVar("T")
Array = npt.NDArray[Any]

# Buffers that old exporters saved although they are computed, not learned
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias")


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

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Every tensor, one at a time, in the order of `shapes`."""
        ...


def load_params(
    checkpoint: Checkpoint,
    slots: Mapping[str, TensorSlot],
    param_shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype[Any],
    place: Callable[[str, Array], T],
) -> dict[str, T]:
    """Fill every parameter and place it as soon as its last tensor has been read.

    Args:
        slots: for every tensor that must be there, where it goes.
        param_shapes: of every parameter.
        dtype: that parameters are cast to.
        place: puts a finished parameter on the device.

    Raises:
        ModelLoadError: a tensor is missing, surplus or of a wrong shape; the first one is named.
    """
    ignored = _check_tensors(checkpoint, slots)
    remaining = dict.fromkeys(param_shapes, 0)
    for slot in slots.values():
        remaining[slot.param] += 1
    buffers: dict[str, Array] = {}
    placed: dict[str, T] = {}
    for name, tensor in checkpoint.tensors():
        if name in ignored:
            continue
        param, row, shape = slots[name]
        if shape == param_shapes[param]:
            placed[param] = place(param, np.ascontiguousarray(tensor.astype(dtype, copy=False)))
            continue
        buffer = buffers.setdefault(param, np.empty(param_shapes[param], dtype))
        buffer[row : row + shape[0]] = tensor.astype(dtype, copy=False)
        remaining[param] -= 1
        if remaining[param] == 0:
            placed[param] = place(param, buffers.pop(param))
    return placed


def _check_tensors(checkpoint: Checkpoint, slots: Mapping[str, TensorSlot]) -> set[str]:
    """Compare names and shapes before anything is read; returns the names to pass over."""
    found = checkpoint.shapes()
    missing = [name for name in slots if name not in found]
    if missing:
        raise ModelLoadError(f"The checkpoint lacks {_first(missing)}.")
    ignored = {name for name in found if name.endswith(IGNORED_SUFFIXES)}
    if checkpoint.config.tie_word_embeddings:
        ignored.add("lm_head.weight")  # the config decides, as in transformers: the embedding is the head
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
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{rest}"
