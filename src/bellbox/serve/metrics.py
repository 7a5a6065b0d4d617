"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bellbox.errors import require
from bellbox.serve.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        client = require("prometheus_client", "serve")
        self._client: Any = client
        self._registry: Any = client.CollectorRegistry()
        self.requests: Any = client.Counter(
            "bellbox_http_requests", "Requests answered", ["path", "status"], registry=self._registry
        )
        steps = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        self.first_token: Any = client.Histogram(
            "bellbox_first_token_seconds",
            "Seconds from a request to its first token, waiting included",
            buckets=steps,
            registry=self._registry,
        )
        self.whole: Any = client.Histogram(
            "bellbox_request_seconds",
            "Seconds of a completion, streamed or not",
            buckets=steps,
            registry=self._registry,
        )

    def watch(self, engine: Engine) -> None:
        """Give out an engine's counts, too."""
        self._registry.register(_Collector(engine, self._client))

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return self._client.generate_latest(self._registry)


class _Collector:
    def __init__(self, engine: Engine, client: Any) -> None:
        self._engine, self._families = engine, client.metrics_core

    def collect(self) -> Iterator[Any]:
        """What Prometheus' client asks for."""
        engine, counts = self._engine, self._engine.counts
        gauge, counter = self._families.GaugeMetricFamily, self._families.CounterMetricFamily
        yield gauge("bellbox_running", "Sequences being decoded", value=engine.running)
        yield gauge("bellbox_waiting", "Sequences in the queue", value=engine.waiting)
        yield counter("bellbox_generated_tokens", "New tokens", value=counts.tokens)
        yield counter("bellbox_prompt_tokens", "Tokens of prompts", value=counts.prompt_tokens)
        yield counter("bellbox_steps", "Rounds of decoding", value=counts.steps)
        yield counter("bellbox_rejected", "Requests that found the queue full", value=counts.rejected)
        yield counter("bellbox_cancelled", "Sequences that nobody wanted any longer", value=counts.cancelled)
        yield counter("bellbox_failed", "Sequences that ended in an error", value=counts.failed)
