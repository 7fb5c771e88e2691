"""The door to httpx: requests go out, responses or faults come back, blocking or not."""

import asyncio
import time
from types import ModuleType
from typing import TYPE_CHECKING, Any

from quiver.client.core import Settings, Verify
from quiver.client.errors import MissingExtra
from quiver.client.steps import Fault, Response, Send

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 5.0
"""The longest wait for a connection, before another attempt is made."""


def _library() -> ModuleType:
    try:
        import httpx  # noqa: PLC0415  optional: whoever has only the server does not need it
    except ImportError as error:
        raise MissingExtra("the client needs an optional package: pip install 'quiver[client]'") from error
    return httpx


def _options(settings: Settings, transport: Any) -> dict[str, Any]:
    """Return how one of httpx's clients is made; `transport` is the kind of its own for a unix socket."""
    options = {"transport": transport(uds=settings.socket)} if settings.socket else {}
    return {"base_url": settings.url, "follow_redirects": False, **options}


def _arguments(httpx: Any, step: Send) -> dict[str, Any]:
    request = step.request
    seconds = step.seconds
    return {
        "method": request.method,
        "url": request.path,
        "content": request.body or None,
        "headers": step.headers,
        "timeout": httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
    }


def _response(reply: "httpx.Response", body: bytes) -> Response:
    return Response(reply.status_code, {name.lower(): value for name, value in reply.headers.items()}, body)


def _fault(httpx: Any, error: Exception) -> Fault:
    """Say what a failure of httpx means."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError):
        return Fault(reason, is_unsent=True)
    return Fault(reason, is_late=isinstance(error, httpx.TimeoutException))


class Wire:
    """Sends requests from any thread, each over a connection of a pool."""

    def __init__(self, settings: Settings, verify: Verify) -> None:
        self._httpx = _library()
        self._client: httpx.Client = self._httpx.Client(verify=verify, **_options(settings, self._httpx.HTTPTransport))

    def send(self, step: Send) -> Response | Fault:
        """Send one request and read its whole response, or say why there is none."""
        ends = time.monotonic() + step.seconds
        try:
            with self._client.stream(**_arguments(self._httpx, step)) as reply:
                parts = []
                for part in reply.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > ends:  # httpx's own limit begins anew with each part
                        return Fault("the reply came too slowly", is_late=True)
                return _response(reply, b"".join(parts))
        except self._httpx.RequestError as error:
            return _fault(self._httpx, error)

    def close(self) -> None:
        """Close every connection."""
        self._client.close()


class AsyncWire:
    """Sends requests on one event loop, each over a connection of a pool."""

    def __init__(self, settings: Settings, verify: Verify) -> None:
        self._httpx = _library()
        self._client: httpx.AsyncClient = self._httpx.AsyncClient(
            verify=verify, **_options(settings, self._httpx.AsyncHTTPTransport)
        )

    async def send(self, step: Send) -> Response | Fault:
        """Send one request and read its whole response, or say why there is none."""
        try:
            async with asyncio.timeout(step.seconds), self._client.stream(**_arguments(self._httpx, step)) as reply:
                return _response(reply, await reply.aread())
        except TimeoutError:
            return Fault("the reply came too slowly", is_late=True)
        except self._httpx.RequestError as error:
            return _fault(self._httpx, error)

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()
