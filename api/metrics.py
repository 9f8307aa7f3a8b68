"""Prometheus metrics. Each of the shared names exists as `jaxserve:X` and as its alias `vllm:X`.

Everything is observed once, under its bare name; prefixes and aliases are made when metrics are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxserve.api.generation import RequestTimings
from jaxserve.messages import EngineInfo, EngineStats

PREFIXES = ("jaxserve:", "vllm:")
ALIASES = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
}
# fmt: off
SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 128)
# fmt: on
FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTION_REASONS = ("requests", "tokens")
LABEL = ("model_name",)


class Metrics:
    """All metrics of one server, in a registry of its own.

    Args:
        model_name: the first served name, a label of all of them.
        stats: the engine's gauges and totals, read when metrics are scraped.
        info: None until the engine is ready.
    """

    def __init__(
        self,
        model_name: str = "",
        stats: Callable[[], EngineStats] = EngineStats,
        info: Callable[[], EngineInfo | None] = lambda: None,
    ) -> None:
        self._model_name = model_name
        self._shared, self._own = CollectorRegistry(), CollectorRegistry()
        self._shared.register(_EngineCollector(model_name, stats, info))
        self._own.register(_OwnEngineCollector(model_name, stats))
        self._registry = CollectorRegistry()
        self._registry.register(_Prefixed(self._shared, PREFIXES))
        self._registry.register(_Prefixed(self._own, PREFIXES[:1]))

        histogram, counter = self._histogram, self._counter
        self._first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", SECONDS)
        self._inter_token = histogram("inter_token_latency_seconds", "Between tokens of a choice.", SECONDS)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to end.", REQUEST_SECONDS)
        self._queue = histogram("request_queue_time_seconds", "Arrival to first scheduled.", REQUEST_SECONDS)
        self._inference = histogram(
            "request_inference_time_seconds", "First scheduled to end.", REQUEST_SECONDS
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "First scheduled to first token.", REQUEST_SECONDS
        )
        self._decode = histogram("request_decode_time_seconds", "First token to end.", REQUEST_SECONDS)
        self._prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens of a request.", TOKENS
        )
        self._n = histogram("request_params_n", "n of a request.", COUNTS)
        self._best_of = histogram("request_params_best_of", "best_of of a request.", COUNTS)
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens of a request.", TOKENS)
        self._iteration = histogram("iteration_tokens_total", "Tokens computed by a step.", TOKENS)
        self._total_prompt = counter("prompt_tokens", "Prompt tokens processed.")
        self._total_generation = counter("generation_tokens", "Tokens generated.")
        self._total_cached = counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self._success = self._counters(
            "request_success", "Requests ended.", "finished_reason", FINISH_REASONS
        )
        self._rejections = self._counters(
            "admission_rejections", "Requests refused.", "reason", REJECTION_REASONS
        )

        self._step_seconds = Histogram(
            "engine_step_seconds", "A step of the engine.", LABEL, buckets=SECONDS, registry=self._own
        ).labels(model_name)
        self._grammar_seconds = Histogram(
            "grammar_compile_seconds", "Compilation of a grammar.", LABEL, buckets=SECONDS, registry=self._own
        ).labels(model_name)
        self._http_requests = Counter(
            "http_requests", "HTTP requests.", (*LABEL, "method", "route", "status"), registry=self._own
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "HTTP requests until the end of their response.",
            (*LABEL, "method", "route"),
            buckets=(0.005, 0.025, 0.1, *REQUEST_SECONDS),
            registry=self._own,
        )

    def observe_request(self, timings: RequestTimings) -> None:
        """A generation request has ended: one observation in everything that counts requests."""
        self._e2e.observe(timings.finished_at - timings.arrived_at)
        self._success[timings.finish_reason].inc()
        if timings.scheduled_at is not None:
            self._queue.observe(timings.scheduled_at - timings.arrived_at)
            self._inference.observe(timings.finished_at - timings.scheduled_at)
        if timings.first_token_at is not None:
            self._first_token.observe(timings.first_token_at - timings.arrived_at)
            self._decode.observe(timings.finished_at - timings.first_token_at)
            if timings.scheduled_at is not None:
                self._prefill.observe(timings.first_token_at - timings.scheduled_at)
        for seconds in timings.inter_token_s:
            self._inter_token.observe(seconds)
        self._prompt_tokens.observe(timings.prompt_tokens)
        self._generation_tokens.observe(timings.generation_tokens)
        self._n.observe(timings.n)
        self._best_of.observe(timings.best_of)
        self._max_tokens.observe(timings.max_tokens)
        self._total_prompt.inc(timings.prompt_tokens)
        self._total_generation.inc(timings.generation_tokens)
        self._total_cached.inc(timings.cached_tokens)

    def observe_step(self, stats: EngineStats) -> None:
        """A step of the engine has ended."""
        if stats.num_tokens:
            self._iteration.observe(stats.num_tokens)
            self._step_seconds.observe(stats.step_s)

    def observe_grammar(self, seconds: float) -> None:
        """A request's constraint was compiled, refused or found."""
        self._grammar_seconds.observe(seconds)

    def observe_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP response has ended; `route` is a template, so that there are few of them."""
        self._http_requests.labels(self._model_name, method, route, str(status)).inc()
        self._http_seconds.labels(self._model_name, method, route).observe(seconds)

    def count_rejection(self, reason: str) -> None:
        """A request was refused for one of REJECTION_REASONS."""
        self._rejections[reason].inc()

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        histogram = Histogram(name, text, LABEL, buckets=tuple(buckets), registry=self._shared)
        return histogram.labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, LABEL, registry=self._shared).labels(self._model_name)

    def _counters(self, name: str, text: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
        """One for each value, there from the start."""
        counter = Counter(name, text, (*LABEL, label), registry=self._shared)
        return {value: counter.labels(self._model_name, value) for value in values}


class _Prefixed(Collector):
    """The metrics of a registry under each prefix, and under their aliases."""

    def __init__(self, registry: CollectorRegistry, prefixes: Iterable[str]) -> None:
        self._registry = registry
        self._prefixes = tuple(prefixes)

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            names = [metric.name, ALIASES[metric.name]] if metric.name in ALIASES else [metric.name]
            for name in (prefix + name for prefix in self._prefixes for name in names):
                renamed = Metric(name, metric.documentation, metric.type)
                renamed.samples = [
                    sample._replace(name=name + sample.name.removeprefix(metric.name))
                    for sample in metric.samples
                    if not sample.name.endswith("_created")  # when a series began: of no use to anybody here
                ]
                yield renamed


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
        for name, text, gauge in (
            ("num_requests_running", "Sequences that run.", stats.num_running),
            ("num_requests_waiting", "Sequences that wait.", stats.num_waiting),
            ("kv_cache_usage_perc", "KV blocks in use, 0 to 1.", stats.kv_cache_usage),
        ):
            family = GaugeMetricFamily(name, text, labels=LABEL)
            family.add_metric((self._model_name,), gauge)
            yield family
        yield from _counter_families(
            self._model_name,
            ("num_preemptions", "Sequences that were preempted.", stats.num_preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found.", stats.prefix_cache_hits),
            ("spec_decode_num_drafts", "Speculative decoding: drafts.", stats.spec_decode_drafts),
            ("spec_decode_num_draft_tokens", "Tokens of drafts.", stats.spec_decode_draft_tokens),
            ("spec_decode_num_accepted_tokens", "Those accepted.", stats.spec_decode_accepted_tokens),
        )
        described = InfoMetricFamily("cache_config", "The KV cache.", labels=LABEL)
        info = self._info()
        if info is not None:
            cache = {
                "block_size": str(info.block_size),
                "num_gpu_blocks": str(info.num_blocks),
                "cache_dtype": info.kv_cache_dtype,
            }
            described.add_metric((self._model_name,), cache)
        yield described


class _OwnEngineCollector(Collector):
    """Likewise, what vLLM has no name for."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        yield from _counter_families(
            self._model_name,
            ("xla_compilations", "Programs compiled after the start.", self._stats().xla_compilations),
            ("engine_restarts", "An engine that has ended is not started again.", 0),
        )


def _counter_families(model_name: str, *counters: tuple[str, str, float]) -> Iterator[Metric]:
    for name, text, value in counters:
        family = CounterMetricFamily(name, text, labels=LABEL)
        family.add_metric((model_name,), value)
        yield family
