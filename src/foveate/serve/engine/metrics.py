"""Metrics: what a server counts, for Prometheus. What vLLM counts too has vLLM's name after the colon.

Counters and histograms are filled as things happen; gauges are read when somebody asks (`Gauges`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from foveate.serve.engine.jobs import Job

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True, kw_only=True)
class Gauges:
    """Values of the moment.

    Attributes:
        values: name without prefix -> (what it is, value).
        layers: mean level of each weight, by its site's name.
        switches: (direction, by) -> how many changes of the index.
        refused: how many requests were refused as there was no room for them.
    """

    values: Mapping[str, tuple[str, float]]
    layers: Mapping[str, float]
    switches: Mapping[tuple[str, str], int]
    refused: int


@dataclass(kw_only=True)
class Times:
    """Sums of seconds that benchmarks read.

    Attributes:
        forward: within forward passes of steps that only decode.
        whole: of those steps, from the end of the one before.
        steps: how many of them.
    """

    forward: float = 0.0
    whole: float = 0.0
    steps: int = 0


@dataclass(kw_only=True)
class Metrics:
    """The counters and histograms of one server."""

    registry: CollectorRegistry = field(default_factory=lambda: CollectorRegistry(auto_describe=False))
    times: Times = field(default_factory=Times)

    def __post_init__(self) -> None:
        made = self.registry

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"foveate:{name}", text, buckets=_SECONDS, registry=made)

        self._first = seconds("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._between = seconds("inter_token_latency_seconds", "From a token of an answer to its next.")
        self._whole = seconds("e2e_request_latency_seconds", "From a request's arrival to its last token.")
        self._queue = seconds("request_queue_time_seconds", "From a request's arrival to its first step.")
        self._prompt = Counter("foveate:prompt_tokens", "Tokens of prompts that were computed.", registry=made)
        self._tokens = Counter("foveate:generation_tokens", "Tokens of answers.", registry=made)
        self._done = Counter(
            "foveate:request_success", "Requests that ended, by reason.", ["finished_reason"], registry=made
        )
        self._lengths = Histogram(
            "foveate:request_generation_tokens", "Tokens of an answer.", buckets=_TOKENS, registry=made
        )
        self._batch = Histogram(
            "foveate:requests_in_step", "Requests of a step.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=made
        )

    def started(self, job: Job, moment: float) -> None:
        """A job has left the queue."""
        self._queue.observe(moment - job.arrived)

    def token(self, job: Job, moment: float) -> None:
        """A job has one more token."""
        self._tokens.inc()
        if job.latest is None:
            self._first.observe(moment - job.arrived)
        else:
            self._between.observe(moment - job.latest)

    def ended(self, job: Job, reason: str, moment: float | None = None) -> None:
        """A job has ended: `stop`, `length`, `abort` or `error`."""
        self._done.labels(finished_reason=reason).inc()
        self._lengths.observe(job.produced)
        if moment is not None:
            self._whole.observe(moment - job.arrived)

    def step(self, requests: int, prompt_tokens: int, forward: float, whole: float | None) -> None:
        """A step was computed.

        Args:
            requests: in the step.
            prompt_tokens: of prompts in the step.
            forward: seconds of the model.
            whole: seconds since the end of the step before; None if the server was idle between.
        """
        self._batch.observe(requests)
        self._prompt.inc(prompt_tokens)
        if not prompt_tokens and whole is not None:
            self.times.forward += forward
            self.times.whole += whole
            self.times.steps += 1

    def text(self, gauges: Gauges) -> bytes:
        """What `/metrics` answers."""
        whole = CollectorRegistry(auto_describe=False)
        whole.register(_Collected(self.registry, gauges))
        return generate_latest(whole)


class _Collected(Collector):
    """The counters of a server with its gauges of the moment."""

    def __init__(self, registry: CollectorRegistry, gauges: Gauges) -> None:
        self._registry, self._gauges = registry, gauges

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for."""
        yield from self._registry.collect()
        for name, (text, value) in self._gauges.values.items():
            yield GaugeMetricFamily(f"foveate:{name}", text, value)
        yield _labelled(
            CounterMetricFamily("foveate:precision_switches", "Changes of the index.", labels=["direction", "by"]),
            self._gauges.switches.items(),
        )
        yield _labelled(
            GaugeMetricFamily("foveate:layer_bits", "Mean level of a weight, bits.", labels=["layer"]),
            (((name,), bits) for name, bits in self._gauges.layers.items()),
        )
        yield CounterMetricFamily("foveate:requests_refused", "Requests refused with 429.", value=self._gauges.refused)


def _labelled(family: Metric, values: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    for labels, value in values:
        family.add_metric(list(labels), value)  # type: ignore[attr-defined]
    return family
