"""The one object that the layers report to; the only file that knows prometheus."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quiver import __version__
from quiver.telemetry.whole import Snapshot, snapshot_of, written
from quiver.types import FileProgress, Kind, Timings

log = structlog.get_logger(__name__)

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = tuple(sorted({96, 192, *(2**n for n in range(21))}))
INPUTS = tuple(2**n for n in range(13))
"""Buckets; those of `families.py` are among them, where they are read from here."""
MAX_REMEMBERED = 1024
"""Most sets of labels whose counters are kept at hand, for each metric."""
MAX_UNCOUNTED, FEW_INPUTS = 64, 8
"""Most events that are noted and not counted yet, and most inputs of a request that is one of them."""
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
OTHER_METHOD = "_OTHER"
"""What any other is called: a client may write what it likes there."""
CANCELLED = "cancelled"
"""The error of a request whose client has left."""


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


@dataclass(frozen=True, slots=True)
class Work:
    """What one request has had computed."""

    model: str
    kind: Kind
    encodings: Sequence[Sized]
    """Of each input, as long as it is in tokens."""
    tokens: int
    """That the model read: those of results that were known before are not among them."""
    timings: Timings
    waits: Sequence[float] = ()
    """Seconds until a lane was free, of each input that was computed."""


class Tracer(Protocol):
    """Where requests are told one by one, if anywhere (`telemetry/traces.py`)."""

    def tracing(self, exchange: Exchange, headers: Mapping[str, str]) -> AbstractContextManager[None]:
        """Follow a request until it is answered or given up; its headers tell the trace that it belongs to."""
        ...

    def inputs_computed(self, model: str, inputs: int, tokens: int, timings: Timings) -> None:
        """Note what the request at hand computed."""
        ...


Canonical = Mapping[str, Metric]
"""Quiver's own metrics by their names, as they stand."""


class Family(Protocol):
    """The metrics of another system, beside our own (`telemetry/families.py`)."""

    def answered(self, exchange: Exchange, seconds: float) -> None:
        """Hear of a request that was answered."""
        ...

    def computed(self, work: Work) -> None:
        """Hear of what was computed."""
        ...

    def repeated(self, model: str, inputs: int, seconds: float) -> None:
        """Hear of a reply that was given again, byte for byte."""
        ...

    def failed(self, model: str, kind: Kind, inputs: int, seconds: float) -> None:
        """Hear of inputs for which there are no results, whatever was wrong."""
        ...

    def metrics(self, canonical: Canonical) -> Iterator[Metric]:
        """Yield them as they stand."""
        ...


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that someone else keeps, for each value of a label if there is one; what counts up is `counted`."""

    name: str
    help: str
    values: Mapping[str, float]
    label: str = ""
    counted: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of a metric."""

    name: str
    labels: Mapping[str, str]
    value: float


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


M = TypeVar("M", Counter, Histogram)


def _at_hand(metric: M) -> Callable[..., M]:
    """Look a metric's children up by their labels once: each request needs some."""
    return lru_cache(MAX_REMEMBERED)(metric.labels)


def collected(source: Collector) -> Iterator[Metric]:
    """Yield a source's metrics, without the times at which each of their series began."""
    for metric in source.collect():
        metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
        yield metric


class Observer:
    """Counts and times; its registry is its own, so that two servers in one process do not mix."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self._families: tuple[Family, ...] = ()
        self._at_work = 0
        self._uncounted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        """Counting takes longer than all else that is done for a reply once its vectors are there: it comes behind."""
        self._reads: list[Callable[[], Sequence[Figure]]] = []
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        gauge = partial(Gauge, registry=registry)
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        timing = partial(histogram, buckets=SECONDS)
        gauge("quiver_build_info", "1, with the version.", ("version",)).labels(__version__).set(1)
        gauge("quiver_requests_at_work", "Requests that are being answered.").set_function(lambda: self._at_work)
        self._requests = _at_hand(counter("quiver_requests", "Requests answered.", ("dialect", "route", "status")))
        self._errors = _at_hand(
            counter("quiver_failed_requests", "Requests answered with an error, or left by their client.", ("error",))
        )
        self._refusals = _at_hand(
            counter("quiver_refused_requests", "Requests refused before their body was read.", ("error",))
        )
        self._latency = _at_hand(timing("quiver_request_seconds", "Time from routing to reply.", ("route",)))
        self._inputs = _at_hand(histogram("quiver_request_inputs", "Inputs of a request.", ("model",), buckets=INPUTS))
        self._tokens = _at_hand(counter("quiver_tokens", "Tokens that models read.", ("model",)))
        self._stages = _at_hand(
            timing("quiver_stage_seconds", "Time of a request in each stage: encode, queue, compute.", ("stage",))
        )
        self._batch_inputs = _at_hand(
            histogram("quiver_batch_inputs", "Inputs of a forward pass.", ("model",), buckets=INPUTS)
        )
        self._batch_tokens = _at_hand(
            histogram("quiver_batch_tokens", "Tokens of a forward pass.", ("model",), buckets=TOKENS)
        )
        self._forward = _at_hand(timing("quiver_forward_seconds", "Time of a forward pass.", ("model",)))
        self._failed = counter("quiver_failed_inputs", "Inputs the model could not compute.", ("model", "error"))
        self._deaths = counter("quiver_lane_deaths", "Lanes that ended by a fault.", ("model",))
        self._tasks = gauge("quiver_loop_tasks", "Tasks of the event loop.")
        self._lag = timing("quiver_loop_lag_seconds", "How late the event loop comes to a timer.")
        self._downloaded = gauge("quiver_download_bytes", "Bytes fetched of a model's file.", ("model", "file"))
        self._to_download = gauge("quiver_download_size_bytes", "Size of a file that is fetched.", ("model", "file"))

    def also_as(self, *families: Family) -> None:
        """Show the metrics of other systems, too."""
        self._families = families

    @contextmanager
    def exchange(self, method: str, headers: Mapping[str, str]) -> Iterator[Exchange]:
        """Count a request once it is answered: whoever answers it fills in what is yielded."""
        exchange = Exchange(method if method in METHODS else OTHER_METHOD)
        self._at_work += 1
        try:
            with self._tracer.tracing(exchange, headers) if self._tracer else nullcontext():
                yield exchange
        except asyncio.CancelledError:
            self._errors(CANCELLED).inc()
            raise
        finally:
            self._at_work -= 1
        self._soon(self._answered, exchange, time.perf_counter() - exchange.start)

    def _soon(self, count: Callable[..., None], *what: Any) -> None:
        """Count with some others that come, or once somebody reads; on the event loop."""
        self._uncounted.append((count, what))
        if len(self._uncounted) >= MAX_UNCOUNTED:
            self._count()

    def _count(self) -> None:
        while self._uncounted:
            count, what = self._uncounted.popleft()
            count(*what)

    def _answered(self, exchange: Exchange, seconds: float) -> None:
        self._requests(exchange.dialect, exchange.route, exchange.status).inc()
        self._latency(exchange.route).observe(seconds)
        if exchange.error or exchange.status >= HTTPStatus.BAD_REQUEST:
            self._errors(exchange.error or str(exchange.status)).inc()
        for family in self._families:
            family.answered(exchange, seconds)

    def request_repeated(self, exchange: Exchange, model: str, inputs: int, seconds: float) -> None:
        """Count a request that got the reply of an earlier one."""
        self._soon(self._answered, exchange, seconds)
        for family in self._families:
            family.repeated(model, inputs, seconds)

    def inputs_computed(self, work: Work) -> None:
        """Count what one request computed."""
        if self._tracer:
            self._tracer.inputs_computed(work.model, len(work.encodings), work.tokens, work.timings)
        self._soon(self._computed, work)
        if len(work.encodings) > FEW_INPUTS:
            self._count()  # it holds too much to be kept

    def _computed(self, work: Work) -> None:
        timings = work.timings
        self._inputs(work.model).observe(len(work.encodings))
        self._tokens(work.model).inc(work.tokens)
        self._stages("encode").observe(timings.encode)
        self._stages("queue").observe(timings.first)
        self._stages("compute").observe(timings.compute - timings.first)
        for family in self._families:
            family.computed(work)

    def inputs_left(self, model: str, kind: Kind, inputs: int, seconds: float) -> None:
        """Tell of inputs for which there are no results: refused, failed, or left by their client."""
        for family in self._families:
            family.failed(model, kind, inputs, seconds)

    def batch_computed(self, model: str, inputs: int, tokens: int, seconds: float) -> None:
        """Count one forward pass; in any thread."""
        self._uncounted.append((self._batch_computed, (model, inputs, tokens, seconds)))

    def _batch_computed(self, model: str, inputs: int, tokens: int, seconds: float) -> None:
        self._batch_inputs(model).observe(inputs)
        self._batch_tokens(model).observe(tokens)
        self._forward(model).observe(seconds)

    def input_failed(self, model: str, error: str) -> None:
        """Count an input that the model could not compute; `error` is the code of an error."""
        self._failed.labels(model, error).inc()

    def lane_died(self, model: str, why: str) -> None:
        """Count a lane that ended by a fault, and log it."""
        self._deaths.labels(model).inc()
        log.error("a lane died", model=model, why=why)

    def request_refused(self, error: str) -> None:
        """Count a request that was refused before its body was read; costs a microsecond."""
        self._refusals(error).inc()

    def watch_tasks(self, tasks: Callable[[], float]) -> None:
        """Show how many tasks the event loop has."""
        self._tasks.set_function(tasks)

    def loop_lagged(self, seconds: float) -> None:
        """Note how late the event loop was."""
        self._lag.observe(seconds)

    def download_progressed(self, model: str, progress: FileProgress) -> None:
        """Note how far a file is."""
        self._downloaded.labels(model, progress.file).set(progress.done_bytes)
        self._to_download.labels(model, progress.file).set(progress.total_bytes)

    def watch(self, *reads: Callable[[], Sequence[Figure]]) -> None:
        """Show figures that someone else keeps."""
        for read in reads:
            self._reads.append(read)
            self._registry.register(_Watched(read))

    @property
    def figures(self) -> Iterator[Figure]:
        """Every figure that someone else keeps, as it stands."""
        return (figure for read in self._reads for figure in read())

    def samples(self, *names: str) -> Sequence[Sample]:
        """Read some of its own metrics: a counter as NAME_total, a histogram as NAME_bucket, cumulative up to each `le`."""
        self._count()
        metrics = self._registry.restricted_registry(names).collect()
        return [
            Sample(each.name, each.labels, each.value)
            for metric in metrics
            for each in metric.samples
            if each.name in names
        ]

    def snapshot(self) -> Snapshot:
        """Return every metric as it stands, for those who put several processes' together."""
        return snapshot_of(self._metrics())

    def exposition(self) -> bytes:
        """Return every metric in Prometheus's text format."""
        return written(self._metrics())

    def _metrics(self) -> Sequence[Metric]:
        self._count()
        metrics = tuple(collected(self._registry))
        canonical = {metric.name: metric for metric in metrics}
        return (*metrics, *(each for family in self._families for each in family.metrics(canonical)))
