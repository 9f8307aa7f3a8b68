"""Quantized weights and KV caches in the engine: a result still never depends on the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.model_runner import ModelRunner
from tests.test_engine import TINY, Tokens, make_engine, mixed_requests, run_all

pytestmark = pytest.mark.heavy
NUM_REQUESTS = 40
KINDS: dict[str, dict[str, Any]] = {
    "int8 weights and KV": {"quantization": "int8", "kv_cache_dtype": "int8"},
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A tiny float32 model with random weights."""
    directory: Path = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(TINY))
    config = EngineConfig(
        model=str(directory),
        load_format="dummy",
        max_num_seqs=8,
        max_num_batched_tokens=16,
        block_size=8,
        kv_cache_memory_bytes=4 << 20,
        compilation_cache=False,
        **request.param,
    )
    return ModelRunner(config)


@pytest.fixture(scope="module")
def alone(runner: ModelRunner) -> Tokens:
    """Each request on its own, in an engine that remembers nothing."""
    tokens: Tokens = {}
    for request in mixed_requests(NUM_REQUESTS):
        tokens |= run_all(make_engine(runner, enable_prefix_caching=False), [request], check=False)
    return tokens


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_num_batched_tokens": 5}, {"num_blocks": 18}],
    ids=["batched, prefixes shared", "chunked", "preempted"],
)
def test_requests_give_the_same_tokens_alone_and_together(
    runner: ModelRunner, alone: Tokens, limits: dict[str, Any]
) -> None:
    engine = make_engine(runner, **limits)
    assert run_all(engine, mixed_requests(NUM_REQUESTS)) == alone
    assert engine.block_manager.num_hit_tokens > 0
    if "num_blocks" in limits:
        assert engine.scheduler.num_preemptions > 0
