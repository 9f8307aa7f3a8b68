"""Prometheus metrics. Each of the shared names exists as `jaxserve:X` and as its alias `vllm:X`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxserve.api.generation import RequestTimings
from jaxserve.messages import EngineInfo, EngineStats

PREFIXES = ("jaxserve:", "vllm:")
SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
REQUEST_SECONDS = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 128)
FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTION_REASONS = ("requests", "tokens")


class Metrics:
    """All metrics of one server, in a registry of its own.

    Args:
        model_name: the first served name, the label of all of them.
        stats: the engine's gauges and totals, read when metrics are scraped.
        info: None until the engine is ready.
    """

    def __init__(
        self,
        model_name: str = "",
        stats: Callable[[], EngineStats] = EngineStats,
        info: Callable[[], EngineInfo | None] = lambda: None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._registry.register(_EngineCollector(model_name, stats, info))
        self._time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", SECONDS
        )
        self._inter_token = [
            *self._histogram("inter_token_latency_seconds", "Between tokens of a choice.", SECONDS),
            *self._histogram(
                "time_per_output_token_seconds", "Same as inter_token_latency_seconds.", SECONDS
            ),
        ]
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to end.", REQUEST_SECONDS)
        self._queue = self._histogram(
            "request_queue_time_seconds", "Arrival to first scheduled.", REQUEST_SECONDS
        )
        self._inference = self._histogram(
            "request_inference_time_seconds", "First scheduled to end.", REQUEST_SECONDS
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "First scheduled to first token.", REQUEST_SECONDS
        )
        self._decode = self._histogram("request_decode_time_seconds", "First token to end.", REQUEST_SECONDS)
        self._prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a request.", TOKENS
        )
        self._n = self._histogram("request_params_n", "n of a request.", COUNTS)
        self._best_of = self._histogram("request_params_best_of", "best_of of a request.", COUNTS)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", TOKENS)
        self._iteration = self._histogram("iteration_tokens_total", "Tokens computed by a step.", TOKENS)
        self._total_prompt = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._total_generation = self._counter("generation_tokens", "Tokens generated.")
        self._total_cached = self._counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self._success = [
            Counter(
                p + "request_success",
                "Requests ended.",
                ("model_name", "finished_reason"),
                registry=self._registry,
            )
            for p in PREFIXES
        ]
        self._rejections = [
            Counter(
                p + "admission_rejections",
                "Requests refused.",
                ("model_name", "reason"),
                registry=self._registry,
            )
            for p in PREFIXES
        ]
        for counter in self._success:
            for reason in FINISH_REASONS:
                counter.labels(model_name, reason)
        for counter in self._rejections:
            for reason in REJECTION_REASONS:
                counter.labels(model_name, reason)
        self._step_seconds = Histogram(
            "jaxserve:engine_step_seconds",
            "A step of the engine.",
            ("model_name",),
            buckets=SECONDS,
            registry=self._registry,
        ).labels(model_name)
        self._http_requests = Counter(
            "jaxserve:http_requests",
            "HTTP requests.",
            ("model_name", "method", "route", "status"),
            registry=self._registry,
        )
        self._http_seconds = Histogram(
            "jaxserve:http_request_duration_seconds",
            "HTTP requests until their response has begun.",
            ("model_name", "method", "route"),
            buckets=REQUEST_SECONDS,
            registry=self._registry,
        )

    def observe_request(self, timings: RequestTimings) -> None:
        """A generation request has ended: one observation in everything that counts requests."""
        _observe(self._e2e, timings.finished_at - timings.arrived_at)
        for counter in self._success:
            counter.labels(self._model_name, timings.finish_reason).inc()
        if timings.scheduled_at is not None:
            _observe(self._queue, timings.scheduled_at - timings.arrived_at)
            _observe(self._inference, timings.finished_at - timings.scheduled_at)
        if timings.first_token_at is not None:
            _observe(self._time_to_first_token, timings.first_token_at - timings.arrived_at)
            _observe(self._decode, timings.finished_at - timings.first_token_at)
            if timings.scheduled_at is not None:
                _observe(self._prefill, timings.first_token_at - timings.scheduled_at)
        for seconds in timings.inter_token_s:
            _observe(self._inter_token, seconds)
        _observe(self._prompt_tokens, timings.prompt_tokens)
        _observe(self._generation_tokens, timings.generation_tokens)
        _observe(self._n, timings.n)
        _observe(self._best_of, timings.n)
        _observe(self._max_tokens, timings.max_tokens)
        _increment(self._total_prompt, timings.prompt_tokens)
        _increment(self._total_generation, timings.generation_tokens)
        _increment(self._total_cached, timings.cached_tokens)

    def observe_step(self, stats: EngineStats) -> None:
        """A step of the engine has ended."""
        if stats.num_tokens:
            _observe(self._iteration, stats.num_tokens)
            self._step_seconds.observe(stats.step_s)

    def observe_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request has been answered; `route` is a template, so that there are few of them."""
        self._http_requests.labels(self._model_name, method, route, str(status)).inc()
        self._http_seconds.labels(self._model_name, method, route).observe(seconds)

    def count_rejection(self, reason: str) -> None:
        for counter in self._rejections:
            counter.labels(self._model_name, reason).inc()

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> list[Histogram]:
        made = (
            Histogram(p + name, text, ("model_name",), buckets=tuple(buckets), registry=self._registry)
            for p in PREFIXES
        )
        return [histogram.labels(self._model_name) for histogram in made]

    def _counter(self, name: str, text: str) -> list[Counter]:
        made = (Counter(p + name, text, ("model_name",), registry=self._registry) for p in PREFIXES)
        return [counter.labels(self._model_name) for counter in made]


def _observe(histograms: list[Histogram], value: float) -> None:
    for histogram in histograms:
        histogram.observe(value)


def _increment(counters: list[Counter], amount: float) -> None:
    for counter in counters:
        counter.inc(amount)


class _EngineCollector(Collector):
    """What the engine itself counts, read at scrape time."""

    def __init__(
        self, model_name: str, stats: Callable[[], EngineStats], info: Callable[[], EngineInfo | None]
    ) -> None:
        self._model_name = model_name
        self._stats = stats
        self._info = info

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges = {
            "num_requests_running": ("Sequences that run.", stats.num_running),
            "num_requests_waiting": ("Sequences that wait.", stats.num_waiting),
            "kv_cache_usage_perc": ("KV blocks in use, 0 to 1.", stats.kv_cache_usage),
            "gpu_cache_usage_perc": ("Same as kv_cache_usage_perc.", stats.kv_cache_usage),
        }
        counters = {
            "num_preemptions": ("Sequences that were preempted.", stats.num_preemptions),
            "prefix_cache_queries": ("Prompt tokens looked up.", stats.prefix_cache_queries),
            "prefix_cache_hits": ("Prompt tokens found.", stats.prefix_cache_hits),
        }
        for prefix in PREFIXES:
            for name, (text, value) in gauges.items():
                yield self._with(GaugeMetricFamily(prefix + name, text, labels=("model_name",)), value)
            for name, (text, value) in counters.items():
                yield self._with(CounterMetricFamily(prefix + name, text, labels=("model_name",)), value)
            info = InfoMetricFamily(prefix + "cache_config", "The KV cache.", labels=("model_name",))
            engine = self._info()
            if engine is not None:
                described = {
                    "block_size": str(engine.block_size),
                    "num_gpu_blocks": str(engine.num_blocks),
                    "cache_dtype": engine.kv_cache_dtype,
                }
                info.add_metric((self._model_name,), described)
            yield info
        compilations = CounterMetricFamily(
            "jaxserve:xla_compilations", "Programs compiled after the start.", labels=("model_name",)
        )
        yield self._with(compilations, stats.xla_compilations)

    def _with(
        self, family: GaugeMetricFamily | CounterMetricFamily, value: float
    ) -> GaugeMetricFamily | CounterMetricFamily:
        family.add_metric((self._model_name,), value)
        return family
