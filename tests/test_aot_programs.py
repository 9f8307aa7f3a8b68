"""What scripts/aot_check compiles can be traced: so it keeps up with the step, whether or not compilers are at hand."""

from __future__ import annotations

import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

SCRIPTS = Path(__file__).parents[1] / "scripts"
KINDS = {"tpu": ("TPU v5 lite", 1, "tpu"), "gpu": ("NVIDIA H100 80GB HBM3", None, "cuda")}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import aot_programs

    yield aot_programs
    for name in ("aot_check", "aot_programs", "aot_chips"):
        sys.modules.pop(name, None)


@pytest.fixture
def check(programs: Any) -> Any:
    import aot_check

    return aot_check


def on(platform: str) -> Any:
    """Context in which programs are traced as if for that platform."""
    from aot_chips import AbstractDevice

    return jax.sharding.use_abstract_mesh(
        AbstractMesh((), (), abstract_device=AbstractDevice(*KINDS[platform]))
    )


@pytest.mark.parametrize("platform", KINDS)
@pytest.mark.parametrize(("decode_only", "quantized"), [(True, False), (False, False), (False, True)])
def test_a_step_returns_its_pools_as_it_took_them(
    programs: Any, platform: str, decode_only: bool, quantized: bool
) -> None:
    model = programs.Model("SmolLM2-135M", num_layers=1, quantized=quantized)
    step = programs.Step(model=model, num_tokens=128, max_num_seqs=64, decode_only=decode_only)
    program = step.program(platform, jax.devices()[:1], 8 << 30)
    with on(platform):
        outputs, pools = jax.eval_shape(program.function, *program.arguments)
    took = program.arguments[program.donated]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), pools) == jax.tree.map(
        lambda x: (x.shape, x.dtype), took
    )
    assert outputs.sampled.shape[0] == 64
    weights = {leaf.dtype.name for leaf in program.arguments[program.weights]}
    assert weights == ({"int8", "float32", "bfloat16"} if quantized else {"bfloat16"})


def test_the_backend_for_hopper_is_in_a_step_of_its_own(programs: Any) -> None:
    for step in programs.hopper_steps(num_layers=1):
        assert step.name.endswith(" mosaic_gpu")
        program = step.program("gpu", jax.devices()[:1], 80 << 30)
        with on("gpu"):
            jaxpr = str(jax.make_jaxpr(program.function)(*program.arguments))
        assert "wgmma" in jaxpr


@pytest.mark.parametrize("platform", KINDS)
def test_kernels_are_traced_for_their_own_layouts(programs: Any, platform: str) -> None:
    kernels = list(programs.quick_kernels(platform))
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    hopper = programs.hopper_kernels(quick=True) if platform == "gpu" else ()
    with on(platform):
        for kernel in [*kernels[:2], *hopper]:
            program = kernel.program(platform, [], 0)
            out, pool = jax.eval_shape(program.function, *program.arguments)
            assert out.shape == program.arguments[0].shape
            assert pool.shape == program.arguments[3].shape


def test_the_models_that_a_chip_has_room_for_are_compiled_whole(programs: Any) -> None:
    def models(memory: int, num_devices: int) -> set[str]:
        steps = list(programs.all_steps(memory, num_devices, None))
        assert len({step.name for step in steps}) == len(steps)
        return {str(step.model) for step in steps if step.model.num_layers is None}

    small, llama = "SmolLM2-135M bfloat16 TP1", "Llama-3.1-8B"
    eight = {f"{llama} int8 TP1", f"{llama} bfloat16 TP4", f"{llama} int8 TP4"}
    assert models(16 << 30, 4) == {small, *eight}
    assert models(16 << 30, 8) == {small, *eight, "Llama-3.3-70B int8 TP8"}
    assert models(80 << 30, 1) == {small, f"{llama} bfloat16 TP1", f"{llama} int8 TP1"}


def test_a_model_that_is_cut_leaves_as_much_for_the_pool_as_all_of_it(programs: Any) -> None:
    whole, cut = (programs.Model("Llama-3.1-8B", num_layers=n) for n in (None, 2))
    assert cut.weight_bytes < whole.weight_bytes / 5
    assert cut.weight_bytes + cut.other_bytes == whole.weight_bytes
    assert cut.pool_bytes(32 << 30) == whole.pool_bytes(32 << 30)


HLO = """
%fused (param.1: bf16[1536,1024]) -> bf16[1536,1024] {
  %param.1 = bf16[1536,1024]{1,0} parameter(0)
  ROOT %copy.1 = bf16[1536,1024]{0,1} copy(%param.1)
}

%product (param.2: bf16[1536,1024], param.3: bf16[1024,1024]) -> f32[1536,1024] {
  %param.2 = bf16[1536,1024]{1,0} parameter(0)
  %param.3 = bf16[1024,1024]{1,0} parameter(1)
  ROOT %convolution = f32[1536,1024]{1,0} convolution(%param.2, %param.3), dim_labels=bf_io->bf
}

ENTRY %main (weight: bf16[1536,1024], x: bf16[16,1024]) -> bf16[16,1536] {
  %weight = bf16[1536,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[16,1024]{1,0} parameter(1)
  %copy.2 = bf16[16,1024]{0,1} copy(%x)
  @
  ROOT %fusion.9 = bf16[16,1536]{1,0} fusion(%weight, %copy.2), kind=kOutput, calls=%fused
}
"""


@pytest.mark.parametrize(
    ("instruction", "copied"),
    [
        ("%bitcast = bf16[1536,1024]{0,1} bitcast(%weight)", None),
        ("%copy.3 = bf16[1536,1024]{1,0:T(8,128)(2,1)S(1)} copy(%weight)", None),
        ("%copy.3 = bf16[1536,1024]{0,1:T(8,128)(2,1)} copy(%weight)", "[1536,1024]"),
        ("%transpose = bf16[1024,1536]{1,0} transpose(%weight), dimensions={1,0}", "[1024,1536]"),
        ("%convert = f32[1536,1024]{1,0} convert(%weight)", "[1536,1024]"),
        ("%fusion = bf16[1536,1024]{0,1} fusion(%weight), kind=kLoop, calls=%fused", "[1536,1024]"),
        (
            "%fusion = (s32[2]{0}, bf16[1536,1024]{0,1}) fusion(%weight), kind=kLoop, calls=%fused",
            "[1536,1024]",
        ),
        ("%fusion = bf16[16,1536]{1,0} fusion(%weight), kind=kLoop, calls=%fused", None),
        ("%fusion = f32[1536,1024]{1,0} fusion(%rows, %square), kind=kOutput, calls=%product", None),
        (
            "%fusion = (f32[1536,1024]{1,0}, f32[1024,1536]{1,0}) fusion(%x), kind=kOutput, calls=%product",
            "[1024,1536]",
        ),
        (
            "%fusion = (f32[1536,1024]{1,0}, bf16[1536,1024]{0,1}) fusion(%weight), kind=kOutput, calls=%product",
            "[1536,1024]",
        ),
    ],
)
def test_a_copy_of_a_weight_is_noticed(check: Any, instruction: str, copied: str | None) -> None:
    weights = [jax.ShapeDtypeStruct((2 * 1536, 1024), jnp.bfloat16)]  # of two devices
    program = check.Program(lambda: None, (weights,), donated=0, weights=0, num_devices=2)
    assert check.copied_weight(program, HLO.replace("@", instruction)) == copied


def test_a_compiler_that_ends_its_process_costs_one_program(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pool:
        """Of several processes, the first that ends takes all of them with it."""

        def __init__(self, num_processes: int, mp_context: Any) -> None:
            self.broken = False

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, _: Any, case: str, chip: str) -> Future[str]:
            self.broken |= case == "deadly"
            result: Future[str] = Future()
            if self.broken:
                result.set_exception(BrokenProcessPool())
            else:
                result.set_result(f"{case} on {chip}")
            return result

    monkeypatch.setattr(check, "ProcessPoolExecutor", Pool)
    jobs = [(case, "v4") for case in ("first", "second", "deadly", "third", "fourth")]
    results = dict(check.compiled(jobs, 2))
    assert list(results) == jobs
    failed = [job for job, result in results.items() if result.exception()]
    assert failed == [("deadly", "v4")]
