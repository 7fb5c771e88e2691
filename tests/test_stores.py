"""The helpers that tests of stores rely on: what they say of a missing store, and that the faults are faults."""

import asyncio
import time

import pytest

from fault_proxy import FAULTS, Fault, FaultProxy
from stores import missing


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_a_missing_store_skips_a_test_and_fails_continuous_integration(monkeypatch, ci, outcome):
    """Nobody needs a database to try Quiver, and no release goes out without its tests."""
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match=r"no Redis at redis://nowhere .* starts one"):
        missing("Redis", "redis://nowhere", OSError())


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes."""
    while data := await reader.read(1000):
        writer.write(data)
    writer.close()
    await writer.wait_closed()


async def asked(port: int) -> bytes:
    """Send ten bytes and read as many, for half a second at most."""
    async with asyncio.timeout(0.5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"0123456789")
            return await reader.read(10)
        finally:
            writer.close()


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_is_one_and_ends(fault):
    """Through the proxy an echo fails in the way that it should, and not before or after."""
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    expected = {
        Fault.REFUSE: ConnectionRefusedError,
        Fault.BLACK_HOLE: TimeoutError,
        Fault.LATENCY: TimeoutError,
        Fault.RESET: b"01234",
        Fault.GARBAGE: bytes,
    }[fault]
    async with server, FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        assert await asked(proxy.listens_at) == b"0123456789"
        await proxy.break_down(fault)
        start = time.perf_counter()
        try:
            outcome = await asked(proxy.listens_at)
        except OSError as error:
            outcome = error
        assert time.perf_counter() - start < 2.0
        if isinstance(expected, bytes):
            assert outcome == expected or isinstance(outcome, ConnectionResetError)
        else:
            assert isinstance(outcome, expected)
            assert outcome != b"0123456789"
        await proxy.break_down(Fault.NONE)
        assert await asked(proxy.listens_at) == b"0123456789"
