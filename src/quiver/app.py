"""The composition root: the only place that knows everyone, and the life of a server from start to stop."""

import asyncio
import faulthandler
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from quiver import memory
from quiver.admission import Admission
from quiver.api.call import Dialect
from quiver.api.cohere import COHERE
from quiver.api.dispatch import Api
from quiver.api.edge import Edge
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
from quiver.engine.engine import Aids, Engine
from quiver.engine.runner import Known
from quiver.engine.watchdog import Watchdog
from quiver.errors import EngineError, QuiverError, Refused, SetupError
from quiver.gate import Gate
from quiver.models.catalogue import Catalogue
from quiver.models.hub import Progress
from quiver.service import Service
from quiver.stores import Stores
from quiver.telemetry import tracing
from quiver.telemetry.observer import Observer, Tracer
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


EX_SOFTWARE = 70
"""Of sysexits.h: our own fault."""
FAULT_DRAIN_SECONDS = 2.0
"""How long a server that can compute no more lets those finish who still can."""
HOUSEKEEPING_SECONDS = 1.0
IDLE_SECONDS = 10.0
"""A server that had nothing to do for so long gives memory back."""


@dataclass(frozen=True, slots=True)
class App:
    """The parts of one server, put together but not started."""

    config: Config
    watchdog: Watchdog
    stores: Stores
    engine: Engine
    service: Service
    admission: Admission
    api: Api
    edge: Edge


def build(config: Config, ids: openai_ids.OpenAIIds | None = None, tracer: Tracer | None = None) -> App:
    """Put a server together; call it on the event loop. Raises `ConfigError`."""
    observer, limits = Observer(tracer), config.server
    observer.watch_tasks(lambda: len(asyncio.all_tasks()))
    watchdog = Watchdog(stall_seconds=config.engine.stall_seconds, loop_stalled=_abort, loop_lag=observer.loop_lagged)
    stores = Stores(config.cache, config.models.data_dir)
    known = Known(stores.cache, config.cache.cache_scope) if stores.cache else None
    if stores.cache:
        observer.watch(stores.cache.figures)
    aids = Aids(ids or openai_ids.configured(config.engine), known)
    engine = Engine(config.models, config.engine, Catalogue.load(), observer, watchdog, aids)
    service = Service(engine, observer)
    router = Router((*DIALECTS, docs_routes(DIALECTS, OPENAI)), SHARED, limits.root_dialects, widened)
    gate = Gate(limits.api_key)
    admission = Admission(limits, engine, max_wait_seconds=config.engine.max_wait_seconds)
    api = Api(router, service, gate, observer, admission, timeout_seconds=limits.timeout_seconds)
    edge = Edge(router, admission, observer, limits)
    return App(config, watchdog, stores, engine, service, admission, api, edge)


async def serve(config: Config, progress: Progress) -> None:
    """Serve the configured models until a signal. Raises why it could not."""
    memory.keep_small()
    with tracing.tracer(config.server) as tracer:
        app = build(config, tracer=tracer)
        await run(app, lambda: app.engine.load(progress))


async def run(app: App, load: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Bind the port at once, load the models, serve until a signal, drain. Raises why it could not."""
    start, drain_seconds = time.perf_counter(), app.config.server.drain_seconds
    server = HttpServer(app.api, app.edge, app.config.server)
    stopping = asyncio.Event()
    _on_signals(stopping, server)
    log.info("listening", url=server.url, docs=f"{server.url}/docs")
    async with app.watchdog, app.stores, app.engine, app.service.jobs:
        serving = asyncio.create_task(server.run_until_stopped())
        keeping_house = asyncio.create_task(_keep_house(app))
        try:
            await _until(stopping, load(), serving, keeping_house)
            if not stopping.is_set():
                gc.freeze()  # what is loaded stays: no collection walks over it again while requests wait
                log.info("ready", seconds=round(time.perf_counter() - start, 2), models=_ready_models(app))
                await _until(stopping, app.engine.wait_for_fault(), serving, keeping_house)
        except EngineError as error:
            app.admission.fault = error
            drain_seconds = min(drain_seconds, FAULT_DRAIN_SECONDS)
            raise
        finally:
            app.service.stopping = True
            log.info("stopping", drain_seconds=drain_seconds)
            server.stop()
            await _drain(server, serving, drain_seconds)
            keeping_house.cancel()
    await server.let_go()


async def _drain(server: HttpServer, serving: asyncio.Task[None], seconds: float) -> None:
    """Let running requests finish; after `seconds` stop again: then the closing engine tells whoever still waits."""
    done, _ = await asyncio.wait({serving}, timeout=seconds)
    if not done:
        log.warning("not drained in time", seconds=seconds)
        server.stop()
    await serving


async def _keep_house(app: App) -> None:
    """Refuse new work while memory is short, and give back what is free once nothing is to do."""
    limit, busy_at, is_given_back = app.config.server.max_memory_bytes or memory.limit_bytes(), 0.0, True
    while True:
        await asyncio.sleep(HOUSEKEEPING_SECONDS)
        is_short = memory.resident_bytes() > limit
        if is_short != app.admission.memory_is_short:
            log.warning("memory is short" if is_short else "memory is no longer short", limit=limit)
        if app.admission.num_bytes:
            busy_at, is_given_back = time.monotonic(), False
        is_idle = not is_given_back and time.monotonic() - busy_at > IDLE_SECONDS
        if is_idle or is_short:
            await asyncio.to_thread(memory.give_back)
            is_given_back = True
        app.admission.memory_is_short = is_short


def _abort(why: str) -> None:
    """End a process whose event loop does not turn: nothing else in it can."""
    sys.stderr.write(f"quiver: {why}; every thread:\n")
    faulthandler.dump_traceback()
    os._exit(EX_SOFTWARE)


async def _until(stopping: asyncio.Event, work: Coroutine[Any, Any, None], *others: asyncio.Task[None]) -> None:
    """Do some work until it is done or the server is told to stop; raises what it, or one of the others, raises.

    The others end no sooner than the server: if one does, nobody would be served any more.
    """
    working, told = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    await asyncio.wait({working, told, *others}, return_when=asyncio.FIRST_COMPLETED)
    ended = [other for other in others if other.done()]
    for task in (working, told):
        task.cancel()  # does nothing to one that is done
    for other in ended:
        raise EngineError(f"a part of the server ended: {other.exception()!r}")
    if working.done() and not working.cancelled():
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
    return 65 if isinstance(error, Refused) else EX_SOFTWARE
