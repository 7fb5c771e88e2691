"""Where every call arrives, whatever brought it: HTTP, a socket, a line of a file."""

import asyncio
import time
from contextlib import nullcontext
from dataclasses import replace

import structlog

from quiver.admission import Admission
from quiver.api.call import Call, Reply, Route, patience, refuse
from quiver.api.rate_headers import rate_headers
from quiver.api.router import Router
from quiver.errors import DeadlineExceeded, QuiverError, RateLimited, Refused
from quiver.gate import Gate, Passage
from quiver.limits import Verdict
from quiver.metering import repeatable
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
        log.debug("answered", method=exchange.method, route=exchange.route, status=reply.status, error=exchange.error)
        return reply

    async def _reply(self, call: Call, exchange: Exchange) -> Reply:
        dialect, passage = self._router.owner(call.path), None
        try:
            dialect, route, params = self._router.find(call)
            exchange.route = route.path
            call = replace(call, params=params) if params else call
            if route.public:
                return await route.handler(self._service, replace(call, caller=Caller(call.peer)))
            passage = await self._gate.admit(call.headers, call.peer)
            _check_rate(passage.verdict)
            reply = await self._answer(route, call, _repeated(passage.caller, call))
            return _telling(reply, passage)
        except QuiverError as error:
            exchange.error = error.code
            return _telling(refuse(dialect, error, self.admission.load(error)), passage)
        except Exception:
            log.exception("a handler failed", route=exchange.route)
            exchange.error = QuiverError.code
            return refuse(dialect, QuiverError("the server failed; the log says why"))
        finally:
            exchange.dialect = dialect.name

    async def _answer(self, route: Route, call: Call, caller: Caller) -> Reply:
        """Run a handler within its deadline, at a place of its own if it is work."""
        if route.is_queued:
            return await route.handler(self._service, replace(call, caller=caller))
        seconds = patience(call.headers, self._timeout_seconds)
        caller = replace(caller, deadline=time.monotonic() + seconds)
        call = replace(call, caller=caller, places=self.admission.places)
        try:
            async with asyncio.timeout(seconds):
                async with self.admission.place() if route.method == "POST" else nullcontext():
                    return await route.handler(self._service, call)
        except TimeoutError as error:
            raise DeadlineExceeded(f"not answered within {seconds:g} s") from error

    async def do(self, call: Call) -> Reply:
        """Answer a line of a job, whose caller was let in with the job. Raises `Unavailable`: a job can wait.

        It raises as well what is the server's own fault with its lanes, which another attempt may mend.
        """
        dialect, route, params = self._router.find(call)
        try:
            return await route.handler(self._service, replace(call, params=params))
        except Refused as error:
            return refuse(dialect, error)

    def is_upload(self, method: str, path: str) -> bool:
        """Whether a body is to be handed over as it comes."""
        route = self._router.peek(method, path)[1]
        return route is not None and route.is_upload

    def refuse(self, path: str, error: QuiverError) -> Reply:
        """Answer a call that could not even be read."""
        return refuse(self._router.peek("POST", path)[0], error)


def _check_rate(verdict: Verdict | None) -> None:
    if verdict and not verdict.allowed:
        rate = f"{verdict.rate.per_second:g} requests a second, {verdict.rate.burst:g} at once"
        message = f"you may make {rate}: ask again in {verdict.retry_after_seconds:.3g} s"
        raise RateLimited(message, retry_after_seconds=verdict.retry_after_seconds)


def _repeated(caller: Caller, call: Call) -> Caller:
    """Let a request with an idempotency key count once, however often it is sent; quoted or not, the key is the same."""
    name = call.headers.get("idempotency-key", "").strip().strip('"')
    if not (name and caller.key):
        return caller
    body = b"%b\0%b" % (call.path.encode("utf-8", "surrogatepass"), call.body)
    return replace(caller, request=repeatable(caller.key, name, body))


def _telling(reply: Reply, passage: Passage | None) -> Reply:
    """Add what is left of the caller's own rate; it goes before what is left of the server's places."""
    if passage is None or passage.verdict is None:
        return reply
    return replace(reply, headers={**reply.headers, **rate_headers(passage.verdict)})


def _server_timing(timings: Timings) -> str:
    """Write the stages in milliseconds, as W3C's Server-Timing has them."""
    encode, compute, total = 1e3 * timings.encode, 1e3 * timings.compute, 1e3 * timings.total
    return f"encode;dur={encode:.3f}, compute;dur={compute:.3f}, total;dur={total:.3f}"
