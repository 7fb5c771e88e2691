"""Clients that dribble, or do not read, are cut off in time and disturb nobody meanwhile."""

import asyncio
import contextlib
import socket
import time

import psutil
import pytest

from faults.load import Pool, Shot, embed, open_load
from faults.servers import BASE64, careless, descriptors, reply, stub
from faults.test_raw_http import HEAD, port_of

RATE = 100.0
RATIO = 1.5
NOISE_SECONDS = 0.025
"""What a machine that does something else adds to a p99."""
LATE_SECONDS = 5.0
KINDS = ("headers", "body", "reading")
MAX_READERS = 20
BIG = embed([str(i) for i in range(400)], model="stub/wide")
"""What has a reply of nine megabytes: more than two sockets hold."""


class Dribbler(asyncio.Protocol):
    """A client that sends a byte now and then, or never reads, until it is cut off."""

    def __init__(self, kind, pause):
        self.kind = kind
        self._pause = pause
        self.started = time.perf_counter()
        self.gone = asyncio.get_running_loop().create_future()
        self.transport = None

    def connection_made(self, transport):
        """Begin."""
        self.transport = transport
        if self.kind == "reading":
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            transport.pause_reading()
            transport.write(BIG)
            return
        transport.write(HEAD + (b"content-length: 1000\r\n\r\n" if self.kind == "body" else b"x-slow: "))
        self._dribble()

    def _dribble(self):
        if not self.transport.is_closing():
            self.transport.write(b"a")
            asyncio.get_running_loop().call_later(self._pause, self._dribble)

    def eof_received(self):
        """Leave when the server does."""
        return False

    def connection_lost(self, exc):
        """Note when it was cut off."""
        del exc
        if not self.gone.done():
            self.gone.set_result(time.perf_counter() - self.started)


async def look_after(process, readers):
    """Note when the server has let go of each client that does not read: it sees nothing of it, not even the end."""
    for reader in readers:
        reader.port = reader.transport.get_extra_info("sockname")[1]
    while left := [reader for reader in readers if not reader.gone.done()]:
        held = {c.raddr.port for c in process.net_connections("tcp") if c.raddr}
        for reader in left:
            if reader.port not in held and not reader.gone.done():
                reader.gone.set_result(time.perf_counter() - reader.started)
        await asyncio.sleep(0.2)


async def dribble(url, count, kinds, *, pause):
    """Open so many slow connections, of all kinds in turn."""
    loop, address = asyncio.get_running_loop(), ("127.0.0.1", port_of(url))
    made = []
    for i in range(count):
        _, dribbler = await loop.create_connection(lambda i=i: Dribbler(kinds[i % len(kinds)], pause), *address)
        made.append(dribbler)
        if i % 20 == 19:
            await asyncio.sleep(0.02)
    return made


async def until_cut(dribblers, *, within_seconds):
    """Return how long each lived; raises where one is still there."""
    try:
        async with asyncio.timeout(within_seconds):
            return await asyncio.gather(*(asyncio.shield(d.gone) for d in dribblers))
    except TimeoutError:
        left = [d.kind for d in dribblers if not d.gone.done()]
        raise AssertionError(f"{len(left)} of {len(dribblers)} are not cut off: {sorted(set(left))}") from None
    finally:
        for dribbler in dribblers:
            dribbler.transport.abort()
        await asyncio.sleep(0.01)


async def p99_of_normal_traffic(pool, seconds):
    """Return how long one query among others takes at worst."""
    seen = await open_load(pool, [Shot(embed([f"query {i}"], **BASE64)) for i in range(50)], RATE, seconds)
    assert set(seen.counts()) == {200}, seen.counts()
    return seen.percentile(99)


@pytest.mark.parametrize(
    ("count", "limits"),
    [
        (99, {"header_seconds": 2, "body_seconds": 5, "write_seconds": 2}),
        pytest.param(1000, {}, marks=pytest.mark.faults),
    ],
)
async def test_slow_clients_are_cut_off_and_disturb_nobody(count, limits, capsys):
    """Beside them the p99 of normal traffic stays within its half again, and each is gone by its limit with its descriptor."""
    longest = max(limits.values(), default=30)
    slow_readers = min(count // 10, MAX_READERS)
    with stub(models=4, **limits) as server:
        async with Pool(server.ready_url()) as pool:
            await p99_of_normal_traffic(pool, 0.5)
            before = descriptors(server)
            alone = await p99_of_normal_traffic(pool, 3)
            url = f"http://127.0.0.1:{pool.port}"
            dribblers = await dribble(url, count - slow_readers, ("headers", "body"), pause=max(0.2, longest / 6))
            # What slow clients do is in both windows, what else this machine does is seldom in both.
            windows = [await p99_of_normal_traffic(pool, min(8.0, longest / 3)) for _ in range(2)]
            beside = min(windows)
            dribblers += await dribble(url, slow_readers, ("reading",), pause=1)
            readers = [d for d in dribblers if d.kind == "reading"]
            looking = asyncio.create_task(look_after(psutil.Process(server.process.pid), readers))
            lived = await until_cut(dribblers, within_seconds=longest + LATE_SECONDS + 10)
            await looking
            with capsys.disabled():
                print(f" ({count}: p99 {1e3 * alone:.1f} -> {1e3 * beside:.1f} ms, cut by {max(lived):.1f} s) ", end="")  # noqa: T201
            assert beside < RATIO * alone + NOISE_SECONDS
            assert max(lived) < longest + LATE_SECONDS
            await asyncio.sleep(0.2)
            assert descriptors(server) <= before + 5


async def test_a_server_without_limits_is_found_out():
    """Negative control: a server that waits for ever for a client's bytes still has them when the time is up."""

    async def patient(count):
        del count
        return reply()

    async with careless(patient) as url:
        dribblers = await dribble(url, 10, ("headers", "body"), pause=0.1)
        with pytest.raises(AssertionError, match="10 of 10"):
            await until_cut(dribblers, within_seconds=1)


async def test_a_client_that_reads_slowly_gets_everything():
    """Slow is not dead: a reply that is read in small pieces, within the limit, arrives whole."""
    with stub(models=4, write_seconds=10) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server.ready_url()), limit=4096)
        writer.write(BIG)
        head = await reader.readuntil(b"\r\n\r\n")
        length, size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]), 0
        with contextlib.suppress(TimeoutError):
            while size < length and (part := await asyncio.wait_for(reader.read(1 << 17), 5)):
                size += len(part)
                await asyncio.sleep(0.02)
        writer.transport.abort()
        await asyncio.sleep(0.01)
    assert head.startswith(b"HTTP/1.1 200")
    assert size == length
