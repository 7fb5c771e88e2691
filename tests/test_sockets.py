"""Unix sockets beside the port: who may connect, what is left of them, and that each serves what it is for."""

import asyncio
import itertools
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from certificates import Authority
from conftest import assembled
from faults.servers import stub
from quiver import config
from quiver.api.call import Reply
from quiver.api.listeners import SOCKETS, bind, connected, turn_away
from quiver.api.server import Entrance, HttpServer
from quiver.config import ServerConfig, TlsConfig
from quiver.errors import ConfigError
from server_process import serving

EX_CONFIG = 78
RPC_HEALTH = {"jsonrpc": "2.0", "id": 1, "method": "health"}


def over(path, **options):
    """Return a client that asks by a socket."""
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://local", timeout=10, **options)


def alone(folder):
    """Return the settings of a server that listens there and nowhere else."""
    return ServerConfig(tcp=False, socket_dir=folder)


def close(listeners):
    """Listen no more."""
    for listener in listeners:
        listener.close()


def leave_behind(path):
    """Leave what a killed server does: a socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


# Who is served


def test_the_socket_and_the_port_are_one_server(tmp_path):
    """Both give the same vectors, the log says where they are, and only owner and group may connect."""
    with stub(socket_dir=tmp_path) as server:
        said = server.wait_for("listening")
        server.wait_for("ready")
        path = tmp_path / "rest.sock"
        assert said["sockets"] == [f"unix:{tmp_path / name}" for name in SOCKETS]
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        by_port = httpx.post(f"{said['url']}/v1/embeddings", json={"input": ["a", "b"]}).json()
        with over(path) as http:
            assert http.post("/v1/embeddings", json={"input": ["a", "b"]}).json()["data"] == by_port["data"]
            assert http.get("/health").json()["status"] == "ok"


def test_only_the_group_may_connect_whatever_the_umask(tmp_path):
    """The file is born with its mode: a mask that would allow more, or less, changes nothing."""
    for mask in (0, 0o077, 0o777):
        folder = tmp_path / f"{mask:o}"
        folder.mkdir()
        before = os.umask(mask)
        try:
            listeners = bind(alone(folder), None)
            assert os.umask(mask) == mask
        finally:
            os.umask(before)
        assert {stat.S_IMODE((folder / name).stat().st_mode) for name in SOCKETS} == {0o660}
        close(listeners)
        assert not list(folder.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_somebody_else_may_not_connect(tmp_path):
    """A user who is neither owner nor in the group is refused by the kernel, one in the group is not."""
    reachable = tmp_path
    while reachable != reachable.parent:
        reachable.chmod(reachable.stat().st_mode | 0o011)
        reachable = reachable.parent
    connect = (
        "import os, socket, sys; os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(65534)\n"
        "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    )
    listeners = bind(alone(tmp_path), None)
    for name, group in itertools.product(SOCKETS, (65534, os.getegid())):
        is_let_in = group == os.getegid()
        done = subprocess.run(  # noqa: S603  our own command
            [sys.executable, "-c", connect, str(tmp_path / name), str(group)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) is is_let_in, done.stderr
        assert ("PermissionError" in done.stderr) is not is_let_in
    close(listeners)


def test_a_key_is_asked_for_as_at_the_port(tmp_path):
    """Who may connect may not call for that, but at the dashboard's own socket, whose guard its mode is."""
    with stub(socket_dir=tmp_path, api_key="the key", auth="auto", data_dir=tmp_path) as server:
        server.ready_url()
        key = {"x-api-key": "the key"}
        for name, path, body in (("rest.sock", "/v1/embeddings", {"input": "a"}), ("rpc.sock", "/", RPC_HEALTH)):
            with over(tmp_path / name) as http:
                assert http.post(path, json=body).status_code == 401
                assert http.post(path, json=body, headers=key).status_code == 200
        with over(tmp_path / "admin.sock") as http:
            assert http.get("/api/status").status_code == 200


async def test_who_comes_by_a_socket_is_called_local(tmp_path):
    """There is no address: turns and limits know all of them by one name."""

    class Recorder:
        """Answers everything, and notes who asked."""

        peers: tuple[str, ...] = ()

        async def receive(self, call):
            self.peers = (*self.peers, call.peer)
            return Reply(200, b"{}")

    async with assembled() as parts:
        recorder = Recorder()
        recorder.admission = parts.admission
        settings = replace(parts.config.server, port=0, socket_dir=tmp_path, drain_delay_seconds=0)
        async with HttpServer(Entrance(recorder, parts.edge, parts.replies), settings, TlsConfig()) as server:
            running = asyncio.create_task(server.run_until_stopped())
            transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "rest.sock"))
            async with httpx.AsyncClient(transport=transport) as by_socket, httpx.AsyncClient() as by_port:
                await by_socket.get("http://local/health")
                await by_port.get(f"{server.url}/health")
            server.stop()
            await running
    assert recorder.peers == ("local", "127.0.0.1")


def test_the_port_may_be_off(tmp_path):
    """Without it the socket alone is served, and no port is open."""
    with stub(tcp="false", socket_dir=tmp_path) as server:
        assert "url" not in server.wait_for("listening")
        server.wait_for("ready")
        with over(tmp_path / "rest.sock") as http:
            assert http.post("/v1/embeddings", json={"input": "a"}).status_code == 200
        assert not psutil.Process(server.process.pid).net_connections("tcp")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the certificate is made by openssl")
def test_tls_is_for_the_port(tmp_path):
    """Nobody reads along on a socket: it speaks HTTP where the port speaks HTTPS."""
    authority = Authority(tmp_path / "ca")
    with stub(socket_dir=tmp_path, **authority.sign("server").arguments()) as server:
        url = server.ready_url()
        assert httpx.get(f"{url}/health", verify=authority.client()).status_code == 200
        with over(tmp_path / "rest.sock") as http:
            assert http.get("/health").status_code == 200


# Limits and the end


@pytest.mark.parametrize("begun", [b"", b"POST /v1/embeddings HTTP/1.1\r\nx-a: "])
def test_a_slow_client_is_cut_as_at_the_port(tmp_path, begun):
    """Who says nothing, or half a head, is gone after `header_seconds`."""
    with stub(socket_dir=tmp_path, header_seconds=1) as server, socket.socket(socket.AF_UNIX) as client:
        server.ready_url()
        client.settimeout(5)
        client.connect(str(tmp_path / "rest.sock"))
        client.sendall(begun)
        start = time.monotonic()
        while client.recv(1000):
            pass
        assert 0.8 < time.monotonic() - start < 3


def test_a_stopping_server_answers_and_leaves_no_file(tmp_path):
    """What is at work on a socket is answered, and then neither a listener nor a file is left."""
    path = tmp_path / "rest.sock"
    with stub(socket_dir=tmp_path, behave={"latency_seconds": 1}) as server, over(path) as http:
        server.ready_url()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(http.post, "/v1/embeddings", json={"input": "a"})
            time.sleep(0.3)
            server.signal(signal.SIGTERM)
            assert server.ended() == 0
            assert asking.result().status_code == 200
    assert not [left for left in tmp_path.iterdir() if left.is_socket()]


def test_a_stop_loses_nobody_who_is_connected(tmp_path):
    """Under a load of new connections, each that was made is answered, before and after the signal."""
    path = tmp_path / "rest.sock"
    cut, answered = [], []

    def ask(stop):
        request = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: 14\r\n\r\n" + b'{"input": "a"}'
        while not stop.is_set():
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10)
                try:
                    client.connect(str(path))
                except OSError:
                    return  # it has stopped listening
                try:
                    client.sendall(request)
                    answered.append(client.recv(12))
                except OSError as error:
                    cut.append(repr(error))

    with stub(socket_dir=tmp_path) as server:
        server.ready_url()
        stop = threading.Event()
        asking = [threading.Thread(target=ask, args=(stop,)) for _ in range(4)]
        for thread in asking:
            thread.start()
        time.sleep(0.5)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
        stop.set()
        for thread in asking:
            thread.join()
    assert len(answered) > 50
    assert (cut, {status[9:12] for status in answered} - {b"200", b"503"}) == ([], set())


def hears_nothing(address):
    """Connect, and wait for what never comes."""
    with socket.create_connection(address, timeout=5) as client:
        client.recv(1)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel is asked as Linux wants it")
@pytest.mark.parametrize("is_turned_away", [True, False], ids=["turned away", "control"])
def test_nobody_connects_between_the_last_look_at_a_port_and_its_closing(is_turned_away):
    """Who came before is accepted; who comes after finds the port closed, and is not cut off a connection."""
    (listener,) = bind(ServerConfig(port=0), None)
    address = listener.bound.getsockname()
    with socket.create_connection(address, timeout=5) as early, ThreadPoolExecutor(1) as threads:
        if is_turned_away:
            turn_away(listener.bound)
        (accepted,) = connected(listener.bound)
        late = threads.submit(hears_nothing, address)
        time.sleep(0.2)
        listener.close()
        with pytest.raises(ConnectionRefusedError if is_turned_away else ConnectionResetError):
            late.result()
        with accepted:
            accepted.sendall(b"a")
            assert early.recv(1) == b"a"


def test_a_killed_server_is_no_obstacle(tmp_path):
    """Its files are left, and the next server puts its own there."""
    with stub(socket_dir=tmp_path) as server:
        server.ready_url()
        server.signal(signal.SIGKILL)
        server.ended()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_socket()) == sorted(SOCKETS)
    with stub(socket_dir=tmp_path) as server:
        server.ready_url()
        for name in SOCKETS:
            with over(tmp_path / name) as http:
                assert http.get("/health").status_code == 200


def test_a_server_that_cannot_start_leaves_no_file(tmp_path):
    """A mistake that shows after the socket is made ends with the socket removed."""
    with serving("--socket-dir", str(tmp_path), "--model", str(tmp_path / "nowhere")) as server:
        server.wait_for("listening")
        assert server.ended() == EX_CONFIG
    assert not [path for path in tmp_path.iterdir() if path.is_socket()]


# What is in the way


def test_a_living_servers_socket_is_not_taken(tmp_path):
    """The second server ends with EX_CONFIG and says why; the first one goes on, at its socket."""
    with stub(socket_dir=tmp_path) as first:
        first.ready_url()
        with stub(socket_dir=tmp_path) as second:
            assert second.ended() == EX_CONFIG
            assert len(second.lines) == 1
            assert str(tmp_path / "rest.sock") in second.lines[0]
            assert "another server" in second.lines[0]
        with over(tmp_path / "rest.sock") as http:
            assert http.get("/health").status_code == 200


def test_a_busy_servers_socket_is_not_taken(tmp_path):
    """A server that accepts nobody at the moment lives all the same."""
    path = tmp_path / "rest.sock"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(str(path))
        busy.listen(0)
        first.connect(str(path))
        with pytest.raises(ConfigError, match="another server"):
            bind(alone(tmp_path), None)
        assert path.is_socket()


def test_of_many_that_start_at_once_one_listens(tmp_path):
    """They see each other, though the file of a dead server is in their way."""
    leave_behind(tmp_path / "rest.sock")

    def attempt(_):
        try:
            return bind(alone(tmp_path), None)
        except ConfigError:
            return None

    with ThreadPoolExecutor(8) as pool:
        made = [listeners for listeners in pool.map(attempt, range(8)) if listeners]
    assert len(made) == 1
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "rest.sock"))
    close(made[0])


@pytest.mark.parametrize("what", ["file", "directory", "link"])
def test_other_files_are_not_touched(tmp_path, what):
    """Something else of that name is an error that names it, and stays as it was."""
    path = tmp_path / "rest.sock"
    if what == "file":
        path.write_text("mine", encoding="ascii")
    elif what == "directory":
        path.mkdir()
    else:
        (tmp_path / "mine").write_text("mine", encoding="ascii")
        path.symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"rest\.sock is in the way"):
        bind(alone(tmp_path), None)
    assert path.is_dir() if what == "directory" else path.read_text(encoding="ascii") == "mine"


def test_a_successors_file_is_not_removed(tmp_path):
    """A server that stops late leaves the file that another one has put in its place."""
    old = bind(alone(tmp_path), None)
    for name in SOCKETS:
        (tmp_path / name).unlink()
    new = bind(alone(tmp_path), None)
    close(old)
    assert all((tmp_path / name).is_socket() for name in SOCKETS)
    close(new)
    assert not list(tmp_path.iterdir())


def test_a_directory_is_made_for_owner_and_group(tmp_path):
    """Where it is missing; one that is there keeps its mode."""
    listeners = bind(alone(tmp_path / "a" / "b"), None)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o750
    close(listeners)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tcp": False}, ["nothing to listen on", "socket_dir"]),
        ({"socket_dir": Path(__file__)}, ["test_sockets.py"]),
        ({"socket_dir": Path("a" * 200)}, ["a" * 200, "rest.sock", "too long"]),
    ],
    ids=["nothing", "a file", "too long"],
)
def test_what_cannot_be_is_said(tmp_path, monkeypatch, settings, words):
    """Each mistake names the setting or the file, and no port stays open behind it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        bind(ServerConfig(**{"port": 0, **settings}), None)
    assert all(word in refusal.value.message for word in words), refusal.value.message
    assert not psutil.Process().net_connections("tcp")


def test_the_variable_of_hero_names_the_directory_above():
    """Its sockets lie in a directory of the service's name below $PATH_SOCKETS, with its preset or without."""
    for preset in ("hero-embedder-provider", None):
        settings = config.load(preset=preset, env={"PATH_SOCKETS": "/run/hero/"}, flags={})
        assert settings.server.socket_dir == Path("/run/hero/hero_embedder_provider")
        assert config.load(preset=preset, env={}, flags={}).server.socket_dir is None
    both = {"PATH_SOCKETS": "/run/hero", "QUIVER_SOCKET_DIR": "/run/mine"}
    assert config.load(env=both, flags={}).server.socket_dir == Path("/run/mine")
