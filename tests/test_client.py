"""Both clients against live servers: what their users are promised, each kept by the one as by the other."""

import asyncio
import base64
import inspect
import json
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from client_servers import hangs, says, scripted
from clients_both import BOTH, asynchronous
from conftest import listening
from desk import over_http, staffed
from fakes import LogitBackend, byte_tokenizer, fake_model, hash_model, hash_vector
from quiver import client as package
from quiver.accounts import Tier
from quiver.client import (
    AsyncQuiver,
    BadReply,
    ConfigError,
    NotFound,
    Quiver,
    Ranked,
    RateLimited,
    Refused,
    TimedOut,
    Unauthorized,
    Used,
    errors,
)
from quiver.config import Secret, ServerConfig

TEXTS = ["a dog", "the cat sat on the mat", "çà et là"]
LABELS = ("sad", "glad", "mad")
QUERY = "a pet"
PAGE = Path(__file__).parent.parent / "docs" / "client.md"


@pytest.fixture(params=BOTH, ids=["blocking", "asynchronous"])
def opened(request):
    """Return what opens each of the clients."""
    return request.param


@pytest.fixture
async def quiver(opened, url):
    """Return a client of the server with the hash model."""
    async with opened(url) as client:
        yield client


def ids_of(text):
    """Return the token ids of the fake tokenizer."""
    return byte_tokenizer().encode([text], truncate=False)[0].ids


def vectors_of(*texts):
    """Return what the hash model gives texts, (B, D)."""
    return np.stack([hash_vector(ids_of(text)) for text in texts])


# Vectors


async def test_vectors_are_the_models_to_the_last_bit(quiver):
    """(B, D) float32, in the order of the texts."""
    vectors = await quiver.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, vectors_of(*TEXTS))


async def test_texts_may_come_from_anywhere(quiver):
    """A generator is read once; a single text is one text, not its letters."""
    assert np.array_equal(await quiver.embed(text for text in TEXTS), vectors_of(*TEXTS))
    assert np.array_equal(await quiver.embed("a dog"), vectors_of("a dog"))


async def test_no_texts_need_no_server(opened):
    """Nothing in, nothing out, and nobody is asked."""
    async with opened("http://127.0.0.1:1") as client:
        assert (await client.embed([])).shape == (0, 0)
        assert (await client.embed([], dimensions=8)).shape == (0, 8)
        assert await client.rerank("a", []) == []
        assert await client.classify([]) == []
        assert await client.tokenize([]) == []


async def test_what_is_no_text_is_named(quiver):
    """A mistake in a list of texts is told before anything is sent."""
    with pytest.raises(TypeError, match=r"texts\[1\] is no text but NoneType"):
        await quiver.embed(["a", None])
    with pytest.raises(ValueError, match="surrogate"):
        await quiver.embed(["\ud800"])
    assert quiver.used == Used()


async def test_options_reach_the_model(opened):
    """Dimensions, prompts by name and by what texts are for, and cutting: all of `embed`'s words are the server's."""
    prompts = {"query": "query: ", "document": "passage: "}
    async with (
        listening(fake_model(hash_model().backend, prompts=prompts)) as url,
        opened(url) as client,
    ):
        assert np.array_equal(await client.embed(["a"], dimensions=4), vectors_of("a")[:, :4])
        assert np.array_equal(await client.embed("a", prompt_name="query"), vectors_of("query: a"))
        assert np.array_equal(await client.embed("a", input_type="document"), vectors_of("passage: a"))
        assert np.array_equal(await client.embed("a" * 600, truncate=True), vectors_of("a" * 512))
        with pytest.raises(Refused) as refusal:
            await client.embed("a" * 600, truncate=False)
    assert refusal.value.code == "context_length_exceeded"


async def test_many_texts_go_in_several_requests(opened, url):
    """The vectors keep the order of the texts, however many requests they came in."""
    texts = [f"text number {i}" for i in range(100)]
    async with opened(url, max_inputs=7, max_concurrency=3) as client:
        assert np.array_equal(await client.embed(texts), vectors_of(*texts))
        assert client.used == Used(15, sum(len(ids_of(text)) for text in texts))


def answers(handler, got):
    """Answer with a vector of one number for each text: its length."""
    time.sleep(0.05)  # so that requests meet
    packed = [base64.b64encode(np.float32([len(text)]).tobytes()).decode() for text in got.json()["input"]]
    data = [{"index": i, "embedding": vector} for i, vector in enumerate(packed)]
    body = {"data": data, "usage": {"total_tokens": len(data)}}
    handler.reply(200, json.dumps(body).encode(), {})


@pytest.mark.parametrize("most", [1, 3])
async def test_no_more_requests_are_at_work_than_allowed(opened, most):
    """`max_concurrency` is reached and not passed."""
    with scripted(answers) as (url, script):
        async with opened(url, max_inputs=2, max_concurrency=most) as client:
            vectors = await client.embed(["a" * n for n in range(1, 21)])
    assert vectors[:, 0].tolist() == list(range(1, 21))
    assert script.most_at_once == most
    assert len(script.seen) == 10


async def test_long_texts_are_parted_by_their_bytes(opened):
    """A request holds a megabyte at most, but for a text that is longer by itself."""
    lengths = [400_000, 400_000, 400_000, 3_000_000, 10]
    with scripted(answers) as (url, script):
        async with opened(url, max_concurrency=1) as client:
            vectors = await client.embed(["a" * n for n in lengths])
    assert vectors[:, 0].tolist() == lengths
    assert [[len(text) for text in got.json()["input"]] for got in script.seen] == [
        [400_000, 400_000],
        [400_000],
        [3_000_000],
        [10],
    ]


async def test_one_part_that_fails_fails_the_call(opened, url):
    """The error is the server's, and the client works on."""
    async with opened(url, max_inputs=2) as client:
        with pytest.raises(Refused, match="600 tokens"):
            await client.embed(["a", "b", "c", "a" * 600, "d", "e"])
        assert np.array_equal(await client.embed("a"), vectors_of("a"))


# Scores and tokens


@pytest.fixture
async def reranker(opened):
    """Return a client of a server with a model that scores pairs, in requests of two documents."""
    async with (
        listening(fake_model(LogitBackend(), kind="rerank", dimensions=1)) as url,
        opened(url, max_inputs=2) as client,
    ):
        yield client


def ranked(documents):
    """Return documents as the fake model ranks them."""
    logits = [6 * hash_vector([*ids_of(QUERY), *ids_of(document)])[0] for document in documents]
    scores = [float(1 / (1 + np.exp(-logit))) for logit in logits]
    order = sorted(range(len(documents)), key=lambda index: -scores[index])
    return [(index, pytest.approx(scores[index], abs=1e-6), documents[index]) for index in order]


@pytest.mark.parametrize("documents", [TEXTS[:2], TEXTS], ids=["in one request", "in two"])
async def test_documents_come_ranked(reranker, documents):
    """The best first, each with its place, its score and its text; `top_n` keeps the best of all."""
    found = await reranker.rerank(QUERY, documents)
    assert [(each.index, each.score, each.text) for each in found] == ranked(documents)
    assert await reranker.rerank(QUERY, documents, top_n=1) == found[:1]
    assert await reranker.rerank(QUERY, documents, top_n=99) == found
    assert isinstance(found[0], Ranked)


async def test_equal_documents_keep_their_order(reranker):
    """Of the same scores, the first given comes first, in whichever request it went."""
    assert [each.index for each in await reranker.rerank(QUERY, ["same"] * 5)] == [0, 1, 2, 3, 4]


async def test_texts_are_classified(opened):
    """Every label with its score, the likeliest first: probabilities, or logits."""
    model = fake_model(LogitBackend(labels=3), kind="classify", labels=LABELS, dimensions=3)
    async with listening(model) as url, opened(url, max_inputs=2) as client:
        found, raw = await client.classify(TEXTS), await client.classify(TEXTS, raw_scores=True)
    for text, scores, logits in zip(TEXTS, found, raw, strict=True):
        wanted = dict(zip(LABELS, (6 * hash_vector(ids_of(text))[:3]).tolist(), strict=True))
        assert logits == pytest.approx(wanted, abs=1e-5)
        assert sum(scores.values()) == pytest.approx(1, abs=1e-6)
        assert list(scores) == list(logits) == sorted(wanted, key=lambda label: -wanted[label])


async def test_texts_are_cut_into_tokens(opened, url):
    """The ids that the model reads, with their places."""
    async with opened(url, max_inputs=2) as client:
        found = await client.tokenize(TEXTS)
    assert [[token.id for token in tokens] for tokens in found] == [ids_of(text).tolist() for text in TEXTS]
    assert [(token.text, token.start, token.stop) for token in found[0][:2]] == [("a", 0, 1), (" ", 1, 2)]


@pytest.mark.parametrize("verb", ["embed", "classify", "tokenize"])
async def test_a_model_that_is_not_served_is_never_another(quiver, verb):
    """Each verb says so, though some APIs take any name for their only model."""
    with pytest.raises(NotFound, match="nobody/knows") as missing:
        await getattr(quiver, verb)(["a"], model="nobody/knows")
    assert (missing.value.status, missing.value.code) == (404, "model_not_found")


# The server


async def test_models_are_listed_and_shown(quiver):
    """By id or alias, with what a user wants to know of each."""
    (listed,) = await quiver.models()
    assert (listed.id, listed.kind, listed.dimensions, listed.max_tokens) == ("test/hash", "embed", 32, 512)
    assert listed.batch_invariant is not None
    assert await quiver.model("hash") == listed


async def test_the_default_model_is_asked_for(opened, url):
    """What the client was made with is in every request; a call may name another."""
    async with opened(url, model="no/such") as client:
        with pytest.raises(NotFound, match="no/such"):
            await client.embed("a")
        assert np.array_equal(await client.embed("a", model="hash"), vectors_of("a"))


async def test_health_is_told(quiver):
    """The server in a word, and what each model does."""
    health = await quiver.health()
    assert (health.status, health.is_ok) == ("ok", True)
    assert [(model.id, model.state) for model in health.models] == [("test/hash", "ready")]


async def test_a_server_that_is_loading_says_so_at_once(opened):
    """503 is an answer here, with how far each file is; it is no error, and nothing is tried again."""
    download = {"file": "model.safetensors", "done_bytes": 3, "total_bytes": 9}
    model = {"id": "a/b", "state": "downloading", "error": "", "downloads": [download]}
    body = {"status": "starting", "version": "0", "unix": 1.0, "models": [model]}
    with scripted(says(503, body, retry_after="1")) as (url, script):
        async with opened(url) as client:
            health = await client.health()
    assert (health.is_ok, health.models[0].downloads[0].done_bytes) == (False, 3)
    assert len(script.seen) == 1


async def test_usage_adds_up(quiver):
    """Requests and tokens of all calls; a refused one counts nothing."""
    await quiver.embed(TEXTS)
    await quiver.embed(TEXTS)
    with pytest.raises(NotFound):
        await quiver.embed(TEXTS, model="no/such")
    assert quiver.used == Used(2, 2 * sum(len(ids_of(text)) for text in TEXTS))


async def test_a_month_is_told(opened, tmp_path):
    """What the key's user has used and has left; a server without accounts has nothing to tell."""
    async with staffed(tmp_path) as (parts, desk):
        key = await desk.key(tier=Tier("small", 5))
        async with over_http(parts) as http, opened(str(http.base_url), api_key=key) as client:
            await client.embed(["a", "b"])
            await parts.stores.register.meter.flush()
            month = await client.usage()
            past = await client.usage("2024-02")
            with pytest.raises(RateLimited) as refusal:
                await client.embed(["a"] * 4)
    assert (month.tier, month.quota, month.used, month.left, month.requests) == ("small", 5, 2, 3, 1)
    assert (past.period, past.used, past.left) == ("2024-02", 0, None)
    assert refusal.value.code == "insufficient_quota"
    async with listening() as url, opened(url) as client:
        with pytest.raises(NotFound):
            await client.usage()


# What goes wrong


async def test_an_error_says_what_and_where(quiver):
    """Status, code, sentence, field and the id that the server's log has."""
    with pytest.raises(Refused) as refusal:
        await quiver.embed(["short", "a" * 600])
    error = refusal.value
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "input[1]")
    assert "600 tokens" in error.message
    assert error.request_id.startswith("req_")
    assert error.request_id in str(error)


async def test_every_api_tells_the_code(opened):
    """What an API's own shape has no place for comes all the same: here of Voyage's and Infinity's."""
    async with listening() as url, opened(url) as client:
        with pytest.raises(Refused) as classified:
            await client.classify(["a"])
        with pytest.raises(NotFound) as ranked:
            await client.rerank("a", ["b"], model="no/such")
    assert classified.value.code == "invalid_value"
    assert ranked.value.code == "model_not_found"


async def test_a_key_opens(opened, monkeypatch):
    """It comes from the argument or from QUIVER_API_KEY; without the right one, nothing is answered."""
    async with listening(server=ServerConfig(api_key=Secret("secret"))) as url:
        async with opened(url, api_key="secret") as client:
            assert len(await client.embed("a")) == 1
        async with opened(url, api_key="wrong") as client:
            with pytest.raises(Unauthorized) as refusal:
                await client.embed("a")
        monkeypatch.setenv("QUIVER_API_KEY", "secret")
        monkeypatch.setenv("QUIVER_URL", url)
        async with opened(None) as client:
            assert len(await client.embed("a")) == 1
            assert "secret" not in repr(client)
        async with opened(url, api_key="") as client:
            with pytest.raises(Unauthorized):
                await client.embed("a")
    assert refusal.value.status == 401


async def test_the_server_knows_how_long_the_client_waits(opened):
    """A call that is too late ends in time on both sides: the server gives it up, too."""
    held = threading.Event()
    async with listening(hash_model(lanes=1, before=lambda _: held.wait(20))) as url:
        try:
            async with opened(url) as client:
                start = time.perf_counter()
                with pytest.raises(TimedOut):
                    await client.embed("a", timeout=0.3)
                assert 0.2 < time.perf_counter() - start < 2
        finally:
            held.set()


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"",
        b"[]",
        b"{}",
        b'{"data": 3}',
        b'{"data": [{"index": 0, "embedding": "%%%%"}], "usage": {"total_tokens": 1}}',
        b'{"data": [{"index": 0, "embedding": "AAA="}], "usage": {"total_tokens": 1}}',
        b'{"data": [], "usage": {"total_tokens": 1}}',
        b'{"data": [{"index": 1, "embedding": "AACAPw=="}], "usage": {"total_tokens": 1}}',
        b'{"data": [{"index": 0, "embedding": "AACAPw=="}]}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
async def test_garbage_is_named(opened, body):
    """Whatever comes with 200 is the vectors that were asked for, or a `BadReply` that shows it."""
    with scripted(says(200, body, x_request_id="req_7")) as (url, script):
        async with opened(url) as client:
            with pytest.raises(BadReply) as bad:
                await client.embed("a")
    assert (bad.value.status, bad.value.request_id) == (200, "req_7")
    assert len(script.seen) == 1


async def test_what_is_right_is_no_garbage(opened):
    """Negative control: one vector for one text, by the same server."""
    body = b'{"data": [{"index": 0, "embedding": "AACAPw=="}], "usage": {"total_tokens": 1}}'
    with scripted(says(200, body)) as (url, _):
        async with opened(url) as client:
            assert (await client.embed("a")).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("status", "body", "error", "message", "code"),
    [
        (400, {"error": {"message": "m", "code": "c", "param": "p"}}, "Refused", "m", "c"),
        (413, {"error": "m", "error_type": "Validation"}, "Refused", "m", ""),
        (422, {"detail": [{"msg": "m"}, {"msg": "n"}]}, "Refused", "m; n", ""),
        (403, {"detail": "m"}, "Forbidden", "m", ""),
        (404, {"message": "m", "id": "x"}, "NotFound", "m", ""),
        (500, {"error": {"message": "m", "code": 500}}, "ServerFailed", "m", ""),
        (502, b"<html>bad gateway", "ServerFailed", "<html>bad gateway", ""),
        (504, {"error": {"message": "m", "code": "deadline_exceeded"}}, "TimedOut", "m", "deadline_exceeded"),
        (302, b"", "BadReply", "the server answered 302", ""),
        (400, [1], "Refused", "[1]", ""),
    ],
)
async def test_errors_of_all_shapes_are_read(opened, status, body, error, message, code):
    """The class is the status's; sentence and word are found wherever an API, or a proxy, has them."""
    with scripted(says(status, body)) as (url, _):
        async with opened(url, max_retries=0) as client:
            with pytest.raises(package.QuiverError) as refusal:
                await client.embed("a")
    assert type(refusal.value).__name__ == error
    assert (refusal.value.status, refusal.value.message, refusal.value.code) == (status, message, code)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "unix://", "unix://host/a", "http://", "/a"])
def test_a_wrong_url_is_named(url):
    """Both clients say what a URL looks like."""
    for client in (Quiver, AsyncQuiver):
        with pytest.raises(ConfigError, match=r"unix:///PATH/rest\.sock"):
            client(url)


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"max_inputs": 0}, {"max_concurrency": -1}, {"max_retries": -1}])
def test_a_wrong_setting_is_named(wrong):
    """What could never work is refused when the client is made."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Quiver("http://a", **wrong)


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
async def test_the_url_may_end_as_other_clients_have_it(opened, url, tail):
    """A slash, or the `/v1` that OpenAI's client wants, does no harm."""
    async with opened(url + tail) as client:
        assert len(await client.embed("a")) == 1


async def test_the_url_may_have_a_path(opened):
    """A server whose routes stand below a path is asked there."""
    async with listening(server=ServerConfig(url_prefix="/below")) as url, opened(f"{url}/below") as client:
        assert np.array_equal(await client.embed("a"), vectors_of("a"))
        assert [model.id for model in await client.models()] == ["test/hash"]


async def test_a_unix_socket_is_a_server(opened, tmp_path):
    """`unix:///PATH/rest.sock` is asked as any host is."""
    with scripted(answers, socket=str(tmp_path / "rest.sock")) as (url, script):
        async with opened(url) as client:
            assert (await client.embed("four")).tolist() == [[4.0]]
    assert script.seen[0].path == "/openai/v1/embeddings"


# The package


def fresh(code):
    """Run code in a process of its own and return what it prints."""
    command = (sys.executable, "-W", "error", "-c", code)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)  # noqa: S603  our own code
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_it_imports_nothing_of_the_server():
    """In a fresh process, it brings nothing along but itself, the standard library, numpy and httpx."""
    code = """
import sys, numpy, httpx
httpx.Client().close()
before = set(sys.modules)
from quiver.client import Quiver
with Quiver("http://127.0.0.1:1"):
    pass
names = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(names - sys.stdlib_module_names - {"numpy", "httpx"}))
print(*sorted(name for name in sys.modules if name.startswith("quiver") and not name.startswith("quiver.client")))
"""
    assert fresh(code) == ["quiver", "quiver"]


def test_an_import_of_the_server_would_be_seen():
    """Negative control: the same question about another module of the package finds more."""
    names = fresh("import sys\nimport quiver.errors, quiver.types\nprint(*sorted(sys.modules))")
    assert "quiver.errors" in names


def test_without_httpx_it_says_what_to_install():
    """The import works; making a client names the extra."""
    code = """
import sys
sys.modules["httpx"] = None
from quiver.client import AsyncQuiver, MissingExtra, Quiver
for kind in (Quiver, AsyncQuiver):
    try:
        kind("http://a")
    except MissingExtra as error:
        print(str(error).rpartition(" ")[2])
"""
    assert fresh(code) == ["'quiver[client]'"] * 2


def test_both_clients_have_the_same_verbs():
    """Names, parameters and descriptions; what differs is only that one is awaited."""
    for one, other in (
        (Quiver, AsyncQuiver),
        (type(Quiver("http://a").batches), type(AsyncQuiver("http://a").batches)),
    ):
        verbs = [name for name, found in vars(one).items() if hasattr(found, "__signature__")]
        assert len(verbs) >= 6
        for name in verbs:
            mine, others = getattr(one, name), getattr(other, name)
            assert inspect.signature(mine) == inspect.signature(others)
            assert inspect.getdoc(mine) == inspect.getdoc(others)
            assert inspect.iscoroutinefunction(others)
            assert not inspect.iscoroutinefunction(mine)


def test_threads_share_a_client():
    """Calls from many threads at once get each their own vectors, and all are counted."""
    found = {}
    with scripted(answers) as (url, _), Quiver(url, max_inputs=2) as quiver:

        def ask(number):
            found[number] = quiver.embed(["a" * number] * 5)[:, 0].tolist()

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert quiver.used == Used(24, 40)
    assert found == {number: [float(number)] * 5 for number in range(1, 9)}


async def test_a_cancelled_call_leaves_nothing_behind():
    """Whoever stops waiting for the asynchronous client has no task left, and can call again."""
    with scripted(hangs) as (url, script):
        async with asynchronous(url, max_inputs=1) as client:
            before = asyncio.all_tasks()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.embed(["a", "b", "c"])
            assert asyncio.all_tasks() == before
            assert len(script.seen) == 3


def test_the_drawn_tree_of_errors_is_the_real_one():
    """The module and its page draw each class once, as deep as it stands."""

    def drawn(text):
        return {name: len(lead) // 4 for lead, name in re.findall(r"^([ │├└─]*)(\w+)(?: {2,}.*)?$", text, re.MULTILINE)}

    (page,) = re.findall(
        r"^```text\n(QuiverError\n.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    tree = textwrap.dedent("    QuiverError" + errors.__doc__.partition("    QuiverError")[2].rpartition("\n\n")[0])
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.QuiverError)]
    real = {kind.__name__: sum(issubclass(each, errors.QuiverError) for each in kind.__mro__) - 1 for kind in kinds}
    assert drawn(page) == drawn(tree) == real
