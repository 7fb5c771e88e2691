"""Whether traces are sent; without them nothing of OpenTelemetry is imported."""

from collections.abc import Iterator
from contextlib import contextmanager

from quiver.config import ServerConfig
from quiver.errors import MissingExtra
from quiver.telemetry.observer import Tracer


@contextmanager
def tracer(config: ServerConfig) -> Iterator[Tracer | None]:
    """Yield what sends traces, if any are to be sent; the last ones go at the end. Raises `MissingExtra`."""
    if not (config.otlp_endpoint and config.otlp_traces):
        yield None
        return
    try:
        from quiver.telemetry.traces import OtlpTracer  # noqa: PLC0415  it is optional
    except ModuleNotFoundError as error:
        raise MissingExtra("otel", "sending traces to otlp_endpoint") from error
    sending = OtlpTracer(config)
    try:
        yield sending
    finally:
        sending.close()
