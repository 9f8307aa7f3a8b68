"""Traced programs on disk: a start does not trace again what an earlier one has traced.

XLA's own cache has what it compiled, and finds it by the program, which has to be traced first; that takes longer than
all that the cache then saves. So the program is kept as well (StableHLO, by `jax.export`), under a name made of all
that a trace depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.export

from jaxserve.config import cache_dir
from jaxserve.kernels.reference import QuantizedPool
from jaxserve.logits_processors import SlotTables
from jaxserve.step import Pools, StepOutputs

TRACED_WITH = ("jax", "jaxlib", "flax", "numpy", "ml-dtypes")
ROOT = Path(__file__).parent
DIGEST_BYTES = hashlib.sha256().digest_size

logger = logging.getLogger(__name__)

for kind in (Pools, StepOutputs, SlotTables, QuantizedPool):
    jax.export.register_namedtuple_serialization(kind, serialized_name=f"jaxserve.{kind.__name__}")


class TraceCache:
    """Programs of one device under the cache directory.

    Args:
        described: what they are made from. Its repr tells one from another.
    """

    def __init__(self, *described: object) -> None:
        self._directory = cache_dir() / "traced"
        self._described = described

    def lower(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], *described: object, donate: int
    ) -> jax.stages.Lowered:
        """What `jax.jit(function).lower(*arguments)` gives, with argument `donate` donated. `described`: what this
        function is made from, beside what all are."""
        exported = self._exported(function, arguments, described)
        traced = jax.jit(function if exported is None else exported.call, donate_argnums=donate)
        return traced.lower(*arguments)

    def _exported(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], described: tuple[object, ...]
    ) -> jax.export.Exported | None:
        """None where it cannot be kept."""
        # without source versions look alike; where it differs, it is being upgraded while this process starts
        if LOADED_CODE is None or code_digest() != LOADED_CODE:
            return None
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{leaf.shape}", arguments)
        everything = self._described, described, shapes, jax.config.values, LOADED_CODE
        path = self._directory / hashlib.sha256(repr(everything).encode()).hexdigest()
        exported = _read(path)
        if exported is None:
            try:
                exported = jax.export.export(jax.jit(function))(*arguments)
                _write(path, bytes(exported.serialize()))
            except (ValueError, NotImplementedError) as error:  # of something that JAX does not export
                logger.warning("a traced program cannot be kept: %s", error)
        return exported


def _read(path: Path) -> jax.export.Exported | None:
    """None if there is no such file, or not all of it."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, program = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(program).digest() != digest:
        return None
    return jax.export.deserialize(bytearray(program))


def _write(path: Path, program: bytes) -> None:
    """At once or not at all: others may be reading and writing it."""
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(hashlib.sha256(program).digest() + program)
        unfinished.replace(path)
    except OSError as error:
        logger.warning("cannot keep traced programs in %s: %s", path.parent, error)
        with contextlib.suppress(OSError):
            unfinished.unlink()


def code_digest() -> str | None:
    """Of this package's source, as it is on disk now, and the versions of what traces it. None if the source cannot be
    read, or is not there."""
    digest = hashlib.sha256(repr([platform.python_version(), *map(version, TRACED_WITH)]).encode())
    try:
        files = source_files()
        for path in files:
            digest.update(f"{path}\0".encode())
            digest.update(hashlib.sha256((ROOT / path).read_bytes()).digest())
    except OSError:
        return None
    return digest.hexdigest() if Path(__file__).relative_to(ROOT) in files else None


def source_files() -> list[Path]:
    """Of this package, below ROOT. In a checkout some of its folders are symbolic links.

    Raises:
        OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    folders = os.walk(ROOT, onerror=fail, followlinks=True)
    return sorted(
        (Path(at) / n).relative_to(ROOT) for at, _, names in folders for n in names if n.endswith(".py")
    )


LOADED_CODE = code_digest()  # of what has just been imported
