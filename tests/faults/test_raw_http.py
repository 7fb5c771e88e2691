"""Whatever bytes arrive: a status that is the client's fault, or a clean close; never a hang, a 5xx or a second reply."""

import asyncio
import contextlib
import gzip
import random
import time
from dataclasses import dataclass

import pytest

from faults.load import CUT, HANGS, Pool, embed, get
from faults.servers import careless, reply, stub

PATIENCE_SECONDS = 5.0
MORE_SECONDS = 0.1
"""How long a second reply would take."""
AT_ONCE = 8
GROWN_BYTES = 24 << 20
"""What the whole corpus may leave behind at its first run; a second one leaves a third of it."""
SETTINGS = {"header_seconds": 1, "body_seconds": 2, "max_body_bytes": 1 << 20}
GOOD = b'{"input":["a"]}'
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nhost: quiver\r\ncontent-type: application/json\r\n"
SMUGGLED = b"GET /health/live HTTP/1.1\r\nhost: quiver\r\n\r\n"


def body(content, *more):
    """Return a request with a body and its true length."""
    return HEAD + b"".join(line + b"\r\n" for line in more) + b"content-length: %d\r\n\r\n" % len(content) + content


def raw(*lines, content=b""):
    """Return a request with headers and a body as they are given."""
    return HEAD + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + content


def texts(json_text):
    """Return a request whose input is some JSON."""
    return body(b'{"input":' + json_text + b"}")


REQUESTS = {
    # Two lengths, or one that is none: what smuggles a request past a proxy
    "cl-and-te": raw(b"content-length: 5", b"transfer-encoding: chunked", content=b"0\r\n\r\n" + SMUGGLED),
    "te-and-cl": raw(b"transfer-encoding: chunked", b"content-length: 5", content=b"0\r\n\r\n" + SMUGGLED),
    "two-lengths": raw(b"content-length: 15", b"content-length: 3", content=GOOD + SMUGGLED),
    "length-list": raw(b"content-length: 15, 15", content=GOOD),
    "length-plus": raw(b"content-length: +15", content=GOOD),
    "length-minus": raw(b"content-length: -1", content=GOOD),
    "length-hex": raw(b"content-length: 0xf", content=GOOD),
    "length-empty": raw(b"content-length:", content=GOOD),
    "length-huge": raw(b"content-length: 99999999999999999999999", content=GOOD),
    "length-large": raw(b"content-length: 9999999999", content=GOOD),
    "te-unknown": raw(b"transfer-encoding: xchunked", content=b"0\r\n\r\n" + SMUGGLED),
    "te-twice": raw(b"transfer-encoding: chunked, chunked", content=b"0\r\n\r\n"),
    "te-space": raw(b"transfer-encoding : chunked", content=b"0\r\n\r\n" + SMUGGLED),
    "te-folded": raw(b"transfer-encoding:\r\n chunked", content=b"0\r\n\r\n" + SMUGGLED),
    # Chunks
    "chunk-not-hex": raw(b"transfer-encoding: chunked", content=b"zz\r\nab\r\n0\r\n\r\n"),
    "chunk-minus": raw(b"transfer-encoding: chunked", content=b"-1\r\nab\r\n0\r\n\r\n"),
    "chunk-huge": raw(b"transfer-encoding: chunked", content=b"ffffffffffffffffff\r\nab"),
    "chunk-too-long": raw(b"transfer-encoding: chunked", content=b"2\r\nabc\r\n0\r\n\r\n"),
    "chunk-extension": raw(b"transfer-encoding: chunked", content=b"1;" + b"x" * 70_000 + b"\r\na\r\n0\r\n\r\n"),
    "chunks-many": raw(b"transfer-encoding: chunked", content=b"1\r\n \r\n" * 100_000 + b"0\r\n\r\n"),
    "chunks-too-large": raw(b"transfer-encoding: chunked", content=(b"10000\r\n" + b" " * 65_536 + b"\r\n") * 20),
    # Headers
    "header-huge": raw(b"x-long: " + b"a" * 300_000),
    "headers-many": raw(*(b"x-%d: a" % i for i in range(20_000))),
    "header-nul": raw(b"x-nul: a\0b", b"content-length: 15", content=GOOD),
    "header-no-colon": raw(b"no colon here", content=GOOD),
    "header-bare-cr": raw(b"x-cr: a\rb", b"content-length: 15", content=GOOD),
    "header-empty-name": raw(b": a", content=GOOD),
    "header-not-ascii": raw(b"x-\xff\xfe: \xff", b"content-length: 15", content=GOOD),
    # The first line
    "line-long": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: q\r\n\r\n",
    "line-http-2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "line-http-9": b"GET / HTTP/9.9\r\n\r\n",
    "line-binary": bytes(range(256)) * 4,
    "line-tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "line-method": b"DANCE /v1/embeddings HTTP/1.1\r\nhost: q\r\n\r\n",
    "line-lower-case": b"post /v1/embeddings HTTP/1.1\r\nhost: q\r\n\r\n",
    "line-traversal": b"GET /../../../etc/passwd HTTP/1.1\r\nhost: q\r\n\r\n",
    "line-encoded-traversal": b"GET /%2e%2e/%2e%2e/etc/passwd%00 HTTP/1.1\r\nhost: q\r\n\r\n",
    "line-bad-percent": b"GET /%zz%f HTTP/1.1\r\nhost: q\r\n\r\n",
    "upgrade": raw(b"connection: upgrade", b"upgrade: websocket", b"content-length: 15", content=GOOD),
    # Cut short
    "half-line": b"POST /v1/emb",
    "half-headers": HEAD,
    "half-body": raw(b"content-length: 100", content=GOOD),
    "half-chunk": raw(b"transfer-encoding: chunked", content=b"ff\r\nabc"),
    "nothing": b"",
    # Bodies
    "gzip": body(gzip.compress(GOOD), b"content-encoding: gzip"),
    "gzip-bomb": body(gzip.compress(bytes(64 << 20)), b"content-encoding: gzip"),
    "gzip-unsaid": body(gzip.compress(GOOD)),
    "not-utf-8": texts(b'"\xff\xfe"'),
    "surrogate": texts(rb'"\ud800"'),
    "surrogate-key": body(rb'{"\ud800":1,"input":1}'),
    "nan": texts(b"NaN"),
    "infinity": texts(b"[1e999]"),
    "long-integer": texts(b"[" + b"9" * 5000 + b"]"),
    "deep": texts(b"[" * 250_000 + b"]" * 250_000),
    "deep-objects": texts(b'{"a":' * 100_000),
    "bom": body(b"\xef\xbb\xbf" + GOOD),
    "trailing": body(GOOD + b"x"),
    "nul": body(b"\0" * 100),
    "empty": body(b""),
    "null": body(b"null"),
    "a-number": body(b"1"),
    "not-closed": body(b'{"input":["a"'),
    "empty-text": texts(b'""'),
    "empty-list": texts(b"[]"),
    "mixed": texts(b'["a",1,[2],null]'),
    "booleans": texts(b"[true,false]"),
    "negative-ids": texts(b"[[-1]]"),
    "huge-ids": texts(b"[[99999999999999999999]]"),
    "100-000-texts": texts(b"[" + b",".join([b'"a"'] * 100_000) + b"]"),
    "long-text": texts(b'"' + b"." * 1_000_000 + b'"'),
    "too-large": texts(b'"' + b"." * 3_000_000 + b'"'),
}
"""What no server may answer with vectors."""

ALLOWED = {
    "duplicate-keys": (body(b'{"input":["a"],"input":["b"]}'), {200, 400}),
    "pipelined": (body(GOOD) * 3, {200}),
    "no-version": (b"GET /health/live\r\n\r\n", {200, 400, CUT}),
    "expect": (raw(b"expect: a-miracle", b"content-length: 15", content=GOOD), {200, 417}),
    "no-host": (b"GET /health/live HTTP/1.1\r\n\r\n", {200, 400}),
    "http-1.0": (b"GET /health/live HTTP/1.0\r\n\r\n", {200}),
    "absolute": (b"GET http://quiver/health/live HTTP/1.1\r\nhost: q\r\n\r\n", {200, 400, 404}),
    "odd-space": (b"GET  /health/live  HTTP/1.1\r\nhost: q\r\n\r\n", {200, 400, CUT}),
    "bare-newlines": (b"GET /health/live HTTP/1.1\nhost: q\n\n", {200, 400}),
}
"""What may be answered, and how."""


@dataclass(slots=True)
class Outcome:
    """The first status, how many replies there were, and whether anything came at all."""

    status: int
    replies: int
    seconds: float


async def exchange(port, data, *, half_close=False, patience=PATIENCE_SECONDS):
    """Send bytes and read until the server closes or says nothing more; tells what came."""
    start, said = time.perf_counter(), b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    closed = False
    try:
        writer.write(data)
        if half_close:
            writer.write_eof()
        with contextlib.suppress(TimeoutError):
            while part := await asyncio.wait_for(reader.read(1 << 16), MORE_SECONDS if said else patience):
                said += part
            closed = True
    except ConnectionError:
        closed = True
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)
    status = int(said[9:12]) if said.startswith(b"HTTP/1.") else CUT if closed else HANGS
    return Outcome(status, said.count(b"HTTP/1."), time.perf_counter() - start)


def port_of(url):
    """Return the port of a URL."""
    return int(url.rpartition(":")[2])


def fault_of(name, outcome):
    """Say what is wrong with how some bytes were answered, if anything is."""
    if outcome.status == HANGS:
        return f"{name}: neither a reply nor an end within {PATIENCE_SECONDS} s"
    if name in ALLOWED:
        return None if outcome.status in ALLOWED[name][1] else f"{name}: {outcome.status}"
    if outcome.status != CUT and not 400 <= outcome.status < 500:
        return f"{name}: {outcome.status}"
    return f"{name}: {outcome.replies} replies" if outcome.replies > 1 else None


async def faults_of(url, requests):
    """Send every request on a connection of its own, and a good one after each; returns what is wrong."""
    faults, places = [], asyncio.Semaphore(AT_ONCE)

    async def one(pool, name, data):
        async with places:
            outcome = await exchange(port_of(url), data)
            if fault := fault_of(name, outcome):
                faults.append(fault)
            next_one = await pool.ask(embed(["next"]))
            if next_one.status != 200:
                faults.append(f"after {name}: {next_one.status}")

    async with Pool(url) as pool:
        await asyncio.gather(*(one(pool, name, data) for name, data in requests.items()))
    return faults


@pytest.fixture(scope="module")
def server():
    """Run a stub with short limits."""
    with stub(**SETTINGS) as server:
        server.where = server.ready_url()
        yield server


EVERY = REQUESTS | {name: data for name, (data, _) in ALLOWED.items()}


async def test_every_request_of_the_corpus_is_answered_or_cut(server):
    """Each of them is refused as the client's fault or cut off, nothing hangs, no reply follows it, and memory stays."""
    assert await faults_of(server.where, EVERY) == []
    first = server.resident_bytes()
    assert await faults_of(server.where, EVERY) == []
    assert server.resident_bytes() - first < GROWN_BYTES / 3


@pytest.mark.parametrize(
    ("name", "statuses"),
    [
        ("gzip", {415}),
        ("gzip-bomb", {413, 415}),
        ("header-huge", {431}),
        ("headers-many", {431}),
        ("half-headers", {408}),
        ("half-body", {408}),
        ("length-large", {413}),
        ("too-large", {413}),
        ("chunks-too-large", {413}),
        ("cl-and-te", {400, CUT}),
        ("deep", {400}),
        ("surrogate", {400}),
    ],
)
async def test_a_refusal_says_why(server, name, statuses):
    """The status names the reason."""
    outcome = await exchange(port_of(server.where), REQUESTS[name])
    assert outcome.status in statuses


def damaged(rng):
    """Return a good request with some of its bytes changed, doubled or missing."""
    data = bytearray(
        rng.choice([body(GOOD), raw(b"transfer-encoding: chunked", content=b"f\r\n" + GOOD + b"\r\n0\r\n\r\n")])
    )
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randint(1, 6)]
            case 2:
                data[place:place] = rng.choice((b"\r\n", b"\0", b"\xff", b": ", b"0", b"\n"))
            case _:
                data[place:place] = data[place : place + rng.randint(1, 30)]
    return bytes(data)


@pytest.mark.parametrize("count", [150, pytest.param(5_000, marks=pytest.mark.faults)])
async def test_damaged_requests_are_answered_or_cut(server, count):
    """A good request with bytes changed, doubled or missing never hangs the connection and is never the server's error."""
    rng = random.Random(2)  # noqa: S311  repeatable on purpose
    places, faults = asyncio.Semaphore(32), []

    async def one():
        data = damaged(rng)
        async with places:
            outcome = await exchange(port_of(server.where), data, half_close=True)
        if outcome.status == HANGS or outcome.status >= 500:
            faults.append((outcome.status, data))

    await asyncio.gather(*(one() for _ in range(count)))
    assert faults == []
    async with Pool(server.where) as pool:
        assert (await pool.ask(get("/health/ready"))).status == 200


async def test_a_careless_server_is_found_out():
    """Negative control: a 5xx, a hang, vectors for nonsense and a smuggled request are each seen."""

    async def obliging(count):
        return reply(500 if count == 1 else 200) if count != 5 else None

    requests = {"two-lengths": REQUESTS["two-lengths"], "empty": REQUESTS["empty"], "nul": REQUESTS["nul"]}
    async with careless(obliging) as url:
        faults = [fault_of(name, await exchange(port_of(url), data, patience=0.5)) for name, data in requests.items()]
        smuggled = await exchange(port_of(url), REQUESTS["two-lengths"] + SMUGGLED, patience=0.5)
    assert all(faults)
    assert smuggled.replies > 1 or smuggled.status == HANGS
