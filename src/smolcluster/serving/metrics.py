"""`GET /metrics`: what the engine does, for Prometheus, under vLLM's names with `smolcluster:` in front.

Source    https://docs.vllm.ai/en/latest/usage/metrics.html
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from smolcluster.serving.engine import Engine
from smolcluster.serving.replica import Observer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_HOP = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class ServingMetrics(Observer):
    """Histograms of what is observed, and the engine's counters when somebody asks."""

    def __init__(self, model: str) -> None:
        """Begin at zero; `model` is the label model_name."""
        self._registry = CollectorRegistry()
        self._model = model
        self._engine: Engine | None = None
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token.", _FIRST)
        self._gap = self._histogram("inter_token_latency_seconds", "From a token to the next one.", _GAP)
        self._hop = self._histogram("hop_seconds", "From a stage to the next one, or back; where one computes.", _HOP)
        text = "Seconds that each stage has computed."
        self._computed = Counter(
            "smolcluster:stage_compute_seconds", text, ["model_name", "stage"], registry=self._registry
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to its end.", _WHOLE)

    def watch(self, engine: Engine) -> None:
        """Tell what this engine does."""
        self._engine = engine
        self._registry.register(self)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)

    def first_token(self, seconds: float) -> None:
        """See Observer."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """See Observer."""
        self._gap.observe(seconds)

    def ended(self, seconds: float) -> None:
        """See Observer."""
        self._whole.observe(seconds)

    def computed(self, stage: int, seconds: float) -> None:
        """See Observer."""
        self._computed.labels(self._model, stage).inc(seconds)

    def hopped(self, seconds: float) -> None:
        """See Observer."""
        self._hop.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The engine's own numbers; called by the registry."""
        engine = self._engine
        if engine is None:
            return
        counts = engine.counts
        gauges = (
            ("num_requests_running", "Requests that have a slot.", engine.running),
            ("num_requests_waiting", "Requests that wait for one.", engine.waiting),
            ("kv_cache_usage_perc", "Part of the slots that is in use, 0 to 1.", engine.usage),
        )
        counters = (
            ("prompt_tokens", "Tokens of prompts.", counts.prompt_tokens),
            ("generation_tokens", "Tokens of answers.", counts.answer_tokens),
            ("prefix_cache_queries", "Tokens of prompts that were looked for in the slots.", counts.prompt_tokens),
            ("prefix_cache_hits", "Tokens that were there and not computed again.", counts.reused_tokens),
            ("recoveries", "Times that the stages were put together anew.", counts.recoveries),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"smolcluster:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(f"smolcluster:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        finished = CounterMetricFamily(
            "smolcluster:request_success", "Requests that have ended.", labels=["model_name", "finished_reason"]
        )
        for reason, number in sorted(counts.finished.items()):
            finished.add_metric([self._model, reason], number)
        yield finished

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"smolcluster:{name}", text, ["model_name"], buckets=buckets, registry=self._registry)
        labelled: Histogram = histogram.labels(self._model)
        return labelled
