"""Weights lie as a chip's compiler wants them, and nothing else changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Layout

from jaxserve import sharding
from jaxserve.weight_layouts import loop_copies_table, weight_layout

BFLOAT16 = jnp.dtype(jnp.bfloat16)
TABLE = "embed_tokens.weight"


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_a_tpu_looks_rows_up_where_they_lie(kind: str) -> None:
    for dtype in (BFLOAT16, jnp.dtype(jnp.int8)):
        layout = weight_layout(TABLE, dtype, kind, 1)
        assert layout is not None
        assert layout.major_to_minor == (0, 1)


def test_tiles_are_named_only_where_the_compiler_takes_them() -> None:
    """TPU7x wants some of its own, but takes none of what is split among devices."""
    tiled, split, other = (
        weight_layout(TABLE, BFLOAT16, *at) for at in (("TPU7x", 1), ("TPU7x", 4), ("TPU v4", 1))
    )
    assert tiled == Layout((0, 1), tiling=((16, 128), (2, 1)))
    assert split == other == Layout((0, 1))
    kinds = (("TPU7x", 1), ("TPU7x", 4), ("TPU v4", 4), ("cpu", 2))
    assert [loop_copies_table(BFLOAT16, *at) for at in kinds] == [False, True, False, False]
    assert not loop_copies_table(jnp.dtype(jnp.int8), "TPU7x", 4)


def test_other_weights_and_devices_are_left_to_the_compiler() -> None:
    assert weight_layout("layers.0.mlp.down_proj.weight", BFLOAT16, "TPU v4", 1) is None
    assert weight_layout(TABLE, BFLOAT16, "NVIDIA H100 80GB HBM3", 1) is None
    assert weight_layout(TABLE, BFLOAT16, "cpu", 1) is None


def test_a_program_reads_a_weight_as_it_was_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/tensor_parallel_worker.py does so with whole models."""
    by_columns = Layout((1, 0))
    monkeypatch.setattr(sharding, "weight_layout", lambda name, *_: by_columns if name == TABLE else None)
    group = sharding.DeviceGroup.of(1)
    table = np.arange(50 * 48, dtype=np.float32).reshape(50, 48)
    names, leaves = (TABLE, "norm.weight"), [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (table, table)]
    program = jax.jit(lambda weights, i: [w[i] for w in weights])
    compiled = program.lower(group.abstract_weights(names, leaves), 3).compile()
    (laid_out, plain), _ = compiled.input_formats[0]
    assert laid_out.layout.major_to_minor == (1, 0)
    assert plain.layout.major_to_minor == (0, 1)
    placed = [group.put_shards([group.put_weight(0, name, table)]) for name in names]
    for row in compiled(placed, 3):
        np.testing.assert_array_equal(row, table[3])
