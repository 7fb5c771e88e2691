"""Where every call arrives, whatever brought it: HTTP, a socket, a line of a file."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog

from quiver.api.call import Call, Dialect, Places, Reply, Route, refuse
from quiver.api.router import Router
from quiver.errors import Overloaded, QuiverError
from quiver.gate import Gate
from quiver.service import Service
from quiver.telemetry.observer import Observer
from quiver.types import Caller, Timings

log = structlog.get_logger(__name__)


class Admission:
    """Lets so many requests be at work at once; one more waits its turn for a while, and is then refused."""

    def __init__(self, *, max_requests: int = 0, wait_seconds: float = 0.0) -> None:
        self._max_requests = max_requests
        self._wait_seconds = wait_seconds
        self._places = asyncio.Semaphore(max_requests)
        self.places = Places(max_requests) if max_requests else None
        """For who wants to know; None where there is no bound."""

    @asynccontextmanager
    async def place(self, route: Route) -> AsyncIterator[None]:
        """Hold a place while a request is at work; what only looks needs none. Raises `Overloaded`."""
        if not self.places or route.public or route.method != "POST":
            yield
            return
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._places.acquire()
        except TimeoutError as error:
            raise Overloaded(
                f"{self._max_requests} requests are at work already: send fewer at a time",
                retry_after_seconds=max(1.0, self._wait_seconds),
            ) from error
        self.places.taken += 1
        try:
            yield
        finally:
            self.places.taken -= 1
            self._places.release()


class Api:
    """Every dialect behind one door."""

    def __init__(
        self,
        router: Router,
        fallback: Dialect,
        service: Service,
        gate: Gate,
        observer: Observer,
        admission: Admission,
    ) -> None:
        self._router = router
        self._fallback = fallback
        self._service = service
        self._gate = gate
        self._observer = observer
        self._admission = admission

    async def receive(self, call: Call) -> Reply:
        """Answer a call; whatever happens, in the shape of the dialect that it was made in."""
        start = time.perf_counter()
        dialect, template = self._router.owner(call.path) or self._fallback, "unmatched"
        try:
            dialect, route, params = self._router.find(call)
            template = route.path
            caller = Caller(call.peer) if route.public else self._gate.admit(call.headers, call.peer)
            async with self._admission.place(route):
                asked = replace(call, params=params, caller=caller, places=self._admission.places)
                reply = await route.handler(self._service, asked)
        except QuiverError as error:
            reply = refuse(dialect, error)
        except Exception:
            log.exception("a handler failed", route=template)
            reply = refuse(dialect, QuiverError("the server failed; the log says why"))
        if reply.timings:
            reply = replace(reply, headers={**reply.headers, "server-timing": _server_timing(reply.timings)})
        self._observer.request_answered(dialect.name, template, reply.status, time.perf_counter() - start)
        return reply

    def refuse(self, error: QuiverError) -> Reply:
        """Answer a call that could not even be read."""
        return refuse(self._fallback, error)


def _server_timing(timings: Timings) -> str:
    """Write the stages in milliseconds, as W3C's Server-Timing has them."""
    stages = {"encode": timings.encode, "compute": timings.compute, "total": timings.total}
    return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages.items())
