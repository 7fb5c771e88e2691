"""What Ray's proxy does where the ingress that it asked dies: it says when to come back, instead of nothing.

Ray loads it into every proxy by the name in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
from starlette.middleware import Middleware

RETRY_AFTER = 2
FAILED = 500
TIMED_OUT = 408
REQUEST_ID = b"x-request-id"
OURS = b"x-content-type-options"
"""Stands in each reply of an ingress, and in none that Ray writes."""
_MESSAGE = f"the server that had this request ended before it answered: come back in {RETRY_AFTER} s"
BODY = msgspec.json.encode(
    {"error": {"message": _MESSAGE, "type": "server_error", "param": None, "code": "unavailable"}}
)
HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(BODY)).encode()),
    (b"retry-after", str(RETRY_AFTER).encode()),
    (b"retry-after-ms", str(1000 * RETRY_AFTER).encode()),
    (b"x-error-code", b"unavailable"),
]


class Late:
    """Holds the beginning of a reply back until its body begins, so that one that breaks off between is none."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held: list[Any] = []
        begun = False

        async def send_late(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                held.append(message)
                return
            if held:
                start = held.pop()
                if _is_rays_own(start):
                    return  # its body is dropped with it
                # Ray adds the id that we have put there already; of a name that stands twice, the first is ours.
                await send({**start, "headers": list(_once(start["headers"]))})
                begun = True
            if begun:
                await send(message)

        await self._app(scope, receive, send_late)
        if not begun:
            await send({"type": "http.response.start", "status": 503, "headers": HEADERS})
            await send({"type": "http.response.body", "body": BODY})


def _once(headers: Any) -> Iterator[tuple[bytes, bytes]]:
    found = False
    for name, value in headers:
        if name.lower() != REQUEST_ID:
            yield name, value
        elif not found:
            found = True
            yield name, value


def _is_rays_own(start: Any) -> bool:
    """Whether the proxy wrote a failure of its own: it has no way to say when to come back."""
    has_failed = start["status"] >= FAILED or start["status"] == TIMED_OUT
    return has_failed and not any(name == OURS for name, _ in start["headers"])


def middlewares() -> list[Middleware]:
    """Return what Ray puts around its proxy."""
    return [Middleware(Late)]
