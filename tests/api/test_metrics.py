"""Metrics: the exact names, one observation a request, bounded labels."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from quart import Quart

from jaxserve.api.app import create_app
from jaxserve.api.generation import RequestTimings
from jaxserve.api.metrics import Metrics
from jaxserve.engine_client import EngineLoad
from jaxserve.errors import QueueFullError
from jaxserve.messages import EngineStats, SequenceOutput
from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient, fake_info, generate
from tests.api.http_server import exchange, serving, until
from tests.api.small_model import END, MODEL, generate_a_little, make_context, make_tokenizer

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
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
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
        "best_of": 3,
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


def test_there_are_these_metrics_of_these_types_with_these_labels_and_no_others() -> None:
    """The contract's list, spelled out as Prometheus sees it."""
    metrics = Metrics("m", info=fake_info)
    metrics.observe_http("GET", "/health", 200, 0.1)
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        labels = {name for s in family.samples for name in s.labels if name != "le"}
        found[family.name] = (family.type, labels)
    m = {"model_name"}
    shared = {
        **dict.fromkeys(SHARED_GAUGES, ("gauge", m)),
        **dict.fromkeys(SHARED_COUNTERS, ("counter", m)),
        **dict.fromkeys(SHARED_HISTOGRAMS, ("histogram", m)),
        "request_success": ("counter", m | {"finished_reason"}),
        "admission_rejections": ("counter", m | {"reason"}),
        "cache_config_info": ("gauge", m | {"block_size", "num_gpu_blocks", "cache_dtype"}),
    }
    own = {
        **{name.removesuffix("_total"): ("counter", m) for name in OWN_COUNTERS},
        **dict.fromkeys(OWN_HISTOGRAMS, ("histogram", m)),
        "http_requests": ("counter", m | {"method", "route", "status"}),
        "http_request_duration_seconds": ("histogram", m | {"method", "route"}),
    }
    expected = {f"{prefix}:{name}": kind for prefix in ("jaxserve", "vllm") for name, kind in shared.items()}
    assert found == expected | {f"jaxserve:{name}": kind for name, kind in own.items()}


def test_the_cache_is_described_once_the_engine_is_ready() -> None:
    assert not [name for name in samples(Metrics("m")) if "cache_config_info" in name]


def test_every_series_has_the_first_served_name() -> None:
    names = samples(Metrics("m", info=fake_info))
    assert names
    assert all('model_name="m"' in name for name in names)


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
        ("request_params_best_of", 3, 1),
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
    stats = EngineStats(
        3,
        4,
        0.25,
        5,
        60,
        40,
        7,
        spec_decode_drafts=8,
        spec_decode_draft_tokens=30,
        spec_decode_accepted_tokens=20,
    )
    found = samples(metrics)
    for name, value in (
        ("vllm:num_requests_waiting", 4),
        ("vllm:kv_cache_usage_perc", 0.25),
        ("jaxserve:gpu_cache_usage_perc", 0.25),
        ("vllm:num_preemptions_total", 5),
        ("vllm:prefix_cache_queries_total", 60),
        ("vllm:prefix_cache_hits_total", 40),
        ("jaxserve:xla_compilations_total", 7),
        ("vllm:spec_decode_num_drafts_total", 8),
        ("vllm:spec_decode_num_draft_tokens_total", 30),
        ("vllm:spec_decode_num_accepted_tokens_total", 20),
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


async def test_candidates_count_as_generated_and_their_request_as_one(tokenizer: Tokenizer) -> None:
    context = make_context(tokenizer, FakeEngineClient(script=generate_a_little))
    body = {"model": MODEL, "prompt": ["abc", "de"], "n": 2, "best_of": 3}
    response = await create_app(context).test_client().post("/v1/completions", json=body)
    assert (await response.get_json())["usage"]["completion_tokens"] == 2 * 2 * 4
    found = samples(context.metrics)
    m = '{model_name=""}'
    for name, value in (
        ("time_to_first_token_seconds_count", 1),
        ("e2e_request_latency_seconds_count", 1),
        ("request_params_n_sum", 2),
        ("request_params_best_of_sum", 3),
        ("prompt_tokens_total", 3 + 2),
        ("generation_tokens_total", 2 * 3 * 4),
        ("inter_token_latency_seconds_count", 2 * 3 * (4 - 1)),
    ):
        assert found[f"vllm:{name}{m}"] == value, name


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_is_one_aborted_request(tokenizer: Tokenizer, stream: bool) -> None:
    engine = FakeEngineClient()
    async with serving(make_context(tokenizer, engine, port=0)) as server:
        body = json.dumps({"model": MODEL, "prompt": "abc", "stream": stream})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write((head + body).encode())
        await until(lambda: len(engine.submitted) == 1)
        engine.emit(SequenceOutput(engine.submitted[0].request_id, 0, [104, 105]))
        writer.close()
        await until(lambda: server.context.num_open_requests == 0)
        found = samples(server.context.metrics)
        assert found['vllm:request_success_total{finished_reason="abort",model_name=""}'] == 1
        assert sum(value for name, value in found.items() if "vllm:request_success" in name) == 1
        assert found['vllm:e2e_request_latency_seconds_count{model_name=""}'] == 1
        assert server.context.admission.num_requests == 0
        assert not engine.live


async def ask(app: Quart, method: str, path: str, host: str) -> None:
    """One request as a server hands it on, whatever HTTP itself would say to it."""
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", host.encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "extensions": {},
    }
    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> dict[str, object]:
        message = next(messages, None)
        return message or await asyncio.get_running_loop().create_future()

    async def send(message: dict[str, object]) -> None:
        pass

    await app(scope, receive, send)


METHODS = st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "PUT", "TRACE", "CONNECT"]) | st.text(
    max_size=20
)
WORDS = st.sampled_from(["v1", "models", "health", "metrics", "docs", "..", "%2e", "", "*"]) | st.text(
    max_size=8
)
HOSTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=10)  # HTTP lets no others pass
HOSTILE = st.tuples(METHODS, st.lists(WORDS, max_size=5).map("/".join), HOSTS)


@settings(max_examples=20, deadline=None)
@given(requests=st.lists(HOSTILE, min_size=5, max_size=20))
def test_no_label_is_taken_from_a_request(tokenizer: Tokenizer, requests: list[tuple[str, str, str]]) -> None:
    context = make_context(tokenizer, FakeEngineClient())
    app = create_app(context)

    async def ask_all() -> None:
        for method, path, host in requests:
            await ask(app, method, f"/{path}", host)

    asyncio.run(ask_all())
    routes = {rule.rule for rule in app.url_map.iter_rules()} | {"unmatched"}
    methods = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other"}
    counted = 0.0
    for family in text_string_to_metric_families(context.metrics.render().decode()):
        if family.name == "jaxserve:http_requests":
            for sample in family.samples:
                counted += sample.value
                assert sample.labels["method"] in methods
                assert sample.labels["route"] in routes
                assert int(sample.labels["status"]) in (200, 400, 404, 405, 415)
    assert counted == len(requests)


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
