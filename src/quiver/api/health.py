"""Whether the server lives, whether it can answer, and what it has counted.

Liveness is cheap and true: it fails once a lane has died. Readiness is a real forward pass of every model.
"""

import time

import msgspec

from quiver import __version__
from quiver.api.call import TEXT, Call, Dialect, Reply, Route
from quiver.errors import NotReady
from quiver.service import Service
from quiver.types import ModelState, ModelStatus


class Download(msgspec.Struct):
    """How far a file is."""

    file: str
    done_bytes: int
    total_bytes: int


class ModelHealth(msgspec.Struct):
    """What one model is doing."""

    id: str
    state: str
    error: str
    downloads: list[Download]


class Processes(msgspec.Struct):
    """How many processes of the server are ready, and how many there should be."""

    ready: int
    wanted: int


class Health(msgspec.Struct):
    """The server at a glance: the process that answers, and how many there are beside it."""

    status: str
    version: str
    unix: float
    models: list[ModelHealth]
    processes: Processes


async def live(service: Service, call: Call) -> Reply:
    """Tell whether the process can still serve; 503 means: restart it."""
    del call
    if fault := service.fault():
        raise fault
    return _reply(service, 200, "ok")


async def ready(service: Service, call: Call) -> Reply:
    """Tell whether a request would be answered now."""
    del call
    await service.check_ready()
    return _reply(service, 200, "ok")


async def health(service: Service, call: Call) -> Reply:
    """Tell both in one word: starting, ok, stopping or failed."""
    del call
    if service.fault():
        return _reply(service, 503, "failed")
    if service.stopping:
        return _reply(service, 503, "stopping")
    try:
        await service.check_ready()
    except NotReady:
        return _reply(service, 503, "starting")
    return _reply(service, 200, "ok")


async def metrics(service: Service, call: Call) -> Reply:
    """Show every metric in Prometheus's text format."""
    return Reply(200, await service.metrics(call.caller), media_type="text/plain; version=0.0.4; charset=utf-8")


def _reply(service: Service, status: int, word: str) -> Reply:
    models = [_model(m) for m in service.models() if m.state is not ModelState.AVAILABLE]
    health = Health(word, __version__, time.time(), models, Processes(*service.processes()))
    return Reply(status, msgspec.json.encode(health))


def _model(status: ModelStatus) -> ModelHealth:
    downloads = [Download(p.file, p.done_bytes, p.total_bytes) for p in status.downloads]
    return ModelHealth(status.id, status.state, status.error, downloads)


def health_routes(shape: Dialect, *, open_metrics: bool = True) -> Dialect:
    """Return the routes that every deployment has; their errors are written in the shape of another dialect."""
    return Dialect(
        name="health",
        routes=[
            Route("GET", "/health", health, "Tell the server's state in a word", reply=Health, public=True),
            Route("GET", "/health/live", live, "Liveness: 503 means restart", reply=Health, public=True),
            Route("GET", "/health/ready", ready, "Readiness: a forward pass of each model", reply=Health, public=True),
            Route("GET", "/metrics", metrics, "Metrics for Prometheus", media_type=TEXT, public=open_metrics),
        ],
        render_error=shape.render_error,
        error=shape.error,
        has_prefix=False,
    )
