"""What scripts/aot_check compiles can be traced: so it keeps up with the step, whether or not compilers are at hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh

SCRIPTS = Path(__file__).parents[1] / "scripts"
KINDS = {"tpu": ("TPU v5 lite", 1, "tpu"), "gpu": ("NVIDIA H100 80GB HBM3", None, "cuda")}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import aot_programs

    yield aot_programs
    for name in ("aot_programs", "aot_chips"):
        sys.modules.pop(name, None)


def on(platform: str) -> Any:
    """Context in which programs are traced as if for that platform."""
    from aot_chips import AbstractDevice

    return jax.sharding.use_abstract_mesh(
        AbstractMesh((), (), abstract_device=AbstractDevice(*KINDS[platform]))
    )


@pytest.mark.parametrize("platform", KINDS)
@pytest.mark.parametrize("decode_only", [True, False])
def test_a_step_returns_its_pools_as_it_took_them(programs: Any, platform: str, decode_only: bool) -> None:
    model = programs.Model("SmolLM2-135M", programs.SMOLLM2_135M, 1)
    program = programs.step_program(platform, jax.devices()[:1], 8 << 30, model, 128, decode_only=decode_only)
    with on(platform):
        outputs, pools = jax.eval_shape(program.function, *program.arguments)
    took = program.arguments[program.donated]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), pools) == jax.tree.map(
        lambda x: (x.shape, x.dtype), took
    )
    assert outputs.sampled.shape[0] == 64  # sequences at once, where there is little memory


@pytest.mark.parametrize("platform", KINDS)
def test_kernels_are_traced_for_their_own_layouts(programs: Any, platform: str) -> None:
    quick = list(programs.quick_kernels(platform))
    assert len({program.name for program in quick}) == len(quick)
    with on(platform):
        for program in quick[:2]:
            out, pool = jax.eval_shape(program.function, *program.arguments)
            assert out.shape == program.arguments[0].shape
            assert pool.shape == program.arguments[3].shape
