"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters of one server, none of which has a label that a client chooses."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("llm2clip_requests", "Requests.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "llm2clip_request_seconds", "Time of a request.", ["path"], buckets=SECONDS, registry=registry
        )
        self.inputs = Counter("llm2clip_inputs", "Embedded texts and images.", ["kind"], registry=registry)
        self.tokens = Counter("llm2clip_tokens", "Tokens of embedded texts, before truncation.", registry=registry)
        self.truncated = Counter("llm2clip_truncated_texts", "Texts longer than the model reads.", registry=registry)
        self.waiting = Gauge("llm2clip_waiting", "Texts and images of accepted requests.", registry=registry)
        self.batches = Histogram(
            "llm2clip_batch_size", "Inputs of a batch.", ["kind"], buckets=SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "llm2clip_batch_seconds", "Time of a batch.", ["kind"], buckets=SECONDS, registry=registry
        )

    def text(self) -> bytes:
        """Write all in the text format of Prometheus."""
        return generate_latest(self.registry)
