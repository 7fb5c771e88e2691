"""What refusals say of the load, in the headers that an API has for it: at the edge, and behind it."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import pytest

from conftest import assembled, listening
from fakes import fake_model, hash_model
from quiver.api.call import Call
from quiver.api.edge import LOAD_SECONDS
from quiver.config import EngineConfig, ServerConfig
from quiver.engine.model import WarmUp
from test_openai import Held, limits_of

OPENAI, SEED = "/v1/embeddings", "/inference_api/api/embed"
BODIES = {OPENAI: lambda text: {"input": text}, SEED: lambda text: {"text": text}}
QUEUE = {"x-queue-depth", "x-queue-capacity", "x-estimated-wait-ms"}


@asynccontextmanager
async def busy(*, waiting=90, capacity=100, **server):
    """Assemble a server whose only lane is held, while so many tokens wait for it; yields it with the lane."""
    lane = Held()
    model = hash_model(lanes=1, before=lane)
    async with assembled(
        model, server=ServerConfig(**server), engine=EngineConfig(max_waiting_tokens=capacity)
    ) as parts:
        sent = [asyncio.create_task(parts.api.receive(call(OPENAI, "a")))]
        await asyncio.to_thread(lane.busy.wait)
        if waiting:
            sent.append(await wait_too(parts, waiting))
        yield parts
        lane.allowed.release(100)
        assert {reply.status for reply in await asyncio.gather(*sent)} == {200}


async def wait_too(parts, length):
    """Send a request of so many tokens, and return it once it waits."""
    tokens = parts.service.queue().tokens + length
    sent = asyncio.create_task(parts.api.receive(call(OPENAI, "b" * length)))
    async with asyncio.timeout(5):
        while parts.service.queue().tokens < tokens:  # noqa: ASYNC110  a queue has no event
            await asyncio.sleep(0)
    return sent


def call(path, text, **headers):
    """Return a call that embeds a text."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Call("POST", path, named, json.dumps(BODIES[path](text)).encode())


def at_the_edge(parts, path):
    """Return the status and the headers of a refusal at the edge; None where a request is let in."""
    refusal = parts.edge.refusal("POST", path.encode(), [(b"content-length", b"20")], "somebody")
    if refusal is None:
        return None
    head, _, body = refusal.wire.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert len(headers) == len(lines)
    assert int(headers["content-length"]) == len(body)
    return int(first.split()[1]), headers


async def test_openais_refusal_leaves_no_tokens():
    """A queue that is full for a request has nothing left, until the time to come back."""
    async with busy() as parts:
        reply = await parts.api.receive(call(OPENAI, "c" * 90))
    assert reply.status == 429
    left = limits_of(reply)
    assert left.keys() == {"limit-tokens", "remaining-tokens", "reset-tokens"}
    assert (left["limit-tokens"], left["remaining-tokens"]) == ("100", "0")
    assert left["reset-tokens"] != "0s"


async def test_openais_refusal_for_places_leaves_no_requests():
    """Where it is the requests at work that are bounded, none is left, but of the tokens what nobody has taken."""
    async with busy(waiting=0, max_concurrent_requests=1) as parts:
        status, headers = at_the_edge(parts, OPENAI)
        behind = await parts.api.receive(call(OPENAI, "c", x_request_timeout="0.2"))
    assert status == behind.status == 429
    for found in (headers, behind.headers):
        left = {name: text for name, text in found.items() if name.startswith("x-ratelimit-")}
        assert left == {
            "x-ratelimit-limit-tokens": "100",
            "x-ratelimit-remaining-tokens": "100",
            "x-ratelimit-reset-tokens": "0s",
            "x-ratelimit-limit-requests": "1",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "1s",
        }


async def test_the_queue_is_told_in_seed_0s_refusals():
    """503 says what waits and what may, and a wait that is no shorter than the time to come back."""
    async with busy() as parts:
        full = await parts.api.receive(call(SEED, "c" * 90))
        late = await parts.api.receive(call(SEED, "c", x_request_timeout="0.05"))
    for reply in (full, late):
        assert reply.status == 503
        assert (reply.headers["x-queue-depth"], reply.headers["x-queue-capacity"]) == ("90", "100")
        assert int(reply.headers["x-estimated-wait-ms"]) >= int(reply.headers["retry-after-ms"])


async def test_what_is_remembered_of_a_refusal_is_not_the_load():
    """Responses are ready-made, yet each tells the queue of its own moment."""
    async with busy(waiting=10, capacity=1000) as parts:
        told, ready_made = [], set()
        for depth in (10, 40):
            while parts.service.queue().tokens < depth:
                waiting = await wait_too(parts, 30)
            await asyncio.sleep(2 * LOAD_SECONDS)
            parts.admission.memory_is_short = True
            for _ in range(50):
                status, headers = at_the_edge(parts, SEED)
                assert status == 503
                assert headers["x-queue-depth"] == str(depth)
                assert int(headers["x-estimated-wait-ms"]) >= int(headers["retry-after-ms"])
                ready_made.add(headers["retry-after-ms"])
                told.append(headers["x-request-id"])
            parts.admission.memory_is_short = False
        assert len(parts.edge._ready_made) == len(ready_made) < len(told) == len(set(told))
    assert (await waiting).status == 200


async def test_the_edge_tells_over_http_what_is_left():
    """A client reads the headers of a refusal as those of any reply."""
    async with listening(server=ServerConfig(max_inflight_bytes=1)) as url, httpx.AsyncClient(base_url=url) as http:
        openai = await http.post(OPENAI, json={"input": "a"})
        seed = await http.post(SEED, json={"text": "a"})
        tei = await http.post("/tei/embed", json={"inputs": "a"})
    assert (openai.status_code, seed.status_code, tei.status_code) == (429, 503, 429)
    assert openai.headers["x-ratelimit-remaining-tokens"] == "0"
    assert openai.headers["x-ratelimit-limit-tokens"] == "1000000"
    assert {name for name in seed.headers if name.startswith("x-queue")} == QUEUE - {"x-estimated-wait-ms"}
    assert int(seed.headers["x-estimated-wait-ms"]) >= 1000
    assert not [name for name in tei.headers if name.startswith(("x-queue", "x-ratelimit", "x-estimated"))]


@pytest.mark.parametrize(("path", "body"), [(OPENAI, {"input": []}), (SEED, {"text": 5})])
async def test_what_is_wrong_with_a_request_says_nothing_of_the_load(parts, path, body):
    """A refusal that another moment would not mend has none of the headers."""
    reply = await parts.api.receive(Call("POST", path, {}, json.dumps(body).encode()))
    assert reply.status == 400
    assert not [name for name in reply.headers if name.startswith(("x-queue", "x-ratelimit", "x-estimated"))]


async def test_a_refusal_tells_the_queue_of_its_own_model():
    """Of two models, one that is idle does not stand for the one that is full."""
    idle = fake_model(hash_model().backend, id="test/idle", aliases=("idle",))
    async with busy() as parts:
        parts.engine.replicas.add("test/idle", idle, WarmUp())
        body = json.dumps({"text": "c" * 90, "model": "test/hash"}).encode()
        full = await parts.api.receive(Call("POST", SEED, {}, body))
        parts.admission.memory_is_short = True
        _, unread = at_the_edge(parts, SEED)
    assert full.headers["x-queue-depth"] == "90"
    assert unread["x-queue-depth"] == "0"  # nobody knows yet which model it is for: the least that waits
