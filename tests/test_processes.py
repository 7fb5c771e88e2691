"""Several processes that are one server: its port, its sockets and figures, and what becomes of it when some end."""

import asyncio
import os
import re
import shutil
import signal
import socket
import sqlite3
import time
from pathlib import Path

import httpx
import psutil
import pytest

from certificates import Authority
from faults.crowd import Crowd, asked, crowded, pids, until_gone, until_ready
from faults.load import CUT, HANGS, Pool, embed, get
from faults.servers import members, stub
from quiver.api.listeners import bind, bind_together
from quiver.bench.server import free_port
from quiver.config import ServerConfig
from quiver.errors import ConfigError
from server_process import run, serving
from stores import REDIS, redis_prefix

EX_CONFIG = 78
BUSY = {"latency_seconds": 0.005}
LOAD_SECONDS = 20.0
"""In which a process is back, on a machine that does something else meanwhile: imports take most of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the directory of the server's socket."""
    return tmp_path_factory.mktemp("sockets")


@pytest.fixture(scope="module")
def server(folder):
    """Run a server of two processes, on its port and a socket."""
    with stub(processes=2, socket_dir=folder, behave=BUSY) as server:
        yield server


@pytest.fixture(scope="module")
def url(server):
    """Return where it listens, ready."""
    return server.ready_url()


def close(listeners):
    """Listen no more."""
    for listener in listeners:
        listener.close()


# Listening


def test_a_port_is_shared_by_one_server_alone():
    """Whoever starts on the port of several processes is refused, alone or with processes of its own."""
    ports, files = bind_together(ServerConfig(port=0), 3)
    assert (len({listener.url for listener in ports}), len(ports), files) == (1, 3, ())
    taken = ServerConfig(port=ports[0].bound.getsockname()[1])
    for start in (lambda: bind(taken, None), lambda: bind_together(taken, 2)):
        with pytest.raises(ConfigError, match="Address already in use"):
            start()
    close(ports)
    close(bind(taken, None))


def test_several_processes_do_not_take_the_port_of_one():
    """A server that is alone has its port for itself."""
    alone = bind(ServerConfig(port=0), None)
    with pytest.raises(ConfigError, match="Address already in use"):
        bind_together(ServerConfig(port=alone[0].bound.getsockname()[1]), 2)
    close(alone)


def test_of_what_cannot_be_bound_nothing_is_left(tmp_path):
    """Where the sockets' directory is none, the port is not taken either."""
    port = free_port()
    with pytest.raises(ConfigError):
        bind_together(ServerConfig(port=port, socket_dir=tmp_path / ("a" * 100)), 2)
    close(bind(ServerConfig(port=port), None))


def test_the_kernel_divides_connections():
    """Each of the port's sockets gets some of those who connect."""
    ports, _ = bind_together(ServerConfig(port=0), 2)
    clients = [socket.create_connection(ports[0].bound.getsockname()) for _ in range(64)]
    shares = []
    for listener in ports:
        listener.bound.setblocking(False)
        shares.append(0)
        try:
            while True:
                listener.bound.accept()[0].close()
                shares[-1] += 1
        except BlockingIOError:
            pass
    assert sum(shares) == 64
    assert min(shares) > 8
    for client in clients:
        client.close()
    close(ports)


# Serving


async def test_every_process_answers_at_the_port_and_at_the_socket(server, url, folder):
    """All requests get their vectors, and the figures of the whole know each of them, whoever is asked."""
    before = await counted(url)
    crowd = Crowd(url, folder / "rest.sock")
    async with crowded(crowd, kept=8, fresh=4, by_socket=4):
        await asyncio.sleep(1)
    assert (set(crowd.statuses), crowd.wrong) == ({200}, [])
    assert {await counted(url) - before for _ in range(6)} == {crowd.statuses.total()}
    seconds = [sum(process.cpu_times()[:2]) for process in members(server)]
    assert len(seconds) == 2


async def counted(url):
    """Return how many requests for vectors the whole server has counted."""
    lines = (await asked(url, "/metrics")).body.decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if line.startswith('quiver_requests_total{dialect="openai')
    )


async def test_both_processes_work(server, url):
    """New connections go to each of them: both spend time on a load of short ones."""
    before = {process.pid: process.cpu_times().user for process in members(server)}
    crowd = Crowd(url)
    async with crowded(crowd, kept=0, fresh=6):
        await asyncio.sleep(1)
    spent = [process.cpu_times().user - before[process.pid] for process in members(server)]
    assert min(spent) > 0.1 * max(spent)


def test_the_clients_of_a_socket_are_handed_out_in_turn(server, url, folder):
    """Of connections that are kept, made one after another, each process has half."""
    assert url
    path = str(folder / "rest.sock")
    before = [of_socket(process, path) for process in members(server)]
    clients = [httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://local") for _ in range(8)]
    for client in clients:
        assert client.get("/health").status_code == 200
    after = [of_socket(process, path) for process in members(server)]
    for client in clients:
        client.close()
    assert [now - then for now, then in zip(after, before, strict=True)] == [4, 4]


def of_socket(process, path):
    """Return how many connections of a unix socket a process has."""
    return sum(connection.laddr == path for connection in process.net_connections("unix"))


async def test_health_tells_how_many_there_are(url):
    """All that should be there are ready, and so do the metrics say."""
    assert (await asked(url, "/health")).json()["processes"] == {"ready": 2, "wanted": 2}
    text = (await asked(url, "/metrics")).body.decode()
    assert 'quiver_processes{state="ready"} 2.0' in text


def test_cores_are_divided(server, url):
    """Where there are as many cores as processes, each process has its own."""
    assert url
    cores = [set(process.cpu_affinity()) for process in members(server)]
    if len(os.sched_getaffinity(0)) >= 2:
        assert not cores[0] & cores[1]
    assert cores[0] | cores[1] == os.sched_getaffinity(0)


def test_what_is_divided_is_said_at_the_start():
    """Rates that no Redis shares, memory of results, and that there are fewer cores than processes."""
    many = len(os.sched_getaffinity(0)) + 1
    with stub(processes=many, cache_bytes=1000 * many, max_concurrent_requests=10 * many) as server:
        server.url()
        said = server.wait_for("divided")
        assert said["rates"] == f"each process lets 1/{many} of each rate through"
        assert said["max_concurrent_requests"] == f"{10 * many} = {many} x 10"
        server.wait_for("there are more processes than cores: they take turns")


def test_vectors_are_those_of_one_process():
    """The default model's have the same bits, whichever process is asked, and both hold the same pages of its weights."""
    texts, answers = [f"text {i} " + "word " * (7 * i % 90) for i in range(40)], []
    for given in ((), ("--processes", "2")):
        with serving("--cache-entries", "0", *given) as server:
            url = server.ready_url()
            for _ in range(6 if given else 1):  # each on a connection of its own
                reply = httpx.post(
                    f"{url}/v1/embeddings", json={"input": texts, "encoding_format": "base64"}, timeout=60
                )
                answers.append([item["embedding"] for item in reply.json()["data"]])
            if given:
                inodes = [weights_pages(process.pid) for process in members(server)]
    assert all(answer == answers[0] for answer in answers)
    assert inodes[0]
    assert inodes[0] == inodes[1]


def weights_pages(pid):
    """Return which files of weights a process has mapped, by device and inode."""
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    return {tuple(line.split()[3:5]) for line in lines if line.endswith(".safetensors")}


async def allowed(pool, count):
    """Ask so often -> how many were let through."""
    statuses = [(await pool.ask(get("/v1/models"))).status for _ in range(count)]
    assert set(statuses) <= {200, 429}
    return statuses.count(200)


async def test_a_rate_is_that_of_the_whole_server():
    """Where a Redis counts, one connection gets all of it; where none does, a part, and all connections the whole."""
    slow = {"rate_per_second": 0.001, "rate_burst": 8, "processes": 2}
    with stub(**slow) as server:
        url = server.ready_url()
        async with Pool(url) as pool:
            assert await allowed(pool, 20) == 4
        others = 0
        for _ in range(30):
            async with Pool(url) as pool:
                others += await allowed(pool, 1)
        assert others == 4
    async with redis_prefix() as prefix:
        with stub(**slow, redis_url=REDIS, redis_prefix=prefix) as server:
            async with Pool(server.ready_url()) as pool:
                assert 8 <= await allowed(pool, 20) <= 12  # a Redis that was late left some to the process itself


async def test_usage_is_counted_once_by_whoever_it_was(tmp_path):
    """All processes keep what was used on the same disk until the one ledger has it."""
    made = run("keys", "create", "--email", "a@example.com", "--tier", "scale", QUIVER_DATA_DIR=str(tmp_path))
    key = re.search(r"qv_\S+", made.stdout)
    assert key, made
    bearer = {"authorization": f"Bearer {key[0]}"}
    with stub(processes=2, auth="required", data_dir=tmp_path) as server:
        url = server.ready_url()
        for i in range(24):
            async with Pool(url) as pool:
                assert (await pool.ask(embed([f"{i}", "b"], headers=bearer))).status == 200
        server.signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.ended) == 0
    with sqlite3.connect(tmp_path / "quiver.db") as database:
        assert database.execute("SELECT count(*), sum(embeddings) FROM usage").fetchone() == (24, 48)
    database.close()


# Ends


async def test_a_process_that_is_killed_takes_only_its_own_with_it(server, url, folder):
    """Of requests under way some are cut, none hangs or is wrong; the process is replaced, and sums do not fall."""
    before, old = await counted(url), pids(server)
    crowd = Crowd(url, folder / "rest.sock")
    async with crowded(crowd, kept=6, fresh=3, by_socket=2):
        await asyncio.sleep(0.3)
        os.kill(old[0], signal.SIGKILL)
        await asyncio.sleep(0.1)
        assert (await asked(url, "/health/ready")).status == 200
        await until_ready(url, 1, within_seconds=1)
        await asyncio.sleep(0.5)
    assert (set(crowd.statuses) <= {200, CUT}, crowd.wrong) == (True, []), crowd.statuses
    assert crowd.statuses[CUT] <= 11  # no client had more than one request under way
    await until_ready(url, 2, within_seconds=LOAD_SECONDS)
    assert len({*pids(server)} - {*old}) == 1
    assert await counted(url) >= before


async def test_a_process_that_is_asked_to_end_alone_has_a_successor_at_its_socket(server, url, folder):
    """Nobody is turned away from what others go on listening at: each new connection is answered, before and after."""
    old, port = pids(server), int(url.rpartition(":")[2])
    crowd = Crowd(url, folder / "rest.sock")
    async with crowded(crowd, kept=0, fresh=4, by_socket=0):
        os.kill(old[0], signal.SIGTERM)
        await until_gone([psutil.Process(old[0])], within_seconds=10)
        await until_ready(url, 2, within_seconds=LOAD_SECONDS)
    assert set(crowd.statuses) <= {200, 503, CUT}
    start = time.monotonic()
    for _ in range(64):  # some of them by the kernel's choice at that socket
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(b"GET /health/ready HTTP/1.1\r\nhost: a\r\n\r\n")
            assert client.recv(12)[9:] == b"200"
    assert time.monotonic() - start < 1


async def test_a_hangup_replaces_all_without_a_failed_request(server, url, folder):
    """New processes take the places one by one, while clients keep connections, make new ones, and use the socket."""
    old = pids(server)
    crowd = Crowd(url, folder / "rest.sock")
    async with crowded(crowd, kept=6, fresh=4, by_socket=2):
        await asyncio.sleep(0.2)
        server.signal(signal.SIGHUP)
        for _ in old:
            await asyncio.to_thread(server.wait_for, "a process is replaced")
        await until_gone([psutil.Process(pid) for pid in old if psutil.pid_exists(pid)], within_seconds=10)
        await asyncio.sleep(0.2)
    assert (set(crowd.statuses), crowd.wrong) == ({200}, []), crowd.statuses
    assert not {*pids(server)} & {*old}
    assert (await asked(url, "/health")).json()["processes"]["ready"] == 2


async def test_a_stop_lets_all_drain(server, url, folder):
    """What was accepted before is answered, later requests are refused cleanly, and nothing is left; it exits with 0."""
    processes = members(server)
    crowd = Crowd(url, folder / "rest.sock")
    async with Pool(url) as pool, crowded(crowd, kept=4, fresh=0, by_socket=2):
        waiting = [asyncio.create_task(pool.ask(embed([f"!stall 0.5 {i}"]))) for i in range(6)]
        await asyncio.sleep(0.2)
        server.signal(signal.SIGTERM)
        assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}
        assert await asyncio.to_thread(server.ended) == 0
        crowd.over.set()
    assert crowd.wrong == []
    assert HANGS not in crowd.statuses
    assert set(crowd.statuses) <= {200, 503, CUT}
    await until_gone(processes, within_seconds=1)
    assert not (folder / "rest.sock").exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the certificate is made by openssl")
def test_who_comes_while_a_process_is_away_is_served_by_the_others(tmp_path):
    """Over TLS, too: none of many new connections waits for the process that was killed, and none is cut."""
    authority = Authority(tmp_path)
    with stub(processes=2, behave={"load_seconds": 1}, **authority.sign("server").arguments()) as server:
        url = server.ready_url()
        os.kill(pids(server)[0], signal.SIGKILL)
        server.wait_for("a process ended")
        start = time.monotonic()
        for _ in range(12):
            assert httpx.get(f"{url}/health/ready", verify=authority.client(), timeout=10).status_code == 200
        assert len(pids(server)) == 2
        assert time.monotonic() - start < LOAD_SECONDS / 2


async def test_without_their_supervisor_all_end():
    """Nobody is left behind it, whatever they do, and what is under way is answered."""
    with stub(processes=2) as server:
        url, processes = server.ready_url(), members(server)
        async with Pool(url) as pool:
            waiting = asyncio.create_task(pool.ask(embed(["!stall 0.5"])))
            await asyncio.sleep(0.2)
            server.signal(signal.SIGKILL)
            assert (await waiting).status == 200
        await until_gone(processes, within_seconds=5)


async def test_a_process_that_ends_while_it_loads_is_started_again(tmp_path):
    """The others wait for the first; once it can load, all are there."""
    broken = tmp_path / "broken"
    broken.touch()
    with stub(processes=2, break_if=broken) as server:
        url = server.url()
        assert server.wait_for("a process ended")["why"] == "exit code 3"
        broken.unlink()
        server.wait_for("ready")
        assert (await asked(url, "/health")).json()["processes"] == {"ready": 2, "wanted": 2}
        broken.touch()
        old = pids(server)
        server.signal(signal.SIGHUP)
        server.wait_for("a new process did not start: the others go on")
        assert pids(server) == old
        assert (await asked(url, "/health/ready")).status == 200


def test_a_mistake_in_the_settings_ends_all_at_once(tmp_path):
    """The first process alone is started, once, the reason is said once, and the exit code is 78."""
    with serving("--processes", "2", "--model", str(tmp_path / "nowhere")) as server:
        assert server.ended(within_seconds=3 * LOAD_SECONDS) == EX_CONFIG
    assert sum("is not a directory" in line for line in server.lines) == 1
    assert sum("a process ended" in line for line in server.lines) == 1


def test_a_directory_that_sockets_cannot_be_in_is_named(tmp_path):
    """Where the path of temporary files is too long, the message says which setting to change."""
    far = tmp_path / ("a" * 90)
    far.mkdir()
    done = run("serve", "--processes", "2", "--port", "0", TMPDIR=str(far))
    assert done.returncode == EX_CONFIG
    assert "TMPDIR" in done.stderr


def test_a_number_that_is_none_is_refused():
    """0 processes serve nobody."""
    done = run("serve", "--processes", "0")
    assert done.returncode == EX_CONFIG
    assert "processes" in done.stderr
    assert "1 or more" in done.stderr
