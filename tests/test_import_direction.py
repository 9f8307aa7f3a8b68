"""Each module imports only modules of a lower rank, and only the engine's side touches jax."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jaxserve"
RANKS = [  # from the bottom up; modules of one rank do not import each other
    "errors kernels kernels.lanes kernels.metadata token_bound weight_layouts",
    "config sampling_params kernels.reference",
    "kernels.pallas_tpu_layout step_shapes", "kernels.pallas_tpu_common",
    "kernels.pallas_tpu_decode kernels.pallas_tpu_prefill",
    "constraints constraints.constraint constraints.backends", "constraints.backends.base",
    "messages constraints.text_constraint compilation demo_model",
    "kernels.blocked_attention kernels.pallas_tpu kernels.pallas_triton", "kernels.pallas_mosaic_gpu",
    "models models.config",
    "sequence models.rope kernels.paged_attention sharding", "models.layers logits_processors",
    "block_manager models.loader.checkpoint models.loader.hub models.loader.gguf models.loader.safetensors",
    "waiting_queue step_plan", "layered_prefill padding", "long_prompts",
    "models.loader.dummy scheduler", "models.loader tokenizer step_inputs slot_tables",
    "models.llama sampler detokenizer gguf_tokenizer",
    "generation_config chat_template killable_worker kv_cache step beam_search", "template_worker",
    "constraints.vocabulary",
    "constraints.regex constraints.outlines_terms constraints.disjoint constraints.property_counts",
    "constraints.json_schema constraints.grammar",
    "constraints.backends.llguidance constraints.backends.outlines constraints.backends.lm_format_enforcer",
    "constraints.compiler", "constraints.worker constraints.text_constraints",
    "beams request_check speculation",
    "lockstep trace_cache", "model_runner", "engine", "llm engine_server", "engine_client follower",
    "api", "api.errors api.fields api.auth api.cors api.field_texts api.tool_calls",
    "api.constraints api.http_server", "api.tools",
    "api.request_tables api.openapi_responses", "api.protocol api.openapi", "api.prompts", "api.generation",
    "api.responses",
    "api.metrics api.admission", "api.context", "api.sse api.request_body", "api.respond",
    "api.chat api.completions api.models api.tokenization api.health api.docs", "api.profiling", "api.app",
    "api.cli api.server", "api.serving", "api.__main__",
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names.split()}
UPWARDS = {("tokenizer", "gguf_tokenizer")}  # deferred: only where a GGUF file is loaded
JAX = ["models.layers", "models.llama", "kv_cache", "step", "sampler", "logits_processors", "slot_tables"]
JAX += ["compilation", "model_runner", "sharding", "lockstep", "trace_cache", "weight_layouts"]
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted({*ROOT.rglob("*.py"), *(ROOT / "api").glob("*.py"), *(ROOT / "kernels").glob("*.py")})
}


def test_every_module_has_its_place() -> None:
    assert RANK.keys() == MODULES.keys() - {"__init__"}


@pytest.mark.parametrize("module", sorted(RANK))
def test_imports_point_downwards(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not getattr(node, "level", 0), f"{module} must name what it imports in full"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [".".join([*names[:1], alias.name]) for alias in node.names]
        for name in names:
            if name.split(".")[0] in ("jax", "flax", "jaxlib"):
                assert module.startswith("kernels.") or module in JAX, f"{module} must not import {name}"
            inner = name.removeprefix("jaxserve.")
            if inner != name and inner in MODULES and (module, inner) not in UPWARDS:
                assert RANK[inner] < RANK[module], f"{module} must not import {inner}"


def test_who_decides_on_the_host_and_who_speaks_http_runs_without_jax() -> None:
    modules = "jaxserve.scheduler", "jaxserve.step_inputs", "jaxserve.speculation", "jaxserve.api.app"
    code = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False).returncode == 0
