"""Each module imports only modules of a lower rank, and only the engine's side touches jax."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jaxserve"
RANKS = [  # from the bottom up; modules of one rank do not import each other
    "errors kernels kernels.metadata",
    "config sampling_params kernels.reference kernels.blocked_attention",
    "messages kernels.paged_attention compilation demo_model models models.config", "sequence models.rope models.layers",
    "block_manager models.loader.checkpoint models.loader.hub models.loader.gguf models.loader.safetensors",
    "models.loader.dummy scheduler", "models.loader tokenizer step_inputs",
    "models.llama sampler detokenizer gguf_tokenizer",
    "generation_config chat_template kv_cache step", "model_runner", "engine", "llm engine_server", "engine_client",
    "api", "api.errors api.fields api.auth api.cors api.http_server", "api.protocol", "api.prompts", "api.generation",
    "api.responses",
    "api.metrics api.admission", "api.context", "api.sse api.request_body", "api.respond",
    "api.chat api.completions api.models api.tokenization api.health", "api.app", "api.cli api.serving", "api.__main__",
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names.split()}
JAX = "kernels. models.layers models.llama kv_cache step sampler compilation model_runner"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted({*ROOT.rglob("*.py"), *(ROOT / "api").glob("*.py"), *(ROOT / "kernels").glob("*.py")})
}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_imports_point_downwards(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            top, _, inner = name.partition(".")
            if top in ("jax", "flax", "jaxlib"):
                assert any(module.startswith(j) for j in JAX.split()), f"{module} must not import {name}"
            if top == "jaxserve" and inner:
                lazily = (
                    isinstance(node, ast.ImportFrom) and node.col_offset > 0
                )  # a deferred import, said where it is
                assert lazily or RANK[inner] < RANK[module], f"{module} imports {name}"
