"""The same request again, byte for byte: the same reply, at the price of a reply that nobody computes."""

import asyncio
import base64
import contextlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from conftest import assembled
from fakes import HashBackend, fake_model
from quiver.api.call import Known, Reply
from quiver.api.openai import OPENAI
from quiver.api.replies import ENTRY_BYTES, Head, Replies, Room
from quiver.api.server import HttpServer
from quiver.app import App
from quiver.billing import Billing
from quiver.config import AccountsConfig, CacheConfig, Secret, ServerConfig
from quiver.engine.model import WarmUp
from quiver.gate import Gate
from quiver.limits import Limiter
from quiver.register import Register
from quiver.telemetry.observer import Observer
from quiver.types import Floats, PackedBatch

CACHE = CacheConfig()
BODY = json.dumps({"input": "a", "encoding_format": "base64"}).encode()
END = b"GET /health/live HTTP/1.1\r\nconnection: close\r\n\r\n"
"""A request that ends its connection."""
OWN = ("x-request-id", "server-timing", "date", "openai-processing-ms")
"""Headers that differ from one reply to the next; `x-ratelimit-…` are left out of a repeated one."""


@contextlib.asynccontextmanager
async def listening_at(parts: App) -> AsyncIterator[HttpServer]:
    """Serve some parts."""
    config = replace(parts.config.server, port=0, drain_seconds=2.0, drain_delay_seconds=0)
    server = HttpServer(parts.main, config, parts.config.tls)
    running = asyncio.create_task(server.run_until_stopped())
    try:
        yield server
    finally:
        server.stop()
        await running


@contextlib.asynccontextmanager
async def served(model: Any = None, **sections: Any) -> AsyncIterator[tuple[App, str]]:
    """Run a server that keeps results; yields its parts and its URL."""
    async with assembled(model, **{"cache": CACHE, **sections}) as parts, listening_at(parts) as server:
        yield parts, server.url


def counted(parts: App, name: str) -> float:
    """Return a number of the metrics, over all labels."""
    lines = parts.service.observer.exposition().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}(\{{|\s)", line))


def repeated(parts: App) -> float:
    """Return how many inputs were answered by replies of before."""
    return counted(parts, "quiver_repeated_inputs_total")


def lasting(reply: httpx.Response) -> dict[str, str]:
    """Return the headers that the same request gets every time."""
    return {k: v for k, v in reply.headers.items() if k not in OWN and not k.startswith("x-ratelimit-")}


async def post(url: str, body: bytes = BODY, times: int = 1, **headers: str) -> list[httpx.Response]:
    """Send a request so many times over one connection."""
    sent = {"content-type": "application/json", **headers}
    async with httpx.AsyncClient(base_url=url) as http:
        return [await http.post("/v1/embeddings", content=body, headers=sent) for _ in range(times)]


async def raw(url: str, *pieces: bytes) -> bytes:
    """Send bytes piece by piece, and read until the server closes."""
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.05)
    data = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return data


async def test_the_third_of_three_equal_requests_is_the_second_again():
    """The first is computed, the second finds its results known, and every later one gets the second's very bytes."""
    async with served() as (parts, url):
        first, second, *others = await post(url, times=5)

        assert repeated(parts) == 3
        for other in others:
            assert other.content == second.content == first.content
            assert lasting(other) == lasting(second)
        assert len({reply.headers["x-request-id"] for reply in (second, *others)}) == 4
        assert min(float(reply.headers["server-timing"].removeprefix("total;dur=")) for reply in others) < 0.1


async def test_repeated_replies_count_as_requests():
    """A request that is answered so is in the metrics like any other, and its inputs are told apart."""
    async with served() as (parts, url):
        await post(url, times=5)

        assert counted(parts, "quiver_requests_total") == 5
        assert counted(parts, "quiver_request_seconds_count") == 5
        assert counted(parts, "quiver_request_inputs_count") == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"body": BODY + b" "},
        {"body": BODY.replace(b'"a"', b'"b"')},
        {"accept": "application/json"},
        {"x-request-timeout": "9"},
    ],
)
async def test_whatever_differs_is_another_request(changed: dict[str, Any]):
    """One more byte in the body, or one more header, is answered by itself."""
    async with served() as (parts, url):
        await post(url, times=3)
        assert repeated(parts) == 1
        (other,) = await post(url, **changed)

        assert other.status_code == 200
        assert repeated(parts) == 1


@pytest.mark.parametrize(
    "headers",
    [{"x-request-id": "mine"}, {"origin": "https://a.example"}, {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}],
)
async def test_a_reply_that_is_the_request_s_own_is_never_repeated(headers: dict[str, str]):
    """An id that the client gave, a page's origin and a trace are answered for each request anew."""
    async with served(server=ServerConfig(cors_origins=("https://a.example",))) as (parts, url):
        replies = await post(url, times=4, **headers)

        assert repeated(parts) == 0
        if "x-request-id" in headers:
            assert {reply.headers["x-request-id"] for reply in replies} == {"mine"}


async def test_errors_are_not_repeated():
    """What was refused may be let in the next time."""
    async with served() as (parts, url):
        replies = await post(url, json.dumps({"input": "a", "model": "nobody"}).encode(), times=3)

        assert {reply.status_code for reply in replies} == {404}
        assert repeated(parts) == 0


async def test_a_request_of_several_texts_waits_until_all_are_known():
    """As long as one of its results must be computed, a request is read anew."""
    async with served() as (parts, url):
        await post(url, times=2)
        both = json.dumps({"input": ["a", "c"]}).encode()
        await post(url, both, times=2)
        assert repeated(parts) == 0
        await post(url, both)
        assert repeated(parts) == 2


async def test_another_model_of_the_same_name_gives_its_own_vectors():
    """Once a model has come or gone, nothing that was kept before is given again."""

    class Negated(HashBackend):
        def forward(self, batch: PackedBatch) -> Floats:
            return -super().forward(batch)

    async with served() as (parts, url):
        before = (await post(url, times=3))[-1].json()["data"][0]["embedding"]
        name = parts.config.models.model[0]
        await parts.engine.replicas.remove(name)
        parts.engine.replicas.add(name, fake_model(Negated()), WarmUp(fingerprint="of other weights"))
        after = (await post(url))[0].json()["data"][0]["embedding"]

        assert repeated(parts) == 1
        first, second = (np.frombuffer(base64.b64decode(vector), "<f4") for vector in (before, after))
        np.testing.assert_array_equal(first, -second)


@pytest.mark.parametrize(
    "sections",
    [
        {"cache": CacheConfig(cache_entries=0)},
        {"cache": CacheConfig(cache_scope="caller")},
        {"cache": CacheConfig(cache_scope="caller"), "server": ServerConfig(api_key=Secret("k"))},
    ],
)
async def test_a_server_that_keeps_no_results_for_others_repeats_no_reply(sections: dict[str, Any]):
    """Neither where nothing is kept, nor where each address has its own."""
    async with served(**sections) as (parts, url):
        replies = await post(url, times=4, authorization="Bearer k")

        assert [reply.status_code for reply in replies] == [200] * 4
        assert repeated(parts) == 0


async def test_a_body_may_come_in_pieces():
    """A request that is held until it is whole is answered alike, however its bytes arrive."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(
        BODY
    )
    async with served() as (parts, url):
        whole = await raw(url, *([head + b"\r\n" + BODY] * 3), END)
        assert repeated(parts) == 1
        pieces = (head + b"\r\n", BODY[:7], BODY[7:], END)
        apart = await raw(url, *pieces)

        assert repeated(parts) == 2
        assert whole.count(b"HTTP/1.1 200 OK") == 4
        assert apart.count(b"HTTP/1.1 200 OK") == 2
        assert re.findall(rb'"embedding":"[^"]+"', apart) == re.findall(rb'"embedding":"[^"]+"', whole)[:1]


async def test_pipelined_requests_are_answered_in_their_order():
    """No repeated reply overtakes one that is still computed."""
    requests = [json.dumps({"input": text, "encoding_format": "base64"}).encode() for text in ("a", "b")]
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    known, new = (head % len(body) + body for body in requests)
    async with served() as (_, url):
        first = re.findall(rb'"embedding":"[^"]+"', await raw(url, known, known, known, END))
        both = re.findall(rb'"embedding":"[^"]+"', await raw(url, new + known + new + known, END))

        assert len(set(first)) == 1
        assert len(both) == 4
        assert both[1] == both[3] == first[0]
        assert both[0] == both[2] != first[0]


async def test_a_held_body_has_its_time_limit():
    """A body that does not come in time is answered 408, held or not."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(BODY)
    async with served(server=ServerConfig(body_seconds=0.3)) as (parts, url):
        assert (await raw(url, head + BODY[:1])).startswith(b"HTTP/1.1 408")
        assert (await raw(url, head + BODY, head + BODY, head + BODY[:1])).count(b"HTTP/1.1 408") == 1
        assert (await raw(url, head + BODY, head, BODY, END)).count(b"HTTP/1.1 200") == 3
        assert repeated(parts) == 2


async def test_a_held_request_is_not_taken_for_an_idle_connection():
    """A client that was silent for almost as long as it may be, and then sends its body late, is answered all the same."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(BODY)
    async with assembled(None, cache=CACHE) as parts, listening_at(parts) as server:
        await raw(server.url, head + BODY, head + BODY, END)
        reader, writer = await asyncio.open_connection(urlsplit(server.url).hostname, urlsplit(server.url).port)
        await asyncio.sleep(0.05)
        (connection,) = server.server_state.connections
        connection.timeout_keep_alive = 1
        for piece, pause in ((head + BODY, 0.7), (head, 0.7), (BODY, 0.1), (END, 0)):
            writer.write(piece)
            await asyncio.sleep(pause)
        assert (await asyncio.wait_for(reader.read(), 5)).count(b"HTTP/1.1 200") == 3
        writer.close()


@pytest.mark.parametrize("before", [b"\r\n\r\n", b"\r\n", b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"])
async def test_what_stands_before_a_request_is_not_taken_for_its_head(before: bytes):
    """Lines that HTTP lets stand there, or another request: who sends them with the body alone does not get the reply."""
    request = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
    async with served() as (parts, url):
        replies = await raw(url, *([before + request] * 3), END)
        assert replies.count(b'"embedding":"') == 3
        alone = await raw(url, before + BODY)

        assert b"embedding" not in alone
        assert repeated(parts) == 0


async def test_what_comes_behind_a_request_at_once_is_answered_too():
    """A reply that came before answers the bytes of one request, never those of two."""
    request = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
    async with served() as (parts, url):
        replies = await raw(url, request, request, request, request + request, request + END)

        assert repeated(parts) == 1
        assert replies.count(b'"embedding":"') == 6
        assert replies.endswith(b"}")


async def test_who_asks_for_the_end_of_the_connection_gets_it():
    """A request that says `connection: close` is not repeated, and its connection ends."""
    request = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
    async with served() as (parts, url):
        for _ in range(3):
            assert (await raw(url, request % (len(BODY), BODY))).startswith(b"HTTP/1.1 200 OK")
        assert repeated(parts) == 0


HEAD = Head((OPENAI, OPENAI.routes[0]), b"POST / HTTP/1.1\r\ncontent-length: 1\r\n\r\n", num_bytes=40)
KNOWN = Reply(200, b"x" * 100, known=Known("a", 1, 3))


def kept(folder: Path, max_entries: int = 3, max_bytes: int = 1 << 20, **accounts: Any) -> Replies:
    """Return an empty store of a server that asks nobody for a key."""
    config = AccountsConfig(auth="off", **accounts)
    register = Register(config, folder)
    gate = Gate(Secret(""), register, Limiter(), config)
    return Replies(gate, Billing(register), Observer(), Room(max_entries, max_bytes), age=lambda: 0)


def figure(replies: Replies, name: str) -> float:
    """Return one of a store's numbers."""
    return next(sum(f.values.values()) for f in replies.figures() if f.name == name)


def test_what_was_used_longest_ago_goes_first(tmp_path):
    """Replies are kept in bounds, of their number and of their bytes."""
    few, small = kept(tmp_path), kept(tmp_path, max_entries=100, max_bytes=3 * (ENTRY_BYTES + 100))
    for replies in (few, small):
        for number in range(10):
            replies.keep(HEAD, b"%d" % number, KNOWN)
            assert figure(replies, "quiver_repeated_replies") <= 3
        found = [replies.repeat(HEAD.data + b"%d" % n, "a", ()) is not None for n in range(10)]
        assert found == [False] * 7 + [True] * 3
    assert figure(small, "quiver_repeated_bytes") <= 3 * (ENTRY_BYTES + 100)


def test_each_address_has_its_own_rate(tmp_path):
    """Two that send the same bytes take from two buckets."""
    replies = kept(tmp_path, rate_per_second=0.01, rate_burst=2)
    replies.keep(HEAD, b"1", KNOWN)
    told = [replies.repeat(HEAD.data + b"1", peer, ()) is not None for peer in ("a", "a", "a", "b", "b", "b")]
    assert told == [True, True, False] * 2
