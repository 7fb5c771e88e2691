"""Traces over OTLP: a span for each request, and one for each stage of it. The only file that knows opentelemetry.

    POST /v1/embeddings   from routing to reply        child of what `traceparent` names
    ├── encode            texts to tokens
    ├── queue             until a lane takes the first input
    └── compute           until the last input has its result

A request hands its spans over and goes on: a thread sends them, from a queue that is bounded. Nothing of a caller's
texts, vectors or keys is in them.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus

import structlog
from opentelemetry import context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from quiver import __version__
from quiver.config import ServerConfig
from quiver.telemetry.observer import CANCELLED, Exchange
from quiver.types import Timings

log = structlog.get_logger(__name__)

FLUSH_SECONDS = 3.0
"""How long a stopping server tries to send its last spans."""
_FAILED = Status(StatusCode.ERROR)
_PARENT = TraceContextTextMapPropagator()
_WORK = context.create_key("quiver-work")


Attributes = Mapping[str, str | int]


@dataclass(slots=True)
class _Work:
    """What was computed, summed up."""

    model: str = ""
    inputs: int = 0
    tokens: int = 0


class OtlpTracer:
    """Sends spans to a collector, and never keeps a request waiting for it."""

    def __init__(self, config: ServerConfig) -> None:
        # It would log for each batch that nobody takes, and what clients wrote into their headers.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        endpoint, ratio = config.otlp_endpoint, config.otlp_sample_ratio
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=None if "://" in endpoint else True)
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(ratio) if ratio < 1 else None,  # None: as OTEL_TRACES_SAMPLER has it
            resource=Resource.create({"service.name": config.otlp_service_name, "service.version": __version__}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(_OutspokenExporter(exporter, endpoint)))
        self._tracer = self._provider.get_tracer("quiver", __version__)

    @contextmanager
    def tracing(self, exchange: Exchange, headers: Mapping[str, str]) -> Iterator[None]:
        """Follow a request until it is answered, or its client has gone."""
        parent, start = _PARENT.extract(headers), _wall_ns(exchange.start)
        span, work = self._tracer.start_span("request", parent, SpanKind.SERVER, start_time=start), _Work()
        token = context.attach(context.set_value(_WORK, work, set_span_in_context(span, parent)))
        try:
            yield
        except asyncio.CancelledError:
            exchange.error = CANCELLED
            raise
        finally:
            context.detach(token)
            _finish(span, exchange, work)

    def inputs_computed(self, model: str, inputs: int, tokens: int, timings: Timings) -> None:
        """Add the stages to the request at hand, or to the one that a job came with."""
        work = context.get_value(_WORK)
        if not isinstance(work, _Work) or not get_current_span().get_span_context().trace_flags.sampled:
            return
        work.model, work.inputs, work.tokens = model, work.inputs + inputs, work.tokens + tokens
        handed_over = timings.start + timings.encode
        taken = handed_over + timings.first
        self._stage("encode", timings.start, handed_over, {})
        self._stage("queue", handed_over, taken, {})
        self._stage("compute", taken, timings.start + timings.total, _computed(_Work(model, inputs, tokens)))

    def _stage(self, name: str, start: float, end: float, attributes: Attributes) -> None:
        self._tracer.start_span(name, attributes=attributes, start_time=_wall_ns(start)).end(_wall_ns(end))

    def close(self) -> None:
        """Send what is left, within a bounded time; blocks."""
        closing = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        closing.start()
        closing.join(FLUSH_SECONDS)
        if closing.is_alive():
            log.warning("the last traces were not sent in time", seconds=FLUSH_SECONDS)


def _finish(span: Span, exchange: Exchange, work: _Work) -> None:
    """Say what a request came to, and let its span go; only a fault that is not the client's makes it a failed one."""
    if span.is_recording():
        span.update_name(f"{exchange.method} {exchange.route}")
        span.set_attributes({"http.request.method": exchange.method, **_came_to(exchange), **_computed(work)})
        if exchange.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            span.set_status(_FAILED)
    span.end()


def _came_to(exchange: Exchange) -> Attributes:
    said: dict[str, str | int] = {"http.route": exchange.route, "quiver.dialect": exchange.dialect}
    if exchange.status:
        said["http.response.status_code"] = exchange.status
    if exchange.error or exchange.status >= HTTPStatus.BAD_REQUEST:
        said["error.type"] = exchange.error or str(exchange.status)
    return said


def _computed(work: _Work) -> Attributes:
    if not work.inputs:
        return {}
    return {"quiver.model": work.model, "quiver.inputs": work.inputs, "quiver.tokens": work.tokens}


def _wall_ns(at: float) -> int:
    """Return what the clock on the wall showed at a time of the performance counter."""
    return time.time_ns() - round((time.perf_counter() - at) * 1e9)


class _OutspokenExporter(SpanExporter):
    """Says once that nobody takes the spans, and once that somebody does again."""

    def __init__(self, exporter: OTLPSpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._is_heard = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send; what nobody takes is dropped."""
        result = self._exporter.export(spans)
        if (is_heard := result is SpanExportResult.SUCCESS) != self._is_heard:
            self._is_heard = is_heard
            if is_heard:
                log.info("traces are taken again", endpoint=self._endpoint)
            else:
                log.warning("nobody takes the traces: they are dropped until someone does", endpoint=self._endpoint)
        return result

    def shutdown(self) -> None:
        """Hang up."""
        self._exporter.shutdown()
