"""Clients of several processes: they keep connections or open one for each request, and check every vector."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from faults.load import CUT, HANGS, Answer, Line, Pool, embed, get
from faults.mixing import Texts, faults_of
from faults.servers import BASE64, members
from server_process import ServerProcess

MODEL = "stub/a"
PATIENCE_SECONDS = 10.0
PAUSE_SECONDS = 0.01
"""Between two requests of a client: the processes that are to be tried need a core, too."""


@dataclass(slots=True)
class Crowd:
    """Asks in one way after another until it is told to stop; what came of it."""

    url: str
    socket: Path | None = None
    """A unix socket, for some of the clients."""
    texts: Texts = field(default_factory=lambda: Texts(7))
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, kept: int = 6, fresh: int = 4, by_socket: int = 0) -> None:
        """Ask with clients that keep their connection, that open one each time, and that do so at the socket."""
        async with Pool(self.url) as pool:
            ways = [*[self._keeping] * kept, *[self._afresh] * fresh, *[self._by_socket] * by_socket]
            await asyncio.gather(*(way(pool, random.Random(i)) for i, way in enumerate(ways)))  # noqa: S311

    async def _keeping(self, pool: Pool, rng: random.Random) -> None:
        while not self.over.is_set():
            await self._ask(pool.ask, rng)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _afresh(self, pool: Pool, rng: random.Random) -> None:
        while not self.over.is_set():
            with contextlib.suppress(OSError):
                line = await pool.open()
                await self._ask(lambda request, line=line: ask_on(line, request), rng)
                line.cut()
            await asyncio.sleep(PAUSE_SECONDS)

    async def _by_socket(self, _: Pool, rng: random.Random) -> None:
        loop = asyncio.get_running_loop()
        while not self.over.is_set():
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                _, line = await loop.create_unix_connection(Line, str(self.socket))
                await self._ask(lambda request, line=line: ask_on(line, request), rng)
                line.cut()
            await asyncio.sleep(PAUSE_SECONDS)

    async def _ask(self, ask: object, rng: random.Random) -> None:
        chosen = [rng.randrange(len(self.texts.texts)) for _ in range(rng.randint(1, 5))]
        request = embed([self.texts.texts[i] for i in chosen], model=MODEL, **BASE64)
        answer: Answer = await ask(request)  # type: ignore[operator]
        self.statuses[answer.status] += 1
        if answer.status == 200:
            self.wrong += faults_of(answer, [self.texts.base64[MODEL][i] for i in chosen])


async def ask_on(line: Line, request: bytes, patience: float = PATIENCE_SECONDS) -> Answer:
    """Ask on a connection of one's own."""
    back: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    line.send(request, lambda answer: back.done() or back.set_result(answer))
    try:
        return await asyncio.wait_for(back, patience)
    except TimeoutError:
        return Answer(HANGS, patience)


@contextlib.asynccontextmanager
async def crowded(crowd: Crowd, **clients: int) -> Iterator[None]:
    """Let the crowd ask meanwhile."""
    running = asyncio.create_task(crowd.run(**clients))
    try:
        yield
    finally:
        crowd.over.set()
        await running


async def asked(url: str, path: str) -> Answer:
    """Ask by a connection of its own."""
    async with Pool(url) as pool:
        return await pool.ask(get(path))


async def until_ready(url: str, wanted: int, *, within_seconds: float) -> float:
    """Wait until so many processes are ready -> after how many seconds."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    while loop.time() - start < within_seconds:
        answer = await asked(url, "/health")
        if answer.status not in {CUT, HANGS} and answer.json()["processes"]["ready"] == wanted:
            return loop.time() - start
        await asyncio.sleep(0.05)
    raise AssertionError(f"there were never {wanted} processes within {within_seconds} s")


def pids(server: ServerProcess) -> list[int]:
    """Return the processes of a server by their numbers."""
    return [process.pid for process in members(server)]


async def until_gone(processes: list[psutil.Process], *, within_seconds: float) -> None:
    """Wait until processes have ended."""
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, within_seconds)
    assert not alive, f"{alive} live on"
