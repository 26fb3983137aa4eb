"""What a router counts, for Prometheus, under vLLM's names with our prefix. One registry for each router."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cluster.api.engine_metrics import EngineMetrics
from cluster.contracts import Delta

PREFIX = "paceline"
MAX_POSITIONS = 64
LATENCY = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    600.0,
)


class Metrics:
    """Every series carries the model's name."""

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        self.of_engines = EngineMetrics(PREFIX, model)
        self.registry.register(self.of_engines)
        self._model = model
        self.running = self._gauge("num_requests_running", "Choices that this router has under way.")
        self.waiting = self._gauge("num_requests_waiting", "Choices that wait in engines for a slot.")
        self.engines = self._gauge("num_engines_healthy", "Engines that tokens can be had from.")
        self.drafting_failures = self._gauge(
            "drafting_failures", "Times that drafting failed in the engines there are now, and was built afresh."
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were submitted.")
        self.first_token = self._histogram("time_to_first_token_seconds", "From submission to the first token.")
        self.between_tokens = self._histogram("inter_token_latency_seconds", "Between tokens after the first step.")
        self.whole = self._histogram("e2e_request_latency_seconds", "From submission to the end of a choice.")
        self._generated = self._counter("generation_tokens", "Tokens that were generated.")
        self._drafts = self._counter("spec_decode_num_drafts", "Steps of a choice that verified drafts.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Draft tokens that were verified.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Draft tokens that were accepted.")
        self._failovers = self._counter("request_failovers", "Choices that moved to another engine.")
        self._by_position = self._labelled(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted draft tokens by position in the draft.", "position"
        )
        self._finished = self._labelled("request_success", "Choices that finished.", "finished_reason")
        self._responses = self._labelled("http_responses", "Answers by status.", "status")

    def clock(self) -> Clock:
        return Clock(self)

    def failed_over(self) -> None:
        self._failovers.inc()

    def responded(self, status: int) -> None:
        self._responses.labels(self._model, str(status)).inc()

    def step(self, delta: Delta) -> None:
        self._generated.inc(len(delta.token_ids))
        if delta.drafted:
            self._drafts.inc()
            self._drafted.inc(delta.drafted)
            self._accepted.inc(delta.accepted)
            for position in range(min(delta.accepted, MAX_POSITIONS)):
                self._by_position.labels(self._model, str(position)).inc()

    def finished(self, reason: str) -> None:
        self._finished.labels(self._model, reason).inc()

    def text(self) -> bytes:
        """In Prometheus' exposition format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", help, ("model_name",), registry=self.registry).labels(self._model)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", help, ("model_name",), registry=self.registry).labels(self._model)

    def _histogram(self, name: str, help: str) -> Histogram:
        full = f"{PREFIX}_{name}"
        return Histogram(full, help, ("model_name",), buckets=LATENCY, registry=self.registry).labels(self._model)

    def _labelled(self, name: str, help: str, label: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", help, ("model_name", label), registry=self.registry)


class Clock:
    """The times of one choice, from now on."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._began = time.monotonic()
        self._last: float | None = None

    def step(self, delta: Delta) -> None:
        self._metrics.step(delta)
        if not delta.token_ids:
            return
        now = time.monotonic()
        if self._last is None:
            self._metrics.first_token.observe(now - self._began)
        else:
            each = (now - self._last) / len(delta.token_ids)
            for _ in delta.token_ids:
                self._metrics.between_tokens.observe(each)
        self._last = now

    def end(self, finish: str) -> None:
        self._metrics.whole.observe(time.monotonic() - self._began)
        self._metrics.finished(finish)
