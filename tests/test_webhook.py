"""Webhooks: told once it is over, again if need be, and never at an address that is not to be called."""

import asyncio
import contextlib
import json
import socket

import pytest

from conftest import assembled
from fakes import hash_model
from quiver import webhook
from quiver.config import JobsConfig
from quiver.errors import InvalidInput
from test_runpod import ask, get, submit

PUBLIC = ("8.8.8.8", "2001:4860:4860::8888", "1.1.1.1")
PRIVATE = (
    "127.0.0.1",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",  # noqa: S104  an address that must be refused
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "ff02::1",
)


@contextlib.asynccontextmanager
async def listener(*statuses):
    """Be somebody who is told things: answers with one status after another, then 200; yields its URL and what came."""
    told, left = [], list(statuses)

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        told.append((head, json.loads(await reader.readexactly(length))))
        writer.write(f"HTTP/1.1 {left.pop(0) if left else 200} X\r\ncontent-length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/told?by=quiver", told


async def until(is_so, seconds=20):
    """Wait until something is so."""
    async with asyncio.timeout(seconds):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def calling(**more):
    """Return settings with which webhooks are called on this machine."""
    return {"jobs": JobsConfig(webhooks=True, webhooks_private=True, **more)}


@pytest.mark.parametrize("path", ["/run", "/runsync"])
async def test_a_webhook_is_told_what_status_shows(path):
    """The job as it stands, what it was given, and the webhook itself; once."""
    given = {"input": "to be"}
    async with listener() as (url, told), assembled(hash_model(), **calling()) as parts:
        _, reply = await ask(parts, path, {"input": given, "webhook": url})
        await until(lambda: told)
        status = await get(parts, f"/status/{reply['id']}")
        await asyncio.sleep(1.5)
    ((head, body),) = told
    assert head.startswith(b"POST /told?by=quiver HTTP/1.1\r\n")
    assert body == status | {"input": given, "webhook": url}
    assert body["status"] == "COMPLETED"


async def test_a_failure_is_told_too():
    """With its reason."""
    async with listener() as (url, told), assembled(hash_model(), **calling()) as parts:
        await submit(parts, {"input": "a", "model": "no such"}, webhook=url)
        await until(lambda: told)
    assert told[0][1]["status"] == "FAILED"
    assert "no such" in told[0][1]["error"]


async def test_a_webhook_is_off_unless_the_operator_says_so(parts):
    """The job is refused, and says why."""
    status, reply = await ask(parts, "/run", {"input": {"input": "a"}, "webhook": "https://example.com"})
    assert (status, "calls nobody back" in reply["error"]) == (400, True)


async def test_a_private_address_is_not_called():
    """Not by its number and not by a name for it; the job itself is done."""
    async with listener() as (url, told), assembled(hash_model(), jobs=JobsConfig(webhooks=True)) as parts:
        for address in (url, url.replace("127.0.0.1", "localhost")):
            job = await submit(parts, {"input": "a"}, webhook=address)
            assert (await get(parts, f"/status-sync/{job}"))["status"] == "COMPLETED"
        await asyncio.sleep(1.5)
    assert told == []


async def test_whoever_does_not_take_it_is_told_again():
    """A status that is none of success, a redirect included, is no answer."""
    async with listener(500, 302) as (url, told):
        taken = [await webhook.post(url, b"{}", allow_private=True) for _ in range(3)]
    assert taken == [False, False, True]
    assert len(told) == 3


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_is_known_as_one(address):
    """Local, private and special ones, and those inside others."""
    assert not webhook.is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_known_as_one(address):
    """Negative control."""
    assert webhook.is_public(address)


@pytest.mark.parametrize(
    "url",
    ["ftp://a/", "file:///etc/passwd", "http://", "a", "http://a b/", "http://[::1", "http://a:99999/", "http://ä/"],
)
def test_what_is_no_address_is_refused(url):
    """Before the job is taken."""
    with pytest.raises(InvalidInput, match="webhook is no URL"):
        webhook.check_address(url)


async def test_nobody_there_is_no_accident():
    """An address at which nobody listens takes nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert not await webhook.post(f"http://127.0.0.1:{taken.getsockname()[1]}/", b"{}", allow_private=True)
