"""The same request again, with a key: the same reply, but whoever asks is known, in time, and pays."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from desk import over_http, staffed
from quiver.accounts import Rate, Tier
from quiver.api.rate_headers import rate_headers, rate_lines
from quiver.app import App
from quiver.config import AccountsConfig, CacheConfig, Secret, ServerConfig
from quiver.limits import take
from stores import REDIS, redis_prefix
from test_replies import BODY, post, repeated, served

CACHE = CacheConfig()
ROUTE = "/v1/embeddings"


async def ask(
    http: httpx.AsyncClient, key: str, times: int = 1, path: str = ROUTE, **more: Any
) -> list[httpx.Response]:
    """Send a request so many times with a key."""
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json", **more.pop("headers", {})}
    body = more.pop("body", BODY)
    return [await http.post(path, content=body, headers=headers) for _ in range(times)]


async def counted(parts: App, desk: Any) -> list[tuple[int, int, int, int]]:
    """Return requests, embeddings, cached ones and tokens of each key in the ledger."""
    await parts.stores.register.meter.flush()
    return sorted((t.requests, t.embeddings, t.cached, t.tokens) for t in await desk.totals())


async def test_a_repeated_reply_is_in_the_ledger_like_any_other(tmp_path):
    """Six requests of one key are six in the ledger, with the inputs and tokens of each; the first was computed."""
    async with staffed(tmp_path, cache=CACHE) as (parts, desk), over_http(parts) as http:
        replies = await ask(http, await desk.key(), times=6)

        assert repeated(parts) == 4
        assert {reply.content for reply in replies} == {replies[0].content}
        tokens = replies[0].json()["usage"]["total_tokens"]
        assert await counted(parts, desk) == [(6, 6, 5, 6 * tokens)]


async def test_each_key_has_its_own_replies(tmp_path):
    """What one key got is not repeated to another: each begins with what is computed or known to its user."""
    async with staffed(tmp_path, cache=CACHE) as (parts, desk), over_http(parts) as http:
        await ask(http, await desk.key(email="ann@b.c"), times=3)
        assert repeated(parts) == 1
        await ask(http, await desk.key(email="bob@b.c"), times=2)
        assert repeated(parts) == 1
        assert await counted(parts, desk) == [(2, 2, 1, 2), (3, 3, 2, 3)]


async def test_a_quota_ends_repeated_replies(tmp_path):
    """The fifth of four embeddings a month is refused, repeated or not, and is not counted."""
    async with staffed(tmp_path, cache=CACHE) as (parts, desk), over_http(parts) as http:
        replies = await ask(http, await desk.key(tier=Tier("small", 4)), times=6)

        assert [reply.status_code for reply in replies] == [200] * 4 + [429] * 2
        assert replies[-1].json()["error"]["code"] == "insufficient_quota"
        assert repeated(parts) == 2
        assert [row[:2] for row in await counted(parts, desk)] == [(4, 4)]


async def test_a_rate_bounds_repeated_replies_and_is_told(tmp_path):
    """Each takes from the key's bucket and says what is left; with none left it is refused."""
    async with staffed(tmp_path, cache=CACHE) as (parts, desk), over_http(parts) as http:
        replies = await ask(http, await desk.key(tier=Tier("slow", None, Rate(0.01, 4))), times=6)

        assert [reply.status_code for reply in replies] == [200] * 4 + [429] * 2
        assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == list("321000")
        assert repeated(parts) == 2
        assert set(replies[3].headers) >= {"ratelimit", "ratelimit-policy"}
        assert len(replies[3].headers.get_list("ratelimit")) == 1


@given(
    rate=st.builds(Rate, st.sampled_from([0.01, 0.5, 2, 80]), st.integers(1, 400)),
    taken=st.floats(0, 500, allow_nan=False),
)
def test_repeated_replies_tell_a_rate_as_others_do(rate, taken):
    """What is written in one piece is what is written header by header."""
    _, verdict = take(0.0, rate, taken)
    written = rate_lines(verdict).decode().split("\r\n")
    assert sorted(written) == sorted(["", *(f"{name}: {value}" for name, value in rate_headers(verdict).items())])


async def test_a_key_that_ends_gets_no_repeated_reply(tmp_path):
    """At its time, though it was known a moment before."""
    async with staffed(tmp_path, cache=CACHE) as (parts, desk), over_http(parts) as http:
        end = time.time() + 1.5
        key = await desk.key(expires_at=end)
        await ask(http, key, times=4)
        assert repeated(parts) == 2
        await asyncio.sleep(end + 0.01 - time.time())
        assert (await ask(http, key))[0].status_code == 401


async def test_a_revoked_key_gets_no_repeated_reply(tmp_path):
    """Five seconds after its end at the latest, the same bytes are refused."""
    async with staffed(tmp_path, cache=CACHE) as (parts, desk), over_http(parts) as http:
        key = await desk.key()
        await ask(http, key, times=3)
        await desk.revoke(key)
        for _ in range(50):
            (reply,) = await ask(http, key)
            if reply.status_code == 401:
                break
            await asyncio.sleep(0.1)
        assert reply.status_code == 401
        assert (await ask(http, key))[0].status_code == 401


async def test_an_idempotent_request_is_never_repeated_from_here(tmp_path):
    """Its key makes it count once, which is found out the usual way."""
    async with staffed(tmp_path, cache=CACHE) as (parts, desk), over_http(parts) as http:
        replies = await ask(http, await desk.key(), times=4, headers={"idempotency-key": "once"})

        assert [reply.status_code for reply in replies] == [200] * 4
        assert repeated(parts) == 0
        assert [row[0] for row in await counted(parts, desk)] == [1]


@pytest.mark.parametrize("sections", [{"server": ServerConfig(api_key=Secret("k"))}, {}])
async def test_the_server_s_own_key_is_asked_for(sections: dict[str, Any]):
    """A server with one key for all repeats replies to who shows it; without one, to everybody."""
    async with served(**sections) as (parts, url):
        assert [r.status_code for r in await post(url, times=4, authorization="Bearer k")] == [200] * 4
        assert repeated(parts) == 2
        expected = 401 if sections else 200
        assert [r.status_code for r in await post(url, times=4, authorization="Bearer no")] == [expected] * 4


async def test_a_rate_of_addresses_bounds_repeated_replies():
    """A server without keys that bounds how often an address may ask counts repeated replies, too."""
    async with served(accounts=AccountsConfig(rate_per_second=0.01, rate_burst=4)) as (parts, url):
        assert [r.status_code for r in await post(url, times=6)] == [200] * 4 + [429] * 2
        assert repeated(parts) == 2


async def test_an_address_that_a_request_claims_is_not_believed():
    """Whoever writes `X-Forwarded-For` gets no bucket for each address that it makes up."""
    async with served(accounts=AccountsConfig(rate_per_second=0.01, rate_burst=2)) as (_, url):
        claims = [{"x-forwarded-for": f"192.0.2.{n}"} for n in range(4)]
        replies = [(await post(url, **claim))[0].status_code for claim in claims]
        assert replies == [200, 200, 429, 429]


async def test_a_rate_that_servers_share_is_asked_for_the_usual_way():
    """Where the buckets are in Redis, nothing is repeated: whether a request is in time is not known here."""
    async with redis_prefix() as prefix:
        cache = CacheConfig(redis_url=Secret(REDIS), redis_prefix=prefix)
        async with served(cache=cache, accounts=AccountsConfig(rate_per_second=0.01, rate_burst=4)) as (parts, url):
            assert [r.status_code for r in await post(url, times=6)] == [200] * 4 + [429] * 2
            assert repeated(parts) == 0


async def test_seed_replies_tell_their_own_time(tmp_path):
    """The FastEmbed Query API says how long each reply took: a repeated one says it of itself, and is valid JSON."""
    body, server = json.dumps({"text": "a"}).encode(), ServerConfig(root_dialects=("fastembed_query",))
    async with staffed(tmp_path, cache=CACHE, server=server) as (parts, desk), over_http(parts) as http:
        first, *others = await ask(http, await desk.key(), times=6, path="/v1/embed", body=body)

        assert repeated(parts) == 4
        assert first.json()["cached"] is False
        for reply in others:
            got = reply.json()
            assert got["cached"] is True
            assert 0 <= got["latency_ms"] < 1000
            assert {**got, "cached": False, "latency_ms": 0} == {**first.json(), "latency_ms": 0}
        assert len({reply.json()["latency_ms"] for reply in others}) > 1
