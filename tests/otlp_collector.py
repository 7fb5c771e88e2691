"""A collector of OpenTelemetry as small as can be: it takes spans by gRPC, and keeps them."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as wire
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PATIENCE_SECONDS = 20.0


class Collector(service.TraceServiceServicer):
    """Keeps what it is sent; `answering` is cleared to let its clients wait."""

    def __init__(self) -> None:
        self.requests: list[wire.ExportTraceServiceRequest] = []
        self.answering = threading.Event()
        self.answering.set()
        self.asked = threading.Event()
        self._changed = threading.Condition()
        self.endpoint = ""

    def Export(  # noqa: N802  the protocol's name
        self, request: wire.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> wire.ExportTraceServiceResponse:
        """Take spans."""
        del context
        self.asked.set()
        self.answering.wait()
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        return wire.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Span]:
        """Every span so far."""
        parts = [part for request in self.requests for part in request.resource_spans]
        return [span for part in parts for scope in part.scope_spans for span in scope.spans]

    @property
    def resource(self) -> dict[str, object]:
        """What the sender says of itself."""
        return values(self.requests[0].resource_spans[0].resource.attributes)

    def wait_for(self, number: int) -> list[Span]:
        """Return the spans once there are so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.spans) >= number, PATIENCE_SECONDS), self.spans
        return self.spans


def values(attributes: object) -> dict[str, object]:
    """Return attributes as a dictionary."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}  # type: ignore[attr-defined]


@contextlib.contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """Run a collector on a port of this machine."""
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    service.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    assert port
    collector.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        collector.answering.set()
        server.stop(None).wait()
