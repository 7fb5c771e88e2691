"""Where every call arrives, whatever brought it: HTTP, a socket, a line of a file."""

import asyncio
import time
from contextlib import nullcontext
from dataclasses import replace

import structlog

from quiver.admission import Admission
from quiver.api.call import Call, Reply, Route, patience, refuse
from quiver.api.router import Router
from quiver.errors import DeadlineExceeded, QuiverError
from quiver.gate import Gate
from quiver.service import Service
from quiver.telemetry.observer import Exchange, Observer
from quiver.types import Caller, Timings

log = structlog.get_logger(__name__)


class Api:
    """Every dialect behind one door."""

    def __init__(
        self,
        router: Router,
        service: Service,
        gate: Gate,
        observer: Observer,
        admission: Admission,
        *,
        timeout_seconds: float,
    ) -> None:
        self._router = router
        self._service = service
        self._gate = gate
        self._observer = observer
        self.admission = admission
        self._timeout_seconds = timeout_seconds

    async def receive(self, call: Call) -> Reply:
        """Answer a call; whatever happens, in the shape of the dialect that it was made in."""
        with self._observer.exchange(call.method, call.headers) as exchange:
            reply = await self._reply(call, exchange)
            if reply.timings:
                reply = replace(reply, headers={**reply.headers, "server-timing": _server_timing(reply.timings)})
            exchange.status = reply.status
        return reply

    async def _reply(self, call: Call, exchange: Exchange) -> Reply:
        dialect = self._router.owner(call.path)
        try:
            dialect, route, params = self._router.find(call)
            exchange.route = route.path
            caller = Caller(call.peer) if route.public else self._gate.admit(call.headers, call.peer)
            return await self._answer(route, replace(call, params=params, caller=caller))
        except QuiverError as error:
            exchange.error = error.code
            return refuse(dialect, error, self.admission.load(error))
        except Exception:
            log.exception("a handler failed", route=exchange.route)
            exchange.error = QuiverError.code
            return refuse(dialect, QuiverError("the server failed; the log says why"))
        finally:
            exchange.dialect = dialect.name

    async def _answer(self, route: Route, call: Call) -> Reply:
        """Run a handler within its deadline, at a place of its own if it is work."""
        if route.public or route.is_queued:
            return await route.handler(self._service, call)
        seconds = patience(call.headers, self._timeout_seconds)
        caller = replace(call.caller, deadline=time.monotonic() + seconds)
        call = replace(call, caller=caller, places=self.admission.places)
        try:
            async with asyncio.timeout(seconds):
                async with self.admission.place() if route.method == "POST" else nullcontext():
                    return await route.handler(self._service, call)
        except TimeoutError as error:
            raise DeadlineExceeded(f"not answered within {seconds:g} s") from error

    def refuse(self, path: str, error: QuiverError) -> Reply:
        """Answer a call that could not even be read."""
        return refuse(self._router.peek("POST", path)[0], error)


def _server_timing(timings: Timings) -> str:
    """Write the stages in milliseconds, as W3C's Server-Timing has them."""
    stages = {"encode": timings.encode, "compute": timings.compute, "total": timings.total}
    return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages.items())
