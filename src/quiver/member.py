"""The life of one process of several: what it hears from its supervisor, and what it tells it."""

import asyncio
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from socket import socket
from typing import Protocol, Self

import structlog

from quiver.place import CONNECTION, LEAVE, READY, SERVING, STOPPING, Place, hear
from quiver.siblings import Siblings
from quiver.telemetry.whole import Snapshot

log = structlog.get_logger(__name__)


class Server(Protocol):
    """What serves connections."""

    async def accept_connections(self) -> None:
        """Accept them at its own socket."""

    def take(self, client: socket, name: str) -> None:
        """Serve one that another process has accepted."""


class Member:
    """Used on the event loop, around all that serves."""

    def __init__(self, place: Place, name: str, server: Server, figures: Callable[[], Snapshot]) -> None:
        self.siblings = Siblings(place.folder, name, place.count, figures)
        self.is_replaced = False
        """Whether another process has taken its place."""
        self._place = place
        self._server = server
        self._control = socket(fileno=place.control)
        self._stop: Callable[[], None] = _nothing
        self._loop = asyncio.get_running_loop()

    def on_end(self, stop: Callable[[], None]) -> None:
        """Call this when it is time to end."""
        self._stop = stop

    async def be_ready(self) -> None:
        """Take connections, and tell everybody that the models are loaded."""
        await self._server.accept_connections()
        self.siblings.say_ready()
        self._tell(READY)

    def say_stopping(self) -> None:
        """Let others have what comes from now on."""
        self._tell(STOPPING)

    async def __aenter__(self) -> Self:
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it is the supervisor's: nothing is to do here
        await self.siblings.__aenter__()
        self._loop.add_reader(self._control, self._listen)
        self._tell(SERVING)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._loop.remove_reader(self._control)
        self._control.close()
        await self.siblings.__aexit__(*exception)

    def _tell(self, word: bytes) -> None:
        with suppress(OSError):  # there is no supervisor any more: its end is heard, too
            self._control.send(word)

    def _listen(self) -> None:
        with suppress(BlockingIOError):
            while self._obey(*hear(self._control)):
                pass

    def _obey(self, word: bytes, clients: list[socket]) -> bool:
        """Do what was said; tells whether there may be more."""
        for client in clients:
            client.setblocking(False)
            self._server.take(client, word.removeprefix(CONNECTION).decode())
        if not word:
            log.error("the supervisor is gone: stopping")
            self._loop.remove_reader(self._control)
            shutil.rmtree(self._place.folder, ignore_errors=True)
            self._stop()
        elif word == LEAVE:
            self.is_replaced = True
            self._stop()
        return bool(word)


def _nothing() -> None:
    """Do nothing."""
