"""The composition root: the only place that knows everyone, and the life of a server from start to stop."""

import asyncio
import faulthandler
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import structlog

from quiver import memory
from quiver.admin import Office, admin_dialect, by_key
from quiver.admission import Admission
from quiver.api.call import Dialect
from quiver.api.cohere import COHERE
from quiver.api.dispatch import Api
from quiver.api.edge import Edge
from quiver.api.fastembed_query import FASTEMBED_QUERY
from quiver.api.health import health_routes
from quiver.api.inference_api import INFERENCE_API
from quiver.api.infinity import INFINITY
from quiver.api.jina import JINA
from quiver.api.jsonrpc_methods import JSONRPC
from quiver.api.mixedbread import MIXEDBREAD
from quiver.api.ollama import OLLAMA
from quiver.api.openai import OPENAI
from quiver.api.openai_batches import batch_kind
from quiver.api.openapi import docs_routes
from quiver.api.replies import Replies, Room
from quiver.api.root import SHARED, widened
from quiver.api.router import Router
from quiver.api.runpod import runpod_dialect, runpod_kind
from quiver.api.s3_embedding import S3_EMBEDDING
from quiver.api.server import Entrance, HttpServer
from quiver.api.tei import TEI
from quiver.api.tls import Certificate
from quiver.api.usage import usage_routes
from quiver.api.voyage import VOYAGE
from quiver.billing import Billing
from quiver.config import Config
from quiver.engine import openai_ids
from quiver.engine.engine import Aids, Engine
from quiver.engine.runner import Known
from quiver.engine.verbs import Verbs
from quiver.engine.watchdog import Watchdog
from quiver.entrances import Building, work_of
from quiver.errors import ConfigError, EngineError, QuiverError, Refused, SetupError
from quiver.gate import Gate
from quiver.jobs import Jobs
from quiver.member import Member
from quiver.models.catalogue import Catalogue
from quiver.models.hub import Progress
from quiver.place import Place
from quiver.service import Service
from quiver.stores import Stores
from quiver.telemetry import tracing
from quiver.telemetry.families import FAMILIES
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
    JSONRPC,
    usage_routes(OPENAI),
    health_routes(OPENAI),
)
"""Every API that is mounted; the first one also answers what no route matches."""


def dialects(*, open_metrics: bool = True) -> tuple[Dialect, ...]:
    """Return every API, with metrics for everybody or for keys that may read them."""
    health = health_routes(OPENAI, open_metrics=open_metrics)
    return tuple(health if dialect.name == health.name else dialect for dialect in DIALECTS)


EX_SOFTWARE = 70
"""Of sysexits.h: our own fault."""
FAULT_DRAIN_SECONDS = 2.0
"""How long a server that can compute no more lets those finish who still can."""
HOUSEKEEPING_SECONDS = 1.0
REPLIES_SHARE = 0.25
"""Of the bytes that results may take, so many more for whole replies."""
IDLE_SECONDS = 10.0
"""A server that had nothing to do for so long gives memory back."""


@dataclass(frozen=True, slots=True)
class App:
    """The parts of one server, put together but not started."""

    config: Config
    watchdog: Watchdog
    stores: Stores
    engine: Verbs
    service: Service
    admission: Admission
    api: Api
    edge: Edge
    replies: Replies
    others: Mapping[str, Entrance]
    """Entrances of their own, by the name of the socket."""

    @property
    def main(self) -> Entrance:
        """The entrance of the port, and of sockets without one of their own."""
        return Entrance(self.api, self.edge, self.replies)


MakeEngine = Callable[[Config, Observer], Verbs]
"""Makes an engine that reports to an observer."""


def build(
    config: Config,
    ids: openai_ids.OpenAIIds | None = None,
    tracer: Tracer | None = None,
    make_engine: MakeEngine | None = None,
) -> App:
    """Put a server together, around an engine of its own or another; call it on the event loop. Raises `ConfigError`."""
    observer, limits = Observer(tracer), config.server
    observer.watch_tasks(lambda: len(asyncio.all_tasks()))
    observer.also_as(*(FAMILIES[name]() for name in limits.metrics_families))
    watchdog = Watchdog(stall_seconds=config.engine.stall_seconds, loop_stalled=_abort, loop_lag=observer.loop_lagged)
    stores = Stores(config)
    if stores.cache:
        observer.watch(stores.cache.figures)
    engine = make_engine(config, observer) if make_engine else _own_engine(config, stores, observer, watchdog, ids)
    service = Service(
        engine,
        observer,
        Billing(stores.register, waits=config.accounts.usage_first),
        Jobs(config.jobs, _database_url(config)),
    )
    admission = Admission(limits, engine, max_wait_seconds=config.engine.max_wait_seconds)
    gate = Gate(limits.api_key, stores.register, stores.limiter, config.accounts)
    replies = _replies(config, service, gate, is_traced=tracer is not None)
    watched = (gate.figures, stores.register.figures, replies.figures)
    observer.watch(engine.replicas.figures, admission.figures, service.jobs.figures, *watched)
    offered = dialects(open_metrics=config.accounts.open_metrics)
    kept = (stores.cache.figures, replies.figures) if stores.cache else (replies.figures,)
    office = Office(config, stores.register, admission, kept, work_of(offered), time.time())
    if limits.dashboard:
        offered = (*offered, _dashboard(office))
    building = Building(config, service, admission, stores)
    router = Router((*offered, docs_routes(offered, OPENAI)), SHARED, limits.root_dialects, widened)
    main = building.entrance(router, gate, replies)
    others = building.sockets(gate, JSONRPC, office, health_routes(OPENAI, open_metrics=config.accounts.open_metrics))
    service.jobs.kinds.update(batch=batch_kind(main.api.do, service), runpod=runpod_kind(service))
    return App(config, watchdog, stores, engine, service, admission, main.api, main.edge, replies, others)


def _dashboard(office: Office) -> Dialect:
    """Return the dashboard as it is at the port. Raises `ConfigError` where nobody could have a key for it."""
    if office.config.accounts.auth == "off":
        raise ConfigError("dashboard is on and takes keys, but auth is off: leave one out, or open it at admin.sock")
    return admin_dialect(office, by_key, OPENAI)


def _replies(config: Config, service: Service, gate: Gate, *, is_traced: bool) -> Replies:
    replicas = service.engine.replicas
    return Replies(
        gate,
        service.billing,
        service.observer,
        Room(
            max_entries=0 if is_traced else config.cache.cache_entries,
            max_bytes=int(REPLIES_SHARE * config.cache.cache_bytes),
            is_shared=config.cache.cache_scope != "caller",
        ),
        age=lambda: replicas.age,
    )


def _own_engine(
    config: Config, stores: Stores, observer: Observer, watchdog: Watchdog, ids: openai_ids.OpenAIIds | None
) -> Engine:
    known = Known(stores.cache, config.cache.cache_scope) if stores.cache else None
    aids = Aids(ids or openai_ids.configured(config.engine), known)
    return Engine(config.models, config.engine, Catalogue.load(), observer, watchdog, aids)


def _database_url(config: Config) -> str:
    """Name the database as `quiver.db` would, which is not imported before it is needed; of no jobs, none."""
    if not config.jobs.take_jobs:
        return ""
    return config.accounts.database_url.reveal() or f"sqlite:///{config.models.data_dir / 'quiver.db'}"


async def serve(config: Config, progress: Progress, place: Place | None = None) -> None:
    """Serve the configured models until a signal, perhaps as one of several processes. Raises why it could not."""
    memory.keep_small()
    with tracing.tracer(config.server) as tracer:
        app = build(config, tracer=tracer)
        await run(app, lambda: app.engine.load(progress), place)


async def run(app: App, load: Callable[[], Coroutine[Any, Any, None]], place: Place | None = None) -> None:
    """Bind the port at once, load the models, serve until a signal, drain. Raises why it could not."""
    start = time.perf_counter()
    server = HttpServer(app.main, app.config.server, app.config.tls, app.others, place)
    stopping = asyncio.Event()
    stop = _on_signals(stopping, server)
    if place is None:
        log.info("listening", **server.where)
    async with AsyncExitStack() as parts:
        for part in (server, app.watchdog, app.stores, app.engine, app.service.jobs):
            await parts.enter_async_context(part)
        member = await parts.enter_async_context(_member(app, server, place, stop)) if place else None
        _warn_if_open(app, server)
        serving = asyncio.create_task(server.run_until_stopped())
        keeping_house = asyncio.create_task(_keep_house(app, server))
        try:
            await _until(stopping, load(), serving, keeping_house)
            if not stopping.is_set():
                gc.freeze()  # what is loaded stays: no collection walks over it again while requests wait
                seconds = round(time.perf_counter() - start, 2)
                log.info("loaded" if member else "ready", seconds=seconds, models=_ready_models(app))
                if member:
                    await member.be_ready()
                await _until(stopping, app.engine.wait_for_fault(), serving, keeping_house)
        except EngineError as error:
            app.admission.fault = error
            raise
        finally:
            await _end(app, server, serving, member)
            keeping_house.cancel()


def _member(app: App, server: HttpServer, place: Place, stop: Callable[[], None]) -> Member:
    """Let a process know the others of its server."""
    member = Member(place, f"{place.number}-{os.getpid()}", server, app.service.observer.snapshot)
    member.on_end(stop)
    app.service.siblings = member.siblings
    return member


async def _end(app: App, server: HttpServer, serving: asyncio.Task[None], member: Member | None) -> None:
    """Drain: for good, or because another process serves on in the place of this one."""
    seconds = app.config.server.drain_seconds
    if app.admission.fault:
        seconds = min(seconds, FAULT_DRAIN_SECONDS)
    is_replaced = member is not None and member.is_replaced
    log.info("leaving" if is_replaced else "stopping", drain_seconds=seconds)
    if is_replaced:
        server.leave()
    else:
        app.service.stopping = True
        server.stop()
        if member:
            member.say_stopping()
    await _drain(server, serving, seconds)


def _warn_if_open(app: App, server: HttpServer) -> None:
    """Say so where a network can reach a server that asks nobody for a key, and hides nothing."""
    if server.is_exposed and not (app.config.server.api_key or app.stores.register.needs_key):
        log.warning("anyone on the network may call: make keys, or let only a proxy reach it", url=server.url)


async def _drain(server: HttpServer, serving: asyncio.Task[None], seconds: float) -> None:
    """Let running requests finish; after `seconds` stop again: then the closing engine tells whoever still waits."""
    done, _ = await asyncio.wait({serving}, timeout=seconds)
    if not done:
        log.warning("not drained in time", seconds=seconds)
        server.stop()
    await serving


async def _keep_house(app: App, server: HttpServer) -> None:
    """Refuse new work while memory is short, give back what is free once nothing is to do, show a new certificate."""
    limit, busy_at, is_given_back = app.config.server.max_memory_bytes or memory.limit_bytes(), 0.0, True
    while True:
        await asyncio.sleep(HOUSEKEEPING_SECONDS)
        await _keep_certificate(server.certificate)
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


async def _keep_certificate(certificate: Certificate | None) -> None:
    """Show another certificate once its files hold one."""
    if certificate is not None:
        has_changed = await asyncio.to_thread(certificate.has_changed)
        if has_changed:
            _reload(certificate)


def _reload(certificate: Certificate) -> None:
    """Show the certificate that the files hold now, or go on with the one that there is."""
    try:
        certificate.reload()
    except ConfigError as error:
        log.error("the certificate stays as it was", why=error.message)  # noqa: TRY400  the reason is the operator's
    else:
        log.info("the certificate is loaded anew")


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


def _on_signals(stopping: asyncio.Event, server: HttpServer) -> Callable[[], None]:
    """The first signal to end drains, the second ends at once; with TLS, SIGHUP loads the certificate.

    Returns what a signal to end does.
    """
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():
            server.stop()
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    if server.certificate:
        loop.add_signal_handler(signal.SIGHUP, _reload, server.certificate)
    return stop


def _ready_models(app: App) -> list[str]:
    ready = (model for model in app.service.models() if model.state is ModelState.READY)
    return [f"{m.id} ({m.dtype}, {m.dimensions} dimensions, {m.max_tokens} tokens)" for m in ready]


def exit_code(error: QuiverError) -> int:
    """Return how a process ends: 78, 65 or 70 of sysexits.h for the operator's, the input's or our own fault."""
    if isinstance(error, SetupError):
        return 78
    return 65 if isinstance(error, Refused) else EX_SOFTWARE
