"""A TCP proxy that fails on command: what stands between a test and a real PostgreSQL or Redis."""

import asyncio
import contextlib
import os
import socket
import struct
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self


class Fault(StrEnum):
    """What goes wrong."""

    NONE = "none"
    REFUSE = "refuse"
    """Nobody listens, and those who were connected are reset."""
    BLACK_HOLE = "black hole"
    """What is sent is never answered, nor is the connection closed."""
    LATENCY = "latency"
    """Every answer comes two seconds late."""
    RESET = "reset"
    """The connection is reset in the middle of an answer."""
    GARBAGE = "garbage"
    """The answer is noise of the same length, see `noise`."""


FAULTS = [fault for fault in Fault if fault is not Fault.NONE]
LATE_SECONDS = 2.0
CHUNK = 65536


@dataclass
class FaultProxy:
    """Passes bytes on to `host:port`, as well or badly as `fault` says; `async with` gives it a port."""

    host: str
    port: int
    listens_at: int = 0
    num_connections: int = 0
    """How many were made so far."""
    fault: Fault = Fault.NONE
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def break_down(self, fault: Fault) -> None:
        """Begin to fail, or with `Fault.NONE` to work again; who is connected stays so, unless nobody listens."""
        self.fault = fault
        if fault is Fault.REFUSE:
            await self._stop_listening()
            self._reset_all()
        elif self._server is None:
            await self._listen()

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop_listening()
        self._reset_all()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.listens_at)
        self.listens_at = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server:
            self._server.close()
            self._server = None

    def _reset_all(self) -> None:
        for writer in tuple(self._writers):
            reset(writer)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        both = {writer}
        try:
            there_reader, there_writer = await asyncio.open_connection(self.host, self.port)
            both.add(there_writer)
            self._writers |= both
            await asyncio.gather(self._ask(reader, there_writer), self._answer(there_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers -= both
            for one in both:
                one.close()
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await one.wait_closed()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            if self.fault is not Fault.BLACK_HOLE:
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            match self.fault:
                case Fault.BLACK_HOLE:
                    continue
                case Fault.LATENCY:
                    await asyncio.sleep(LATE_SECONDS)
                case Fault.GARBAGE:
                    data = noise(len(data))
                case Fault.RESET:
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                    reset(writer)
                    return
            writer.write(data)
            await writer.drain()
        writer.close()


def noise(size: int) -> bytes:
    """Return bytes of which none is ASCII: no protocol of these has such messages.

    One noise in some thousands looks to asyncpg like a row that it has not asked for, which ends the whole process
    (https://github.com/MagicStack/asyncpg/issues/1033).
    """
    return bytes(byte | 0x80 for byte in os.urandom(size))


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a crash does: no goodbye, and what is under way is lost."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
