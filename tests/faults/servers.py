"""Servers to break: the stub, the real command, and a careless one that the detectors must find out."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from faults.load import Pool, get
from server_process import ServerProcess, serving

TESTS = Path(__file__).parent.parent
STUB = (sys.executable, "-m", "faults.stub")
SETTLE_SECONDS = 0.02
"""In which a loop closes the sockets that it was told to."""
BASE64 = {"encoding_format": "base64"}


def importable() -> str:
    """Return the path on which a process finds the tests' modules."""
    return os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])


@contextlib.contextmanager
def stub(
    *,
    models: int = 1,
    lanes: int = 2,
    behave: dict[str, Any] | None = None,
    break_if: Path | None = None,
    **settings: Any,
) -> Iterator[ServerProcess]:
    """Run a stub with some behaviour and settings; it is gone afterwards."""
    given = [f"--set={name}={value}" for name, value in settings.items()]
    given += [f"--behave={name}={value}" for name, value in (behave or {}).items()]
    given += [f"--break-if={break_if}"] if break_if else []
    arguments = (f"--models={models}", f"--lanes={lanes}", *given)
    with serving(*arguments, command=STUB, PYTHONPATH=importable()) as server:
        yield server


def client_process(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a client that is a process of its own; it prints one JSON object."""
    return subprocess.Popen(  # noqa: S603  our own command
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": importable()},
    )


async def waiting_tokens(pool: Pool) -> float:
    """Return how many tokens wait for a lane, over all models."""
    answer = await pool.ask(get("/metrics"))
    lines = answer.body.decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("quiver_waiting_tokens{"))


def members(server: ServerProcess) -> list[psutil.Process]:
    """Return the processes of a server that has several, the oldest first."""
    return sorted(psutil.Process(server.process.pid).children(), key=lambda process: process.create_time())


def descriptors(server: ServerProcess) -> int:
    """Return how many files and sockets a server holds open."""
    return int(psutil.Process(server.process.pid).num_fds())


Handler = Callable[[int], Awaitable[bytes | None]]
"""Number of a request -> its reply, or nothing for ever."""


def reply(status: int = 200, body: bytes = b"{}", headers: str = "") -> bytes:
    """Return the bytes of a reply."""
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body


@contextlib.asynccontextmanager
async def careless(answer: Handler) -> AsyncIterator[str]:
    """Run a server of a few lines which answers as it is told, and has no limits: what a detector must find."""
    count = 0
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = head.partition(b"content-length: ")[2].partition(b"\r")[0]
                await reader.readexactly(int(length or 0))
                count += 1
                if (said := await answer(count)) is not None:
                    writer.write(said)
                    await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(SETTLE_SECONDS)
