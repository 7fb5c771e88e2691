"""The composition root: the only place that knows everyone, and the life of a server from start to stop."""

import asyncio
import gc
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from quiver.api.call import Dialect
from quiver.api.cohere import COHERE
from quiver.api.dispatch import Admission, Api
from quiver.api.fastembed_query import FASTEMBED_QUERY
from quiver.api.health import health_routes
from quiver.api.http import HttpServer
from quiver.api.inference_api import INFERENCE_API
from quiver.api.infinity import INFINITY
from quiver.api.jina import JINA
from quiver.api.mixedbread import MIXEDBREAD
from quiver.api.ollama import OLLAMA
from quiver.api.openai import OPENAI
from quiver.api.openapi import docs_routes
from quiver.api.root import SHARED, widened
from quiver.api.router import Router
from quiver.api.runpod import runpod_dialect
from quiver.api.s3_embedding import S3_EMBEDDING
from quiver.api.tei import TEI
from quiver.api.voyage import VOYAGE
from quiver.config import Config
from quiver.engine import openai_ids
from quiver.engine.engine import Engine
from quiver.errors import QuiverError, Refused, SetupError
from quiver.gate import Gate
from quiver.models.catalogue import Catalogue
from quiver.models.hub import Progress
from quiver.service import Service
from quiver.telemetry.observer import Observer
from quiver.types import ModelState

log = structlog.get_logger(__name__)

DIALECTS: tuple[Dialect, ...] = (
    OPENAI,
    COHERE,
    JINA,
    VOYAGE,
    MIXEDBREAD,
    TEI,
    INFINITY,
    runpod_dialect(OPENAI),
    OLLAMA,
    INFERENCE_API,
    S3_EMBEDDING,
    FASTEMBED_QUERY,
    health_routes(OPENAI),
)
"""Every API that is mounted; the first one also answers what no route matches."""


@dataclass(frozen=True, slots=True)
class App:
    """The parts of one server, put together but not started."""

    config: Config
    engine: Engine
    service: Service
    api: Api


def build(config: Config, ids: openai_ids.OpenAIIds | None = None) -> App:
    """Put a server together; call it on the event loop. Raises `ConfigError`."""
    observer = Observer()
    ids = ids or openai_ids.configured(config.engine)
    engine = Engine(config.models, config.engine, Catalogue.load(), observer, ids)
    service = Service(engine, observer)
    dialects = (*DIALECTS, docs_routes(DIALECTS, OPENAI))
    router = Router(dialects, SHARED, config.server.root_dialects, widened)
    gate, limits = Gate(config.server.api_key), config.server
    admission = Admission(max_requests=limits.max_concurrent_requests, wait_seconds=limits.queue_seconds)
    return App(config, engine, service, Api(router, OPENAI, service, gate, observer, admission))


async def serve(config: Config, progress: Progress) -> None:
    """Serve the configured models until a signal. Raises why it could not."""
    app = build(config)
    await run(app, lambda: app.engine.load(progress))


async def run(app: App, load: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Bind the port at once, load the models, serve until a signal, drain. Raises why it could not."""
    start, config = time.perf_counter(), app.config.server
    server = HttpServer(app.api, config)
    stopping = asyncio.Event()
    _on_signals(stopping, server)
    log.info("listening", url=server.url, docs=f"{server.url}/docs")
    async with app.engine, app.service.jobs:
        serving = asyncio.create_task(server.run_until_stopped())
        try:
            await _until(stopping, load())
            if not stopping.is_set():
                gc.freeze()  # what is loaded stays: no collection walks over it again while requests wait
                log.info("ready", seconds=round(time.perf_counter() - start, 2), models=_ready_models(app))
                await _until(stopping, app.engine.replicas.wait_for_fault())
        finally:
            app.service.stopping = True
            log.info("stopping", drain_seconds=config.drain_seconds)
            server.stop()
            await _drain(server, serving, config.drain_seconds)
    await server.let_go()


async def _drain(server: HttpServer, serving: asyncio.Task[None], seconds: float) -> None:
    """Let running requests finish; after `seconds` stop again: then the closing engine tells whoever still waits."""
    done, _ = await asyncio.wait({serving}, timeout=seconds)
    if not done:
        log.warning("not drained in time", seconds=seconds)
        server.stop()
    await serving


async def _until(stopping: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do some work until it is done, raising what it raises, or until the server is told to stop."""
    working, told = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    done, pending = await asyncio.wait({working, told}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    if working in done:
        working.result()


def _on_signals(stopping: asyncio.Event, server: HttpServer) -> None:
    """The first signal drains; the second ends at once."""

    def stop() -> None:
        if stopping.is_set():
            server.stop()
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)


def _ready_models(app: App) -> list[str]:
    ready = (model for model in app.service.models() if model.state is ModelState.READY)
    return [f"{m.id} ({m.dtype}, {m.dimensions} dimensions, {m.max_tokens} tokens)" for m in ready]


def exit_code(error: QuiverError) -> int:
    """Return how a process ends: 78, 65 or 70 of sysexits.h for the operator's, the input's or our own fault."""
    if isinstance(error, SetupError):
        return 78
    return 65 if isinstance(error, Refused) else 70
