"""Metrics of the engine and the server in Prometheus' format."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric

FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
REQUEST_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Counts requests and times of the server. The engine's metrics are passed to `text`."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "tpllm_requests",
            "HTTP requests answered, by path and outcome",
            ("path", "outcome"),
            registry=self._registry,
        )
        self.first_token_s = self._histogram(
            "tpllm_time_to_first_token_seconds",
            "Time from the engine's receiving a request to each answer's first token",
            FIRST_TOKEN_S,
        )
        self.between_tokens_s = self._histogram(
            "tpllm_inter_token_seconds", "Time between two parts of an answer", BETWEEN_TOKENS_S
        )
        self.request_s = self._histogram(
            "tpllm_request_seconds",
            "Time from the engine's receiving a request to its last token",
            REQUEST_S,
        )

    def _histogram(self, name: str, words: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, words, buckets=tuple(buckets), registry=self._registry)

    def text(self, engine: Iterable[Metric]) -> bytes:
        """Return all metrics in Prometheus' text format."""
        collector: Any = SimpleNamespace(collect=lambda: engine)
        return generate_latest(collector) + generate_latest(self._registry)
