"""The one object that the layers report to; the only file that knows prometheus."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quiver.types import FileProgress, Timings

log = structlog.get_logger(__name__)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = (8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 4096, 16384)
_INPUTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(slots=True)
class Exchange:
    """One request on its way to its reply: what it is, and what it comes to."""

    method: str
    start: float = field(default_factory=time.perf_counter)
    dialect: str = ""
    route: str = "unmatched"
    """A template, never a path that a client chose."""
    status: int = 0
    """0: not answered yet."""
    error: str = ""
    """The code of an error, if it ended with one."""


class Tracer(Protocol):
    """Where requests are told one by one, if anywhere (`telemetry/traces.py`)."""

    def tracing(self, exchange: Exchange, headers: Mapping[str, str]) -> AbstractContextManager[None]:
        """Follow a request until it is answered or given up; its headers tell the trace that it belongs to."""
        ...

    def inputs_computed(self, model: str, inputs: int, tokens: int, timings: Timings) -> None:
        """Note what the request at hand computed."""
        ...


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that someone else keeps, for each value of a label if there is one; what counts up is `counted`."""

    name: str
    help: str
    values: Mapping[str, float]
    label: str = ""
    counted: bool = False


class _Watched(Collector):
    """Reads figures when they are asked for: counting costs nothing on the way."""

    def __init__(self, read: Callable[[], Sequence[Figure]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Write them as Prometheus has them."""
        for figure in self._read():
            family = CounterMetricFamily if figure.counted else GaugeMetricFamily
            metric = family(figure.name, figure.help, labels=[figure.label] if figure.label else [])
            for value, number in figure.values.items():
                metric.add_metric([value] if figure.label else [], number)
            yield metric


class Observer:
    """Counts and times; its registry is its own, so that two servers in one process do not mix."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "quiver_requests", "Requests answered.", ("dialect", "route", "status"), registry=registry
        )
        self._latency = Histogram(
            "quiver_request_seconds", "Time from routing to reply.", ("route",), buckets=_SECONDS, registry=registry
        )
        self._inputs = Histogram(
            "quiver_request_inputs", "Inputs of a request.", ("model",), buckets=_INPUTS, registry=registry
        )
        self._tokens = Counter("quiver_tokens", "Tokens that models read.", ("model",), registry=registry)
        self._stages = Histogram(
            "quiver_stage_seconds", "Time in each stage of a request.", ("stage",), buckets=_SECONDS, registry=registry
        )
        self._batch_tokens = Histogram(
            "quiver_batch_tokens", "Tokens of a forward pass.", ("model",), buckets=_TOKENS, registry=registry
        )
        self._forward = Histogram(
            "quiver_forward_seconds", "Time of a forward pass.", ("model",), buckets=_SECONDS, registry=registry
        )
        self._failed = Counter(
            "quiver_failed_inputs", "Inputs the model could not compute.", ("model", "error"), registry=registry
        )
        self._deaths = Counter("quiver_lane_deaths", "Lanes that ended by a fault.", ("model",), registry=registry)
        self._refusals = Counter(
            "quiver_refused_requests", "Requests refused before their body was read.", ("error",), registry=registry
        )
        self._refusal_of: dict[str, Counter] = {}
        self._tasks = Gauge("quiver_loop_tasks", "Tasks of the event loop.", registry=registry)
        self._lag = Histogram(
            "quiver_loop_lag_seconds", "How late the event loop comes to a timer.", buckets=_SECONDS, registry=registry
        )
        self._downloaded = Gauge(
            "quiver_download_bytes", "Bytes fetched of a model's file.", ("model", "file"), registry=registry
        )
        self._waiting = Gauge("quiver_waiting_tokens", "Tokens that wait for a lane.", ("model",), registry=registry)
        self._invariant = Gauge(
            "quiver_batch_invariant",
            "1 where vectors are bit-identical alone and packed.",
            ("model",),
            registry=registry,
        )

    @contextmanager
    def exchange(self, method: str, headers: Mapping[str, str]) -> Iterator[Exchange]:
        """Count a request once it is answered: whoever answers it fills in what is yielded."""
        exchange = Exchange(method)
        with self._tracer.tracing(exchange, headers) if self._tracer else nullcontext():
            yield exchange
        self._requests.labels(exchange.dialect, exchange.route, exchange.status).inc()
        self._latency.labels(exchange.route).observe(time.perf_counter() - exchange.start)

    def inputs_computed(self, model: str, inputs: int, tokens: int, timings: Timings) -> None:
        """Count what one request computed."""
        self._inputs.labels(model).observe(inputs)
        self._tokens.labels(model).inc(tokens)
        self._stages.labels("encode").observe(timings.encode)
        self._stages.labels("compute").observe(timings.compute)
        if self._tracer:
            self._tracer.inputs_computed(model, inputs, tokens, timings)

    def batch_computed(self, model: str, tokens: int, seconds: float) -> None:
        """Count one forward pass."""
        self._batch_tokens.labels(model).observe(tokens)
        self._forward.labels(model).observe(seconds)

    def input_failed(self, model: str, error: str) -> None:
        """Count an input that the model could not compute; `error` is the code of an error."""
        self._failed.labels(model, error).inc()

    def lane_died(self, model: str, why: str) -> None:
        """Count a lane that ended by a fault, and log it."""
        self._deaths.labels(model).inc()
        log.error("a lane died", model=model, why=why)

    def request_refused(self, error: str) -> None:
        """Count a request that was refused before its body was read; costs a microsecond."""
        if error not in self._refusal_of:
            self._refusal_of[error] = self._refusals.labels(error)
        self._refusal_of[error].inc()

    def watch_tasks(self, tasks: Callable[[], float]) -> None:
        """Show how many tasks the event loop has."""
        self._tasks.set_function(tasks)

    def loop_lagged(self, seconds: float) -> None:
        """Note how late the event loop was."""
        self._lag.observe(seconds)

    def model_loaded(self, model: str, *, batch_invariant: bool, waiting_tokens: Callable[[], float]) -> None:
        """Begin to watch a model's queue."""
        self._invariant.labels(model).set(batch_invariant)
        self._waiting.labels(model).set_function(waiting_tokens)

    def model_unloaded(self, model: str) -> None:
        """Stop watching a model's queue."""
        self._invariant.remove(model)
        self._waiting.remove(model)

    def download_progressed(self, model: str, progress: FileProgress) -> None:
        """Note how far a file is."""
        self._downloaded.labels(model, progress.file).set(progress.done_bytes)

    def watch(self, read: Callable[[], Sequence[Figure]]) -> None:
        """Show figures that someone else keeps."""
        self._registry.register(_Watched(read))

    def exposition(self) -> bytes:
        """Return every metric in Prometheus's text format."""
        return generate_latest(self._registry)
