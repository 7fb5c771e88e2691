"""Several processes at full length: killed, replaced and stopped again and again under load, and one that cannot start."""

import asyncio
import os
import random
import signal
import time

import psutil
import pytest

from faults.crowd import Crowd, crowded, pids, until_gone, until_ready
from faults.load import CUT
from faults.servers import members, stub

BUSY = {"latency_seconds": 0.005}
CLIENTS = {"kept": 6, "fresh": 4, "by_socket": 2}
BACK_SECONDS = 3.0
"""How much longer than a start alone a process may be away: its back-off, and a machine that is at work."""

pytestmark = pytest.mark.faults


async def test_none_of_many_replacements_fails_a_request(tmp_path, capsys):
    """Twenty processes are replaced under load, and each request gets its vectors."""
    with stub(processes=2, socket_dir=tmp_path, behave=BUSY, drain_seconds=6) as server:
        crowd, old = Crowd(server.ready_url(), tmp_path / "rest.sock"), pids(server)
        async with crowded(crowd, **CLIENTS):
            for _ in range(10):
                server.signal(signal.SIGHUP)
                for _ in old:
                    await asyncio.to_thread(server.wait_for, "a process is replaced")
                await until_ready(crowd.url, 2, within_seconds=20)
        assert (set(crowd.statuses), crowd.wrong) == ({200}, []), crowd.statuses
        assert not {*pids(server)} & {*old}
    with capsys.disabled():
        print(f" (20 replaced, {crowd.statuses.total()} requests, 0 failed) ", end="")  # noqa: T201  the figures


async def test_what_is_killed_is_soon_back(tmp_path, capsys):
    """Of twenty kills none makes another request wrong or hang, and each process is back after its start and the back-off."""
    rng, away = random.Random(0), []  # noqa: S311  repeatable on purpose
    start = time.monotonic()
    with stub(processes=2, socket_dir=tmp_path, behave=BUSY) as server:
        url = server.ready_url()
        load_seconds = time.monotonic() - start
        for _ in range(20):
            crowd = Crowd(url, tmp_path / "rest.sock")
            async with crowded(crowd, **CLIENTS):
                await asyncio.sleep(rng.uniform(0.1, 0.5))
                os.kill(rng.choice(pids(server)), signal.SIGKILL)
                killed = time.monotonic()
                await until_ready(url, 1, within_seconds=1)
                await asyncio.sleep(0.3)
            assert set(crowd.statuses) <= {200, CUT}, crowd.statuses
            assert crowd.statuses[CUT] <= sum(CLIENTS.values())
            assert crowd.wrong == []
            await until_ready(url, 2, within_seconds=60)
            away.append(time.monotonic() - killed)
    with capsys.disabled():
        print(f" (20 kills, away {min(away):.1f} to {max(away):.1f} s, a start takes {load_seconds:.1f}) ", end="")  # noqa: T201
    assert sorted(away)[10] < load_seconds + BACK_SECONDS


async def test_no_stop_loses_what_was_accepted(tmp_path):
    """At whatever moment all are told to end, each request gets its vectors or a clean refusal; nothing is left."""
    rng = random.Random(1)  # noqa: S311  repeatable on purpose
    for _ in range(15):
        with stub(processes=2, socket_dir=tmp_path, behave=BUSY) as server:
            crowd = Crowd(server.ready_url(), tmp_path / "rest.sock")
            processes = members(server)
            async with crowded(crowd, kept=8, fresh=0, by_socket=4):
                await asyncio.sleep(rng.uniform(0.05, 0.4))
                server.signal(signal.SIGTERM)
                await asyncio.sleep(0.1)
                assert set(crowd.statuses) == {200}  # for the first moment they go on
                assert await asyncio.to_thread(server.ended) == 0
                crowd.over.set()
            assert (set(crowd.statuses) <= {200, 503, CUT}, crowd.wrong) == (True, []), crowd.statuses
            await until_gone(processes, within_seconds=1)
        assert not (tmp_path / "rest.sock").exists()


async def test_without_their_supervisor_all_end_under_load():
    """Ten supervisors are killed: their processes end by themselves, and what they had accepted is answered."""
    for _ in range(10):
        with stub(processes=2, behave=BUSY) as server:
            crowd, processes = Crowd(server.ready_url()), members(server)
            async with crowded(crowd, kept=6, fresh=0):
                await asyncio.sleep(0.2)
                server.signal(signal.SIGKILL)
                await until_gone(processes, within_seconds=10)
                crowd.over.set()
            assert (set(crowd.statuses) <= {200, 503, CUT}, crowd.wrong) == (True, []), crowd.statuses


def test_what_cannot_start_is_given_up(tmp_path):
    """After five attempts, later and later, the server ends as its process did, and says why."""
    broken = tmp_path / "broken"
    broken.touch()
    with stub(processes=2, break_if=broken) as server:
        assert server.ended(within_seconds=120) == 3
        events = [line for line in server.lines if "a process ended" in line]
        assert len(events) == 5
        assert any("giving up" in line for line in server.lines)


async def test_one_that_cannot_start_beside_others_is_tried_again_and_again(tmp_path):
    """While another process serves, the server does not end; once the fault is gone, all are there."""
    broken = tmp_path / "broken"
    with stub(processes=2, break_if=broken) as server:
        url = server.ready_url()
        broken.touch()
        os.kill(pids(server)[0], signal.SIGKILL)
        for _ in range(6):
            await asyncio.to_thread(server.wait_for, "a process ended")
        await until_ready(url, 1, within_seconds=1)
        broken.unlink()
        await until_ready(url, 2, within_seconds=60)
        assert psutil.pid_exists(server.process.pid)
