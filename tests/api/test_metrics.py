"""Metrics: the exact names, one observation a request, bounded labels."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.api.app import create_app
from jaxserve.api.generation import RequestTimings
from jaxserve.api.metrics import Metrics
from jaxserve.engine_client import EngineLoad
from jaxserve.errors import QueueFullError
from jaxserve.messages import EngineStats
from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient, fake_info, generate
from tests.api.http_server import exchange, serving, until
from tests.api.small_model import END, MODEL, make_context, make_tokenizer

SHARED_GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "gpu_cache_usage_perc",
)
SHARED_COUNTERS = (
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens_cached",
)
SHARED_HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_best_of",
    "request_params_max_tokens",
    "iteration_tokens_total",
)
OWN_COUNTERS = ("xla_compilations_total", "engine_restarts_total")
OWN_HISTOGRAMS = ("engine_step_seconds", "grammar_compile_seconds")
M = '{model_name="m"}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def samples(metrics: Metrics) -> dict[str, float]:
    """`name{label="…"}` → value, as the text says it."""
    lines = metrics.render().decode().splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x[0] != "#")}


def timings(**changes: object) -> RequestTimings:
    fields: dict[str, object] = {
        "finish_reason": "stop",
        "n": 2,
        "best_of": 2,
        "max_tokens": 16,
        "prompt_tokens": 7,
        "cached_tokens": 4,
        "generation_tokens": 5,
        "arrived_at": 100.0,
        "scheduled_at": 101.0,
        "first_token_at": 103.0,
        "finished_at": 107.0,
        "inter_token_s": (0.5, 0.5, 1.0),
    }
    return RequestTimings(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", ["jaxserve:", "vllm:"])
def test_every_shared_name_exists_from_the_start(prefix: str) -> None:
    found = samples(Metrics("m", info=fake_info))
    for name in SHARED_GAUGES:
        assert found[f"{prefix}{name}{M}"] == 0
    for name in SHARED_COUNTERS:
        assert found[f"{prefix}{name}_total{M}"] == 0
    for name in SHARED_HISTOGRAMS:
        assert found[f"{prefix}{name}_count{M}"] == found[f"{prefix}{name}_sum{M}"] == 0
    for reason in ("stop", "length", "abort", "error"):
        assert found[f'{prefix}request_success_total{{finished_reason="{reason}",model_name="m"}}'] == 0
    for reason in ("requests", "tokens"):
        assert found[f'{prefix}admission_rejections_total{{model_name="m",reason="{reason}"}}'] == 0
    (info,) = (name for name in found if name.startswith(f"{prefix}cache_config_info{{"))
    assert 'block_size="16"' in info
    assert 'num_gpu_blocks="65"' in info


def test_our_own_names_have_no_alias() -> None:
    found = samples(Metrics("m"))
    for name in (*OWN_COUNTERS, *(f"{name}_count" for name in OWN_HISTOGRAMS)):
        assert found[f"jaxserve:{name}{M}"] == 0
        assert f"vllm:{name}{M}" not in found


def test_prometheus_own_parser_reads_it() -> None:
    metrics = Metrics('a "quoted"\nmodel jaxserve:x', info=fake_info)
    metrics.observe_request(timings())
    metrics.observe_http("GET", "/v1/models", 200, 0.1)
    families = list(text_string_to_metric_families(metrics.render().decode()))
    assert len(families) > 50
    labels = {s.labels["model_name"] for family in families for s in family.samples}
    assert labels == {'a "quoted"\nmodel jaxserve:x'}


@pytest.mark.parametrize("prefix", ["jaxserve:", "vllm:"])
def test_a_request_is_one_observation_of_each(prefix: str) -> None:
    metrics = Metrics("m")
    metrics.observe_request(timings())
    found = samples(metrics)
    for name, total, count in (
        ("time_to_first_token_seconds", 3, 1),
        ("inter_token_latency_seconds", 2, 3),
        ("time_per_output_token_seconds", 2, 3),
        ("e2e_request_latency_seconds", 7, 1),
        ("request_queue_time_seconds", 1, 1),
        ("request_inference_time_seconds", 6, 1),
        ("request_prefill_time_seconds", 2, 1),
        ("request_decode_time_seconds", 4, 1),
        ("request_prompt_tokens", 7, 1),
        ("request_generation_tokens", 5, 1),
        ("request_params_n", 2, 1),
        ("request_params_best_of", 2, 1),
        ("request_params_max_tokens", 16, 1),
    ):
        assert (found[f"{prefix}{name}_sum{M}"], found[f"{prefix}{name}_count{M}"]) == (total, count), name
    for name, total in (("prompt_tokens", 7), ("generation_tokens", 5), ("prompt_tokens_cached", 4)):
        assert found[f"{prefix}{name}_total{M}"] == total
    assert found[f'{prefix}request_success_total{{finished_reason="stop",model_name="m"}}'] == 1


def test_a_request_that_never_ran_has_no_times_of_running() -> None:
    metrics = Metrics("m")
    never = timings(scheduled_at=None, first_token_at=None, inter_token_s=(), finish_reason="abort")
    metrics.observe_request(never)
    found = samples(metrics)
    assert found[f"vllm:time_to_first_token_seconds_count{M}"] == 0
    assert found[f"vllm:request_queue_time_seconds_count{M}"] == 0
    assert found[f"vllm:e2e_request_latency_seconds_count{M}"] == 1
    assert found['vllm:request_success_total{finished_reason="abort",model_name="m"}'] == 1


def test_gauges_and_totals_are_the_engines_at_the_time_of_reading() -> None:
    stats = EngineStats(num_running=3)
    metrics = Metrics("m", lambda: stats)
    assert samples(metrics)[f"vllm:num_requests_running{M}"] == 3
    stats = EngineStats(3, 4, 0.25, 5, 60, 40, 7)
    found = samples(metrics)
    for name, value in (
        ("vllm:num_requests_waiting", 4),
        ("vllm:kv_cache_usage_perc", 0.25),
        ("jaxserve:gpu_cache_usage_perc", 0.25),
        ("vllm:num_preemptions_total", 5),
        ("vllm:prefix_cache_queries_total", 60),
        ("vllm:prefix_cache_hits_total", 40),
        ("jaxserve:xla_compilations_total", 7),
    ):
        assert found[name + M] == value, name


def test_a_step_without_tokens_is_no_iteration() -> None:
    metrics = Metrics("m")
    metrics.observe_step(EngineStats(num_tokens=0, step_s=1.0))
    metrics.observe_step(EngineStats(num_tokens=12, step_s=0.5))
    found = samples(metrics)
    assert found[f"vllm:iteration_tokens_total_sum{M}"] == 12
    assert found[f"jaxserve:engine_step_seconds_count{M}"] == 1


async def test_after_r_requests_of_g_tokens_the_counts_are_exact(tokenizer: Tokenizer) -> None:
    engine = FakeEngineClient(script=lambda request: generate(request, [[104, 105, 106, END]]))
    context = make_context(tokenizer, engine)
    client = create_app(context).test_client()
    for streamed in (True, False, False):
        body = {"model": MODEL, "prompt": "abc", "stream": streamed}
        response = await client.post("/v1/completions", json=body)
        await response.get_data()
    await asyncio.sleep(0)
    found = samples(context.metrics)
    m = '{model_name=""}'
    assert found[f"vllm:time_to_first_token_seconds_count{m}"] == 3
    assert found[f"vllm:inter_token_latency_seconds_count{m}"] == 3 * (4 - 1)
    assert found[f"vllm:generation_tokens_total{m}"] == 3 * 4
    assert found[f"vllm:prompt_tokens_total{m}"] == 3 * 3
    assert found['vllm:request_success_total{finished_reason="stop",model_name=""}'] == 3


async def test_http_labels_are_bounded_whatever_clients_send(tokenizer: Tokenizer) -> None:
    async with serving(make_context(tokenizer, FakeEngineClient(), port=0)) as server:
        for method, path in (
            ("BREW", "/a"),
            ("GET", "/b/c"),
            ("GET", f"/v1/models/{MODEL}"),
            ("GET", "/v1/models/no"),
        ):
            await exchange(server.port, f"{method} {path} HTTP/1.1\r\nHost: evil{path}\r\n\r\n")
        await until(lambda: server.context.num_open_requests == 0)
        found = samples(server.context.metrics)
    counted = {name for name in found if name.startswith("jaxserve:http_requests_total")}
    assert counted == {
        f'jaxserve:http_requests_total{{method="{method}",model_name="",route="{route}",status="{status}"}}'
        for method, route, status in (
            ("other", "unmatched", 404),
            ("GET", "unmatched", 404),
            ("GET", "/v1/models/<model_id:model_id>", 200),
            ("GET", "/v1/models/<model_id:model_id>", 404),
        )
    }


async def test_the_endpoint_serves_prometheus_text(tokenizer: Tokenizer) -> None:
    client = create_app(make_context(tokenizer, FakeEngineClient())).test_client()
    response = await client.get("/metrics")
    assert response.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert b"# TYPE vllm:num_requests_running gauge" in await response.get_data()


# --- admission ------------------------------------------------------------------------------------------------


def test_requests_that_can_run_at_once_never_count_as_queued(tokenizer: Tokenizer) -> None:
    engine = FakeEngineClient(info=fake_info(max_num_seqs=2))
    context = make_context(tokenizer, engine, max_num_queued_reqs=1)
    for waiting, sequences in ((0, 0), (2, 2), (0, 40), (3, 2)):
        engine_load(engine, waiting, sequences)
        context.admission.admit(1)()


def test_the_queue_is_bounded_by_requests_and_by_tokens(tokenizer: Tokenizer) -> None:
    engine = FakeEngineClient(info=fake_info(max_num_seqs=2))
    context = make_context(tokenizer, engine, max_num_queued_reqs=3, max_num_queued_tokens=100)
    engine_load(engine, 3, 5)
    with pytest.raises(QueueFullError, match="3 requests are waiting"):
        context.admission.admit(1)
    engine_load(engine, 2, 4, tokens=60)
    context.admission.admit(40)
    with pytest.raises(QueueFullError, match="60 prompt tokens"):
        context.admission.admit(41)
    assert context.admission.num_requests == 1


def test_the_default_queue_is_four_times_the_sequences(tokenizer: Tokenizer) -> None:
    engine = FakeEngineClient(info=fake_info(max_num_seqs=2))
    context = make_context(tokenizer, engine)
    engine_load(engine, 7, 9)
    context.admission.admit(1)
    engine_load(engine, 8, 10)
    with pytest.raises(QueueFullError):
        context.admission.admit(1)


async def test_a_full_queue_is_429_with_retry_after(tokenizer: Tokenizer) -> None:
    engine = FakeEngineClient(info=fake_info(max_num_seqs=2))
    engine_load(engine, 8, 10)
    client = create_app(make_context(tokenizer, engine)).test_client()
    response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
    error = (await response.get_json())["error"]
    assert (response.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
    assert int(response.headers["Retry-After"]) >= 1
    assert not engine.submitted


def engine_load(engine: FakeEngineClient, waiting: int, sequences: int, tokens: int = 0) -> None:
    engine.fixed_load = EngineLoad(waiting, tokens, sequences)
