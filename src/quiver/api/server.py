"""The listening side of HTTP: uvicorn on our own sockets, each of which offers what it is for; how it begins and ends."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from socket import socket
from types import MappingProxyType
from typing import Self, cast

import uvicorn

from quiver.api import listeners, secure
from quiver.api.connection import LINGER_SECONDS, Connection, Shared
from quiver.api.dispatch import Api
from quiver.api.edge import Edge
from quiver.api.http import HttpApp, application
from quiver.api.replies import Replies
from quiver.api.tls import Certificate
from quiver.config import ServerConfig, TlsConfig
from quiver.place import Place

KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep an idle connection (httpx: 5): who closes first must be the client, or a request that it
sends at that moment is lost in a reset."""
TICK_SECONDS = 0.02
"""How often a draining server looks whether it is done."""
LEAVE_SHARE = 0.5
"""Of the time to drain: so long a process that is replaced waits for the next request on connections that are idle."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """What one who comes by a listener finds: where calls arrive, and what may be said before."""

    api: Api
    edge: Edge
    replies: Replies


@dataclass(frozen=True, slots=True)
class _Side:
    """An entrance, ready for connections."""

    shared: Shared
    config: uvicorn.Config


class HttpServer(uvicorn.Server):
    """uvicorn on sockets that are bound at once, its signals left to the application.

    One of several processes has a place: its socket is bound already, and others may hand it connections.
    """

    def __init__(
        self,
        main: Entrance,
        config: ServerConfig,
        tls: TlsConfig,
        others: Mapping[str, Entrance] = MappingProxyType({}),
        place: Place | None = None,
    ) -> None:
        """`others` are entrances of their own, by the name of the socket."""
        at_port = _side(main, config, tls, config.cors_origins)
        self._shared = at_port.shared
        self._sides = {"": at_port, **{name: _side(other, config, tls) for name, other in others.items()}}
        super().__init__(at_port.config)
        self.certificate = Certificate(tls) if tls.is_on else None
        context = self.certificate.context if self.certificate else None
        self._listeners = listeners.inherited(place.port, context) if place else listeners.bind(config, context)
        self._waits = place is not None and place.waits
        self._is_replaced = False
        self._coming: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it listens: the port, if it has one."""
        return self._listeners[0].url

    @property
    def where(self) -> dict[str, str | list[str]]:
        """All that clients can be told of where it listens."""
        files = [listener.url for listener in self._listeners if listener.path]
        port = {"url": self.url, "docs": f"{self.url}/docs"} if self._shared.config.tcp else {}
        return {**port, **({"sockets": files} if files else {})}

    @property
    def is_exposed(self) -> bool:
        """Whether what is sent can be read on a network."""
        return any(listener.is_exposed for listener in self._listeners)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would raise them again at the end, and the process would not exit with 0."""
        yield

    async def run_until_stopped(self) -> None:
        """Serve until `stop` is called, then let running requests finish."""
        await self.serve()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Accept connections, unless others do for the moment."""
        del sockets
        self.servers = []
        for side in self._sides.values():
            if not side.config.loaded:
                side.config.load()
        if not self._waits:
            await self.accept_connections()
        self.started = True

    async def accept_connections(self) -> None:
        """Accept connections if that is not done yet."""
        if not self.servers:
            self.servers = [
                await listener.serve(self._connect_to(listener.name), self._shared.config)
                for listener in self._listeners
            ]

    def take(self, client: socket, name: str) -> None:
        """Serve someone whom another process has accepted, at the port or at a socket of that name."""
        tls = self.certificate.context if self.certificate and not name else None
        seconds = self._shared.config.header_seconds
        taking = asyncio.ensure_future(listeners.accept(client, tls, self._connect_to(name), seconds))
        self._coming.add(taking)
        taking.add_done_callback(self._coming.discard)

    def stop(self) -> None:
        """Begin to drain; a second call ends at once."""
        for side in self._sides.values():
            side.shared.is_draining = True
        for connection in self._connections:
            connection.close_when_done()
        self.force_exit = self.should_exit
        self.should_exit = True

    def leave(self) -> None:
        """Begin to drain where another process listens at the same socket: it refuses nobody."""
        self._is_replaced = True
        self.stop()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Take requests for a moment still, then none; return once the last one is answered.

        Who is connected by then is told to go elsewhere, on the connection that it has.
        """
        del sockets
        if self._is_replaced:
            await self._answer_the_last()
        else:
            ends = time.monotonic() + self._shared.config.drain_delay_seconds
            await self._until(lambda: time.monotonic() >= ends)
        self._shared.edge.admission.close()
        await self._stop_listening()
        ends = time.monotonic() + LINGER_SECONDS
        await self._until(lambda: time.monotonic() > ends or not self._has_newcomers)
        await self._until(lambda: not any(connection.is_busy for connection in self._connections))
        for connection in self._connections:
            connection.shutdown()
        ends = time.monotonic() + LINGER_SECONDS
        await self._until(lambda: all(c.has_said_all and time.monotonic() > ends for c in self._connections))

    async def _answer_the_last(self) -> None:
        """Leave newcomers to the other process, and let each connection bring one more request."""
        for server in self.servers:
            server.close()
        for listener in self._listeners:
            listener.close()
        self._listeners = ()
        ends = time.monotonic() + LEAVE_SHARE * self._shared.config.drain_seconds
        await self._until(lambda: not (self._everybody or self._coming) or time.monotonic() >= ends)

    @property
    def _everybody(self) -> set[Connection]:
        newcomers = [side.shared.newcomers for side in self._sides.values()]
        return {*self._connections, *itertools.chain(*newcomers)}

    @property
    def _connections(self) -> list[Connection]:
        return cast(list[Connection], list(self.server_state.connections))

    async def _stop_listening(self) -> None:
        """Close the listener behind those who are connected but not accepted yet: closed with it, they would be cut."""
        for listener in self._listeners:
            if not listener.is_shared:
                listeners.turn_away(listener.bound)
        await asyncio.sleep(TICK_SECONDS)
        late = [(listener, listener.bound.dup()) for listener in self._listeners]
        for server in self.servers:
            server.close()
        for listener in self._listeners:
            listener.close()
        accepting = [
            listener.accept_all(queue, self._connect_to(listener.name), LINGER_SECONDS) for listener, queue in late
        ]
        await asyncio.gather(*accepting)

    @property
    def _has_newcomers(self) -> bool:
        return any(side.shared.newcomers for side in self._sides.values())

    def _connect_to(self, name: str) -> Callable[[], Connection]:
        """Return what makes a connection of who comes by the listener of a name."""
        side = self._sides.get(name, self._sides[""])
        make = partial(Connection, shared=side.shared, config=side.config)
        return lambda: make(server_state=self.server_state, app_state={})

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not (is_so() or self.force_exit):  # noqa: ASYNC110  uvicorn sets no event, either
            await asyncio.sleep(TICK_SECONDS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give requests that were cut short a moment to say so; leave no socket behind, served or not."""
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=LINGER_SECONDS)
        for listener in self._listeners:
            listener.close()


def _side(entrance: Entrance, config: ServerConfig, tls: TlsConfig, origins: Sequence[str] = ()) -> _Side:
    """Make an entrance ready; pages of some origins may call there."""
    app = application(
        HttpApp(entrance.api, entrance.replies, max_body_bytes=config.max_body_bytes, url_prefix=config.url_prefix),
        origins,
    )
    shared = Shared(entrance.edge, entrance.replies, config)
    uvicorns = uvicorn.Config(
        app,
        http=cast(type[Connection], partial(Connection, shared=shared)),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # or whoever calls from this machine would say who it is
        headers=list(secure.every_reply(tls).items()),
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    return _Side(shared, uvicorns)
