"""The processes of one server as each of them sees the others: what all have counted, and how many are ready.

In the directory that they share, a process has

    NAME.sock     where it tells its figures to whoever connects
    NAME.last     the figures that it told last: what remains of it when it has ended
    NAME.ready    that its models are loaded

and of those that have ended, `gone` has the sums: their supervisor buries them there.
"""

import asyncio
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec

from quiver.telemetry import whole
from quiver.telemetry.whole import Family, Sample, Snapshot

ASK_SECONDS = 1.0
"""A process that does not tell its figures in that time is taken for what it told last."""
SOCKET, LAST, READY = ".sock", ".last", ".ready"
_GONE = "gone"
MAX_NAMES = 256
"""Of processes that have ended lately."""


class Siblings:
    """One process among the others of its server."""

    def __init__(self, folder: Path, name: str, count: int, figures: Callable[[], Snapshot]) -> None:
        self.count = count
        """How many there should be."""
        self._folder = folder
        self._name = name
        self._figures = figures
        self._server: asyncio.Server | None = None

    @property
    def num_ready(self) -> int:
        """How many of them are ready."""
        return sum(1 for _ in self._folder.glob(f"*{READY}"))

    def say_ready(self) -> None:
        """Tell the others that this process is ready."""
        self._file(READY).touch()

    async def exposition(self) -> bytes:
        """Return the figures of the whole server in Prometheus's text format."""
        own = self._told()
        others = [path.stem for path in self._folder.glob(f"*{SOCKET}") if path.stem != self._name]
        answers = await asyncio.gather(*map(self._ask, others))
        living = {name: answer for name, answer in zip(others, answers, strict=True) if answer is not None}
        return await asyncio.to_thread(self._written, own, living)

    def _written(self, own: Snapshot, living: Mapping[str, Snapshot]) -> bytes:
        gone, ended = _ended(self._folder, {self._name, *living})
        others = [snapshot for name, snapshot in living.items() if name not in gone.names]
        return whole.exposition((*whole.together((own, *others), (gone.figures, *ended)), self._count()))

    def _count(self) -> Family:
        states = {"ready": self.num_ready, "wanted": self.count}
        samples = tuple(Sample("quiver_processes", (("state", state),), n) for state, n in states.items())
        return Family("quiver_processes", "Processes of the server.", "gauge", samples)

    def _told(self) -> Snapshot:
        """Return the own figures, and keep them on disk: what was shown once must count for ever."""
        snapshot = self._figures()
        with suppress(OSError):  # there is no room: they are told all the same
            new = self._file(".new")
            new.write_bytes(whole.encoded(snapshot))
            new.replace(self._file(LAST))
        return snapshot

    async def _ask(self, name: str) -> Snapshot | None:
        with suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(ASK_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._folder / f"{name}{SOCKET}")
                try:
                    return whole.decoded(await reader.read())
                finally:
                    writer.close()
        return None

    async def _tell(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            writer.write(whole.encoded(self._told()))
            await writer.drain()
        writer.close()

    def _file(self, suffix: str) -> Path:
        return self._folder / f"{self._name}{suffix}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._tell, self._file(SOCKET))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server:
            self._server.close()
        self._told()
        forget(self._folder, self._name)


class _Gone(msgspec.Struct, frozen=True, array_like=True):
    """What processes that have ended had counted, and the names of the latest of them."""

    names: tuple[str, ...] = ()
    figures: tuple[Family, ...] = ()


def forget(folder: Path, name: str) -> None:
    """Remove what says that a process lives."""
    for suffix in (SOCKET, READY):
        (folder / f"{name}{suffix}").unlink(missing_ok=True)


def bury(folder: Path, name: str) -> None:
    """Put what a process that has ended had counted to what all others had that have."""
    forget(folder, name)
    last = folder / f"{name}{LAST}"
    with suppress(OSError, ValueError):
        gone, figures = _gone(folder), whole.decoded(last.read_bytes())
        sums = whole.together((), (gone.figures, figures))
        new = folder / f"{_GONE}.new"
        new.write_bytes(msgspec.msgpack.encode(_Gone((*gone.names, name)[-MAX_NAMES:], tuple(sums))))
        new.replace(folder / _GONE)
    last.unlink(missing_ok=True)


def _gone(folder: Path) -> _Gone:
    try:
        return msgspec.msgpack.decode((folder / _GONE).read_bytes(), type=_Gone)
    except (OSError, ValueError):
        return _Gone()


def _ended(folder: Path, living: Container[str]) -> tuple[_Gone, list[Snapshot]]:
    """Return what is known of processes that have ended: those that are buried, and those that are not yet."""
    told = {}
    for path in folder.glob(f"*{LAST}"):
        if path.stem not in living:
            with suppress(OSError, ValueError):
                told[path.stem] = whole.decoded(path.read_bytes())
    gone = _gone(folder)  # after them: one that is buried meanwhile is in both, and is seen to be
    return gone, [snapshot for name, snapshot in told.items() if name not in gone.names]
