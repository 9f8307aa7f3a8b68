"""How weights lie in a device's memory, where the compiler's own choice would be copied in every step.

What is said here comes from what XLA compiles for each chip; `scripts/aot_check` fails if it stops being true.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental.layout import Layout

ROW_MAJOR = (0, 1)
VOCAB_TABLES = ("embed_tokens.weight", "lm_head.weight")


def weight_layout(name: str, dtype: jnp.dtype, device_kind: str, num_devices: int) -> Layout | None:
    """Of a parameter of `Llama` on one of so many devices such as "TPU v4"; None: the compiler's choice.

    A TPU's compiler lays an array out so that padding to whole tiles costs least, by columns where the number of
    features is no multiple of 128. Rows of a table of embeddings are looked up, so the table would be turned around.
    """
    if not device_kind.startswith("TPU") or name not in VOCAB_TABLES:
        return None
    # of what is split among devices the compiler takes no tiles
    return Layout(ROW_MAJOR, tiling=_loop_tiling(dtype, device_kind) if num_devices == 1 else None)


def loop_copies_table(dtype: jnp.dtype, device_kind: str, num_devices: int) -> bool:
    """Whether a loop that reads the output layer copies it first, into the tiles that it wants. Branches read it as it
    is."""
    return num_devices > 1 and _loop_tiling(dtype, device_kind) is not None


def _loop_tiling(dtype: jnp.dtype, device_kind: str) -> tuple[tuple[int, ...], ...] | None:
    """Tiles in which TPU7x wants what a loop reads: the output layer, where prompts are rated."""
    return ((16, 128), (2, 1)) if dtype == jnp.bfloat16 and device_kind == "TPU7x" else None
