"""HTTPS: who is served, what the certificate is, and how it changes under a server that goes on."""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from certificates import Authority, Pair, openssl
from conftest import listening
from faults.servers import importable, stub
from quiver import config
from quiver.api.tls import Certificate
from quiver.config import ServerConfig, TlsConfig
from quiver.errors import ConfigError
from server_process import clean_environment

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="the certificates are made by openssl")
EX_CONFIG = 78
CLIENTS = 4
NOTICED_SECONDS = 5.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """Return an authority that the clients trust."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Return an authority that nobody has heard of."""
    return Authority(tmp_path_factory.mktemp("stranger"), "Stranger")


@pytest.fixture(scope="module")
def pair(authority):
    """Return the server's certificate."""
    return authority.sign("server")


@pytest.fixture
def mutable(authority, pair, tmp_path):
    """Return files of a certificate that a test may change, and another one to put there."""
    files = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.copy_to(files)
    return files, authority.sign(f"new-{tmp_path.name}")


def port_of(url):
    """Return the port of a URL."""
    return int(url.rpartition(":")[2])


def handshake(url, context):
    """Open a connection; return its TLS socket."""
    plain = socket.create_connection(("127.0.0.1", port_of(url)), timeout=5)
    try:
        return context.wrap_socket(plain, server_hostname="localhost")
    except BaseException:
        plain.close()
        raise


def shown(url, context):
    """Return the certificate that a new connection sees."""
    with handshake(url, context) as connection:
        return connection.getpeercert(binary_form=True)


async def ask(url, context, text="a"):
    """Ask for a vector over a connection of its own."""
    async with httpx.AsyncClient(base_url=url, verify=context, timeout=10) as http:
        return await http.post("/v1/embeddings", json={"input": text})


# Who is served


async def test_a_client_that_trusts_the_authority_is_served(authority, pair):
    """Over HTTPS replies are those of HTTP, in TLS 1.3, by HTTP/1.1, and at the URL that the server says."""
    async with listening(tls=pair.settings()) as url:
        assert url.startswith("https://")
        reply = await ask(url, authority.client())
        assert (reply.status_code, len(reply.json()["data"])) == (200, 1)
        context = authority.client()
        context.set_alpn_protocols(["h2", "http/1.1"])
        with await asyncio.to_thread(handshake, url, context) as connection:
            assert (connection.version(), connection.selected_alpn_protocol()) == ("TLSv1.3", "http/1.1")


@pytest.mark.parametrize(
    ("version", "is_served"), [("TLSv1_3", True), ("TLSv1_2", True), ("TLSv1_1", False), ("TLSv1", False)]
)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_old_protocols_are_not_spoken(authority, pair, version, is_served):
    """TLS 1.2 and 1.3 are, and a client that has nothing newer than 1.1 is refused."""
    context = authority.client()
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # the client itself would take them
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    async with listening(tls=pair.settings()) as url:
        with contextlib.nullcontext() if is_served else pytest.raises((ssl.SSLError, ConnectionError)):
            assert await asyncio.to_thread(shown, url, context) == pair.der()


async def test_a_client_that_trusts_another_authority_leaves(stranger, pair, authority):
    """It does not take the certificate, and the next one is served."""
    async with listening(tls=pair.settings()) as url:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask(url, stranger.client())
        assert (await ask(url, authority.client())).status_code == 200


async def test_plain_http_on_the_port_is_cut(authority, pair):
    """Who speaks HTTP there gets no answer that could be taken for one, and disturbs nobody."""
    async with listening(tls=pair.settings()) as url:
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.TransportError):
                await http.get(url.replace("https", "http") + "/health")
        assert (await ask(url, authority.client())).status_code == 200


async def test_garbage_in_the_handshake_is_cut(authority, pair):
    """Bytes that are no TLS end their connection alone."""
    async with listening(tls=pair.settings()) as url:
        for garbage in (b"\x00" * 64, b"\x16\x03\x01\x40\x00" + b"\xff" * 64, b"\x16\x03\x01\xff\xff"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
            writer.write(garbage)
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 5)
            writer.close()
        assert (await ask(url, authority.client())).status_code == 200


# Clients' certificates


async def test_a_client_certificate_is_asked_for_where_an_authority_is_named(authority, stranger, pair):
    """Who has a good one is served; who has none, or one of another authority, is not."""
    good, foreign = authority.sign("client"), stranger.sign("client")
    async with listening(tls=pair.settings(tls_client_ca=authority.own.cert)) as url:
        assert (await ask(url, authority.client(good))).status_code == 200
        for bad in (None, foreign):
            with pytest.raises(httpx.TransportError):
                await ask(url, authority.client(bad))
        assert (await ask(url, authority.client(good))).status_code == 200


async def test_without_an_authority_nobody_is_asked_for_a_certificate(authority, stranger, pair):
    """Negative control: the same clients are served by a server that names none."""
    async with listening(tls=pair.settings()) as url:
        for own in (None, stranger.sign("client")):
            assert (await ask(url, authority.client(own))).status_code == 200


# Another certificate


class Load:
    """Clients that ask without a pause, each request over a new connection or over one that it keeps."""

    def __init__(self, url, context):
        self.statuses = []
        self.failures = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, context, i % 2 == 0)) for i in range(CLIENTS)]

    def _ask(self, url, context, keeps):
        with httpx.Client(base_url=url, verify=context, timeout=10) as kept:
            while not self._stop.is_set():
                try:
                    if keeps:
                        reply = kept.post("/v1/embeddings", json={"input": "a"})
                    else:
                        reply = httpx.post(f"{url}/v1/embeddings", json={"input": "a"}, verify=context, timeout=10)
                    self.statuses.append(reply.status_code)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def until_shown(url, context, wanted):
    """Wait until new connections see a certificate."""
    ends = time.monotonic() + NOTICED_SECONDS
    while shown(url, context) != wanted:
        assert time.monotonic() < ends, "the server still shows another certificate"
        time.sleep(0.05)


def test_a_signal_loads_another_certificate_under_load(authority, mutable):
    """After SIGHUP new connections see the new certificate, open ones go on, and not one request fails."""
    files, new = mutable
    context = authority.client()
    with stub(**files.arguments()) as server:
        url = server.ready_url()
        old = files.der()
        with Load(url, context) as load, handshake(url, context) as kept:
            assert kept.getpeercert(binary_form=True) == old
            time.sleep(0.5)
            new.copy_to(files)
            server.signal(signal.SIGHUP)
            server.wait_for("the certificate is loaded anew")
            assert shown(url, context) == new.der() != old
            time.sleep(0.5)
            kept.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
            assert kept.recv(100).startswith(b"HTTP/1.1 200")
        assert load.failures == []
        assert set(load.statuses) == {200}
        assert len(load.statuses) > 20


def test_a_request_that_fails_is_seen(authority, pair):
    """Negative control of the above: the same load over a server that is killed has failures."""
    with stub(**pair.arguments()) as server:
        url = server.ready_url()
        with Load(url, authority.client()) as load:
            time.sleep(0.3)
            server.signal(signal.SIGKILL)
            server.ended()
            time.sleep(0.2)
    assert load.failures


def test_files_that_change_are_noticed_without_a_signal(authority, mutable):
    """Within seconds the new certificate is shown."""
    files, new = mutable
    with stub(**files.arguments()) as server:
        url = server.ready_url()
        new.copy_to(files)
        until_shown(url, authority.client(), new.der())


@pytest.mark.parametrize("what", ["garbage", "missing", "another's key"])
def test_a_broken_new_certificate_leaves_the_old_one(authority, mutable, what):
    """The log says what is wrong, connections see the old certificate as before, and once it is mended the new one."""
    files, new = mutable
    old = files.der()
    with stub(**files.arguments()) as server:
        url = server.ready_url()
        if what == "garbage":
            files.cert.write_text("no certificate", encoding="ascii")
        elif what == "missing":
            files.cert.unlink()
        else:
            shutil.copy(new.cert, files.cert)
        server.signal(signal.SIGHUP)
        said = server.wait_for("the certificate stays as it was")
        assert (said["level"], str(files.cert) in said["why"]) == ("error", True)
        for _ in range(3):
            assert shown(url, authority.client()) == old
        new.copy_to(files)
        server.signal(signal.SIGHUP)
        server.wait_for("the certificate is loaded anew")
        assert shown(url, authority.client()) == new.der()


def test_a_certificate_is_not_taken_before_its_key(mutable):
    """Files that changed are loaded only once they have rested for a look, and a look at the same ones says no."""
    files, new = mutable
    certificate = Certificate(files.settings())
    assert not certificate.has_changed()
    shutil.copy(new.cert, files.cert)
    assert not certificate.has_changed()
    shutil.copy(new.key, files.key)
    assert not certificate.has_changed()
    assert certificate.has_changed()
    certificate.reload()
    assert not certificate.has_changed()


def test_clients_authorities_change_too(authority, stranger, pair, tmp_path):
    """Whose certificates are good is read again with the rest."""
    authorities = tmp_path / "clients.pem"
    shutil.copy(authority.own.cert, authorities)
    ours, theirs = authority.sign("client"), stranger.sign("client")

    def is_let_in(url, own):
        try:
            return httpx.get(f"{url}/health", verify=authority.client(own)).status_code == 200
        except httpx.TransportError:
            return False

    with stub(**pair.arguments(), tls_client_ca=authorities) as server:
        url = server.ready_url()
        assert [is_let_in(url, own) for own in (ours, theirs)] == [True, False]
        shutil.copy(stranger.own.cert, authorities)
        server.signal(signal.SIGHUP)
        server.wait_for("the certificate is loaded anew")
        assert [is_let_in(url, own) for own in (ours, theirs)] == [False, True]


# Limits


async def read_until_cut(reader):
    """Return how long a connection lives from now."""
    start = time.monotonic()
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), 10)
    return time.monotonic() - start


@pytest.mark.parametrize("begun", [b"", b"\x16\x03\x01\x02\x00\x01\x00"])
def test_a_handshake_that_does_not_end_is_cut(authority, pair, begun):
    """Who connects and says nothing, or half a hello, is gone after `header_seconds`."""

    async def wait(url):
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        writer.write(begun)
        seconds = await read_until_cut(reader)
        writer.close()
        return seconds

    with stub(**pair.arguments(), header_seconds=1) as server:
        url = server.ready_url()
        assert 0.8 < asyncio.run(wait(url)) < 3
        assert httpx.get(f"{url}/health", verify=authority.client()).status_code == 200


@pytest.mark.parametrize(
    "begun",
    [b"", b"POST /v1/embeddings HTTP/1.1\r\nx-a: ", b"POST /v1/embeddings HTTP/1.1\r\ncontent-length: 9\r\n\r\na"],
)
def test_a_slow_request_is_cut_as_without_tls(authority, pair, begun):
    """A client that says nothing after the handshake, half a head or half a body, is gone in time."""

    async def wait(url):
        context = authority.client()
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url), ssl=context)
        writer.write(begun)
        seconds = await read_until_cut(reader)
        writer.close()
        return seconds

    with stub(**pair.arguments(), header_seconds=1, body_seconds=1) as server:
        assert 0.8 < asyncio.run(wait(server.ready_url())) < 3


BIG = b'{"model": "stub/wide", "input": [%s]}' % b",".join(b'"%d"' % i for i in range(400))
WIDE = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%s" % (len(BIG), BIG)
"""What has a reply of nine megabytes: more than two sockets hold."""


def test_a_reply_that_nobody_reads_is_cut(authority, pair):
    """A client that takes nothing of its reply is gone after `write_seconds`, and one that reads has all of it."""

    def connected(url, pid):
        return [c for c in pid.net_connections("tcp") if c.status == "ESTABLISHED" and c.laddr.port == port_of(url)]

    with stub(models=4, **pair.arguments(), write_seconds=1) as server:
        url = server.ready_url()
        process = psutil.Process(server.process.pid)
        with handshake(url, authority.client()) as silent:
            silent.sendall(WIDE)
            time.sleep(0.7)
            assert connected(url, process), "it is cut before its time"
            ends = time.monotonic() + 6
            while connected(url, process) and time.monotonic() < ends:
                time.sleep(0.1)
            assert not connected(url, process)
        reply = httpx.post(f"{url}/v1/embeddings", content=BIG, verify=authority.client(), timeout=30)
        assert (reply.status_code, len(reply.json()["data"])) == (200, 400)


# The end


def test_a_server_with_idle_clients_ends_soon(authority, pair):
    """Clients that keep their connections do not keep the server up, and what is at work is answered."""
    with stub(**pair.arguments(), behave={"latency_seconds": 1}) as server:
        url = server.ready_url()
        with httpx.Client(base_url=url, verify=authority.client()) as idle:
            assert idle.get("/health").status_code == 200
            asked = []
            working = threading.Thread(
                target=lambda: asked.append(
                    httpx.post(f"{url}/v1/embeddings", json={"input": "a"}, verify=authority.client(), timeout=10)
                )
            )
            working.start()
            time.sleep(0.3)
            start = time.monotonic()
            server.signal(signal.SIGTERM)
            assert server.ended() == 0
            assert time.monotonic() - start < 4
            working.join()
            assert asked[0].status_code == 200


def ask_until_refused(url, context, outcomes):
    """Ask over one new connection after the other until the port is closed; note how each ended."""
    body = b'{"input": "a"}'
    request = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    while True:
        try:
            with handshake(url, context) as connection:
                connection.sendall(request)
                outcomes.append(connection.recv(12)[9:])
        except ConnectionRefusedError:
            return
        except OSError as error:
            outcomes.append(repr(error))


def test_a_stop_loses_nobody_who_is_connected(authority, pair):
    """Whoever got a connection before the port was closed ends its handshake and has an answer."""
    outcomes = []
    with stub(**pair.arguments()) as server:
        url = server.ready_url()
        asking = [
            threading.Thread(target=ask_until_refused, args=(url, authority.client(), outcomes)) for _ in range(8)
        ]
        for thread in asking:
            thread.start()
        time.sleep(0.6)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
        for thread in asking:
            thread.join()
    assert len(outcomes) > 20
    assert set(outcomes) <= {b"200", b"503"}


# What cannot be used


def words_of(pair, stranger, tmp_path):
    """Return settings that are wrong, with what is said about them."""
    garbage, nowhere = tmp_path / "garbage.pem", tmp_path / "nowhere.pem"
    garbage.write_text("nothing", encoding="ascii")
    locked = tmp_path / "locked.key"
    openssl("ec", "-in", pair.key, "-aes256", "-passout", "pass:right", "-out", locked)
    other = stranger.sign("other")
    return {
        "no files": (TlsConfig(tls="on"), ["tls_cert"]),
        "no key": (TlsConfig(tls_cert=pair.cert), ["tls_key"]),
        "no certificate": (TlsConfig(tls_key=pair.key), ["tls_cert"]),
        "only clients": (TlsConfig(tls_client_ca=pair.cert), ["tls_cert"]),
        "missing": (TlsConfig(tls_cert=nowhere, tls_key=pair.key), ["tls_cert", str(nowhere), "No such file"]),
        "missing key": (TlsConfig(tls_cert=pair.cert, tls_key=nowhere), ["tls_key", str(nowhere), "No such file"]),
        "directory": (TlsConfig(tls_cert=tmp_path, tls_key=pair.key), ["tls_cert", "directory"]),
        "garbage": (TlsConfig(tls_cert=garbage, tls_key=pair.key), ["tls_cert", str(garbage)]),
        "garbage key": (TlsConfig(tls_cert=pair.cert, tls_key=garbage), ["tls_key", str(garbage)]),
        "mismatch": (TlsConfig(tls_cert=pair.cert, tls_key=other.key), [str(pair.cert), str(other.key), "not that of"]),
        "locked": (TlsConfig(tls_cert=pair.cert, tls_key=locked), [str(locked), "tls_key_password"]),
        "wrong password": (
            TlsConfig(tls_cert=pair.cert, tls_key=locked, tls_key_password=config.Secret("wrong")),
            [str(locked), "tls_key_password"],
        ),
        "clients missing": (pair.settings(tls_client_ca=nowhere), ["tls_client_ca", str(nowhere)]),
        "clients garbage": (pair.settings(tls_client_ca=garbage), ["tls_client_ca", str(garbage)]),
    }, TlsConfig(tls_cert=pair.cert, tls_key=locked, tls_key_password=config.Secret("right"))


def test_files_that_cannot_be_used_are_named(pair, stranger, tmp_path):
    """Each mistake is said at the start, with the setting and the file that it is about."""
    wrong, right = words_of(pair, stranger, tmp_path)
    for name, (settings, words) in wrong.items():
        with pytest.raises(ConfigError) as refusal:
            Certificate(settings)
        assert all(word in refusal.value.message for word in words), (name, refusal.value.message)
    Certificate(right)
    Certificate(pair.settings())


def test_a_server_whose_certificate_is_missing_does_not_start(tmp_path):
    """The process ends with EX_CONFIG after one line."""
    with stub(tls_cert=tmp_path / "none.pem", tls_key=tmp_path / "none.key") as server:
        assert server.ended() == EX_CONFIG
        assert len(server.lines) == 1
        assert str(tmp_path / "none.pem") in server.lines[0]


@pytest.mark.parametrize(
    ("env", "is_on"),
    [
        ({}, False),
        ({"SERVER_SSL_ENABLED": "true"}, True),
        ({"SERVER_SSL_ENABLED": "false", "TLS_SERVER_CERT_PATH": "a", "TLS_SERVER_KEY_PATH": "b"}, False),
        ({"TLS_SERVER_CERT_PATH": "a", "TLS_SERVER_KEY_PATH": "b"}, True),
        ({"SERVER_SSL_CERT_PATH": "a", "SERVER_SSL_KEY_PATH": "b"}, True),
        ({"QUIVER_TLS": "on"}, True),
        ({"QUIVER_TLS": "off", "QUIVER_TLS_CERT": "a"}, False),
        ({"TLS_CA_CERT_PATH": "a", "CLIENT_MTLS_ENABLED": "true", "TLS_CLIENT_CERT_PATH": "b"}, False),
    ],
)
def test_tls_is_on_where_it_is_asked_for(env, is_on):
    """By the switch, or by a file where the switch says nothing; names of a client's side are none of a server's."""
    assert config.load(env=env, flags={}).tls.is_on is is_on


@pytest.mark.parametrize(("text", "is_on"), [("true", True), ("false", False), ('"on"', True), ('"auto"', False)])
def test_a_file_may_say_true(tmp_path, text, is_on):
    """In quiver.toml the switch is a word or a truth value."""
    file = tmp_path / "quiver.toml"
    file.write_text(f"[tls]\ntls = {text}\n", encoding="ascii")
    assert config.load(file=file, env={}, flags={}).tls.is_on is is_on


# Who can read along


def test_nobody_else_is_reached_unless_it_is_asked_for():
    """Without a preset or a word in the environment, a server listens to its own machine alone."""
    assert config.load(env={}, flags={}).server.host == ServerConfig().host == "127.0.0.1"
    assert config.load(env={"HOST": "0.0.0.0"}, flags={}).server.host == "0.0.0.0"  # noqa: S104


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"host": "0.0.0.0"}, True),  # noqa: S104
        ({"host": "0.0.0.0", "auth": "off"}, True),  # noqa: S104
        ({"host": "0.0.0.0", "api_key": "a key", "auth": "auto"}, False),  # noqa: S104
        ({"host": "0.0.0.0", "auth": "required"}, False),  # noqa: S104
        ({"host": "127.0.0.1"}, False),
        ({"host": "0.0.0.0", "tls": "on"}, False),  # noqa: S104
    ],
)
def test_an_open_server_is_warned_about(pair, tmp_path, settings, warns):
    """Who listens on the network with neither a key nor TLS reads so in the log."""
    tls = pair.arguments() if "tls" in settings else {}
    with stub(**settings, **tls, data_dir=tmp_path) as server:
        server.ready_url()
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
        assert any("anyone on the network may call" in line for line in server.lines) is warns


# The page


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page calls curl")
def test_the_commands_of_the_page_work(tmp_path):
    """What docs/security.md tells to type makes certificates, and servers that answer."""
    page = (Path(__file__).parent.parent / "docs" / "security.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [block.count("quiver serve") for block in blocks] == [0, 1, 1, 1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for block in blocks:
        commands = block.replace("quiver serve", f"'{sys.executable}' -m quiver serve").replace("8443", port)
        done = subprocess.run(  # noqa: S603  the page's own commands
            ["bash", "-euo", "pipefail", "-c", f"{commands}\nwait"],  # noqa: S607
            cwd=tmp_path, env=clean_environment(PYTHONPATH=importable()), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (block, done.stderr)
    assert len(json.loads((tmp_path / "reply.json").read_text(encoding="utf-8"))["data"]) == 1
