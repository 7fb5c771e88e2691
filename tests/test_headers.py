"""What every reply tells a browser, and which pages may call at all."""

import asyncio
import base64
import hashlib
import re
import shutil
from contextlib import asynccontextmanager

import httpx
import pytest

from certificates import Authority
from conftest import listening
from quiver.config import Secret, ServerConfig

PAGE = "https://page.example"
KEY = "the-key-of-this-server"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key, content-type"}


async def exchange(url, request):
    """Send bytes and return the head of what comes back."""
    host, port = url.rpartition("//")[2].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    writer.close()
    first, *lines = head.decode("latin-1").split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines if line)


def asked(path, *, method="GET", headers=(), body=b""):
    """Return the bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "host: a", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


REQUESTS = {
    "a vector": (200, asked("/v1/embeddings", method="POST", body=b'{"input": "a"}')),
    "a bad field": (400, asked("/v1/embeddings", method="POST", body=b'{"input": 1}')),
    "no such path": (404, asked("/nowhere")),
    "a wrong method": (405, asked("/v1/embeddings", method="DELETE")),
    "a page": (200, asked("/docs")),
    "a script": (200, asked("/swagger-ui/swagger-ui-bundle.js")),
    "a probe": (200, asked("/health/ready")),
    "metrics": (200, asked("/metrics")),
    "a large body": (413, asked("/v1/embeddings", method="POST", body=b"a" * 2000)),
    "a large head": (431, asked("/health", headers=[f"x-a: {'a' * 20_000}"])),
    "too much at once": (429, asked("/v1/embeddings", method="POST", body=b"a" * 600)),
    "not HTTP": (400, b"\x16\x03\x01 nonsense\r\n\r\n"),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_every_reply_is_what_it_says_it_is(name):
    """Each kind of reply, and each refusal before anything is read, forbids the browser to guess at its type."""
    status, request = REQUESTS[name]
    async with listening(server=ServerConfig(max_body_bytes=1000, max_inflight_bytes=500)) as url:
        got, headers = await exchange(url, request)
    assert (got, headers["x-content-type-options"]) == (status, "nosniff")
    assert "strict-transport-security" not in headers


async def test_no_cache_keeps_what_is_somebodys(url):
    """Whatever may tell one caller's data says so; files that are the same for all may be kept."""
    async with httpx.AsyncClient(base_url=url) as http:
        for path in ("/v1/models", "/health", "/metrics", "/docs"):
            assert (await http.get(path)).headers["cache-control"] == "no-store"
        assert (await http.post("/v1/embeddings", json={"input": "a"})).headers["cache-control"] == "no-store"
        assert "max-age" in (await http.get("/swagger-ui/swagger-ui.css")).headers["cache-control"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the certificate is made by openssl")
async def test_over_https_browsers_are_told_to_stay_there(tmp_path):
    """Replies and ready-made refusals alike ask for HTTPS from now on."""
    authority = Authority(tmp_path)
    async with (
        listening(server=ServerConfig(max_inflight_bytes=10), tls=authority.sign("server").settings()) as url,
        httpx.AsyncClient(base_url=url, verify=authority.client()) as http,
    ):
        replies = [await http.get("/health"), await http.post("/v1/embeddings", json={"input": "a"})]
    assert [reply.status_code for reply in replies] == [200, 429]
    assert {reply.headers["strict-transport-security"] for reply in replies} == {"max-age=31536000"}


@pytest.mark.parametrize("path", ["/docs", "/swagger-ui"])
async def test_a_page_runs_its_own_script_alone(url, path):
    """Its policy has the hash of the one script that stands in it, no other source, and nobody may frame it."""
    async with httpx.AsyncClient(base_url=url) as http:
        reply = await http.get(path)
    (script,) = re.findall(r"<script>(.*?)</script>", reply.text, re.DOTALL)
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    wanted = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["script-src"] == f"'self' 'sha256-{wanted}'"
    assert (policy["default-src"], policy["frame-ancestors"]) == ("'none'", "'none'")
    assert (reply.headers["x-frame-options"], reply.headers["referrer-policy"]) == ("DENY", "no-referrer")


# Pages of others


@asynccontextmanager
async def browser(**server):
    """Run a server that lets one page call; yields a client."""
    config = ServerConfig(cors_origins=(PAGE,), api_key=Secret(KEY), **server)
    async with listening(server=config) as url, httpx.AsyncClient(base_url=url) as http:
        yield http


async def test_a_browser_may_ask_before_it_shows_its_key():
    """The question whether `x-api-key` may be sent is answered without a key, for the page that may call."""
    async with browser() as http:
        reply = await http.options("/v1/embeddings", headers={"origin": PAGE, **PREFLIGHT})
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert "x-api-key" in reply.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in reply.headers
        called = await http.post("/v1/embeddings", json={"input": "a"}, headers={"origin": PAGE, "x-api-key": KEY})
        assert called.status_code == 200
        assert called.headers["access-control-allow-origin"] == PAGE
        assert called.headers["access-control-expose-headers"] == "*"


async def test_another_page_is_refused_with_and_without_a_key():
    """Its question is refused, and no reply that it might get says that it may read it."""
    async with browser() as http:
        for origin in ("https://other.example", PAGE.replace("https", "http"), f"{PAGE}.evil.example", "null"):
            asked_first = await http.options("/v1/embeddings", headers={"origin": origin, **PREFLIGHT})
            assert asked_first.status_code == 400
            for given in ({}, {"x-api-key": KEY}):
                reply = await http.post("/v1/embeddings", json={"input": "a"}, headers={"origin": origin, **given})
                assert "access-control-allow-origin" not in reply.headers


async def test_a_page_may_read_why_it_is_refused():
    """A call without a key and one that comes at a bad time are refused so that the page sees why, and when to come."""
    async with browser(max_inflight_bytes=100) as http:
        origin = {"origin": PAGE}
        no_key = await http.post("/v1/embeddings", json={"input": "a"}, headers=origin)
        too_much = await http.post("/v1/embeddings", json={"input": "a" * 200}, headers={**origin, "x-api-key": KEY})
        assert (no_key.status_code, too_much.status_code) == (401, 429)
        assert too_much.headers["retry-after"]
        for reply in (no_key, too_much):
            assert reply.headers["access-control-allow-origin"] == PAGE
            assert reply.headers["access-control-expose-headers"] == "*"


async def test_without_a_list_no_page_may_call(url):
    """Negative control: a server that names no origin says to none that it may."""
    async with httpx.AsyncClient(base_url=url) as http:
        asked_first = await http.options("/v1/embeddings", headers={"origin": PAGE, **PREFLIGHT})
        assert asked_first.status_code == 405
        reply = await http.post("/v1/embeddings", json={"input": "a"}, headers={"origin": PAGE})
        assert not [name for name in reply.headers if name.startswith("access-control")]
