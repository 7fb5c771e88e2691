"""The process that clients reach: dialects, gate and service as a server has them, around an engine that is elsewhere."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from quiver import app
from quiver.api import secure
from quiver.api.http import HttpApp, application
from quiver.app import App
from quiver.config import Config
from quiver.errors import QuiverError
from quiver.scale import plan
from quiver.scale.remote_engine import RemoteEngine, Wire


class MakeWires(Protocol):
    """Finds the deployments of models; called where they can be asked."""

    def __call__(self) -> Mapping[str, Wire]:
        """Return a wire to each model by the name that the configuration has for it."""


@dataclass(frozen=True, slots=True)
class _Open:
    parts: App
    asgi: Any
    stack: AsyncExitStack


class Ingress:
    """An ASGI application that travels to its process as settings, and opens there when its life begins."""

    def __init__(self, config: Config, wires: MakeWires) -> None:
        self._config = plan.for_ingress(config)
        self._wires = wires
        self._open: _Open | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or begin and end."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._open:
            await self._open.asgi(scope, receive, send)

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()
        try:
            self._open = await self._opened()
        except QuiverError as error:
            await send({"type": "lifespan.startup.failed", "message": error.message})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._open.parts.service.stopping = True
        await self._open.stack.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _opened(self) -> _Open:
        """Put the parts together, and wait for the models. Raises `SetupError`."""
        config, wires = self._config, self._wires()
        parts = app.build(config, make_engine=lambda config, observer: RemoteEngine(config, observer, wires))
        async with AsyncExitStack() as opening:
            for part in (parts.watchdog, parts.stores, parts.engine, parts.service.jobs):
                await opening.enter_async_context(part)
            await parts.engine.load(lambda *_: None)
            return _Open(parts, _asgi(parts, config), opening.pop_all())


def _asgi(parts: App, config: Config) -> Any:
    limits = config.server
    http = HttpApp(
        parts.api,
        parts.replies,
        max_body_bytes=limits.max_body_bytes,
        url_prefix=limits.url_prefix,
        edge=parts.edge,
    )
    inner = application(http, limits.cors_origins)
    more = [(name.encode(), value.encode()) for name, value in secure.every_reply(config.tls).items()]

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        async def send_more(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*more, *message["headers"]]}
            await send(message)

        await inner(scope, receive, send_more)

    return asgi
