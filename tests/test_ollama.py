"""What Ollama's dialect promises beyond its recorded exchanges."""

import json

import numpy as np
import pytest

from conftest import assembled
from fakes import HIDDEN, HashBackend, LogitBackend, byte_tokenizer, fake_model, hash_vector
from quiver import __version__
from quiver.api.call import Call
from quiver.api.ollama import LIBRARY
from quiver.models.catalogue import Catalogue


async def send(parts, path, body=None, *, method="POST"):
    """Send a body straight into the API, as curl does: without saying that it is JSON."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return await parts.api.receive(Call(method, path, {"content-type": "application/x-www-form-urlencoded"}, raw))


async def ask(parts, path, body=None, **options):
    """Send a body; returns status and decoded reply."""
    reply = await send(parts, path, body, **options)
    return reply.status, json.loads(reply.body)


def vector_of(text):
    """Return the vector that the hash model gives a text."""
    return hash_vector(byte_tokenizer().encode([text], truncate=False)[0].ids)


# Vectors


async def test_each_text_has_the_models_vector(parts):
    """A list of texts gives theirs in order, and the older form gives the same one by one."""
    texts = ["one", "two", "three"]
    _, reply = await ask(parts, "/api/embed", {"model": "hash", "input": texts})
    np.testing.assert_allclose(reply["embeddings"], [vector_of(text) for text in texts], atol=1e-6)
    assert reply["prompt_eval_count"] == 11
    for text in texts:
        _, one = await ask(parts, "/api/embeddings", {"model": "hash", "prompt": text})
        assert np.array_equal(np.float32(one["embedding"]), vector_of(text))


async def test_the_empty_text_has_a_vector_in_a_list_only(minilm):
    """Alone it means to load the model."""
    async with assembled(minilm) as parts:
        _, alone = await ask(parts, "/api/embed", {"input": ""})
        _, listed = await ask(parts, "/api/embed", {"input": ["", "a"]})
        _, old = await ask(parts, "/api/embeddings", {"prompt": ""})
    assert alone["embeddings"] == old["embedding"] == []
    assert [len(vector) for vector in listed["embeddings"]] == [384, 384]
    assert listed["prompt_eval_count"] == 2 + 3


@pytest.mark.parametrize("normalize", [True, False])
async def test_only_the_newer_form_scales_vectors(normalize):
    """/api/embed gives unit length even where the model does not, /api/embeddings gives what the model computes."""
    async with assembled(fake_model(LogitBackend(labels=HIDDEN), normalize=normalize)) as parts:
        _, new = await ask(parts, "/api/embed", {"input": "text"})
        _, old = await ask(parts, "/api/embeddings", {"prompt": "text"})
    assert np.linalg.norm(new["embeddings"][0]) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(old["embedding"]) == pytest.approx(6, abs=1e-4)


@pytest.mark.parametrize(
    ("dimensions", "kept"), [(None, 32), (0, 32), (-5, 32), (1, 1), (31, 31), (32, 32), (33, 32), (10**9, 32)]
)
async def test_dimensions_cut_only_what_is_longer(parts, dimensions, kept):
    """As in Ollama, none, zero and more than the model has keep the whole vector."""
    status, reply = await ask(parts, "/api/embed", {"input": "text", "dimensions": dimensions})
    assert (status, len(reply["embeddings"][0])) == (200, kept)


async def test_durations_are_nanoseconds(parts):
    """The whole takes longer than having the model, and neither takes the hour that seconds would mean."""
    reply = await send(parts, "/api/embed", {"input": "text"})
    body = json.loads(reply.body)
    assert 0 <= body["load_duration"] < body["total_duration"] < 3.6e12
    assert body["total_duration"] > 1000
    assert "total;dur=" in reply.headers["server-timing"]


# Names


@pytest.mark.parametrize("name", ["hash", "HASH", "hash:latest", "test/hash", "test/hash:latest", "", None])
async def test_a_name_goes_with_and_without_its_tag(parts, name):
    """The reply repeats the name as it was asked for; without one, it has the id."""
    status, reply = await ask(parts, "/api/embed", {"model": name, "input": "text"})
    assert (status, reply["model"]) == (200, name or "test/hash")


async def test_what_is_listed_can_be_asked_for(parts):
    """Each name of the list embeds, shows, and is among those in memory."""
    _, listed = await ask(parts, "/api/tags", method="GET")
    _, loaded = await ask(parts, "/api/ps", method="GET")
    (name,) = {model["name"] for model in listed["models"]}
    assert [model["name"] for model in loaded["models"]] == [name]
    assert (await ask(parts, "/api/embed", {"model": name, "input": "text"}))[0] == 200
    assert (await ask(parts, "/api/show", {"model": name}))[0] == 200


async def test_only_a_loaded_model_is_in_memory():
    """Those that may still be loaded are listed, but are not in memory."""
    async with assembled(models={"allow_models": ("*",)}) as parts:
        _, listed = await ask(parts, "/api/tags", method="GET")
        _, loaded = await ask(parts, "/api/ps", method="GET")
    assert len(listed["models"]) > 20
    assert [model["name"] for model in loaded["models"]] == ["test/hash:latest"]
    assert all(len(model["digest"]) == 64 for model in listed["models"])


@pytest.mark.parametrize("name", LIBRARY)
def test_ollamas_names_mean_models_of_the_catalogue(name):
    """What a name is translated to is known, and embeds; the name itself belongs to no other model."""
    spec = Catalogue.load().find(LIBRARY[name])
    assert spec
    assert spec.kind == "embed"
    assert Catalogue.load().find(name) in (None, spec)


@pytest.mark.parametrize("name", ["all-minilm", "all-minilm:latest", "All-MiniLM:22m"])
async def test_ollamas_own_names_are_understood(name):
    """A model of the catalogue answers to what Ollama calls it."""
    async with assembled(fake_model(HashBackend(), id="sentence-transformers/all-MiniLM-L6-v2", aliases=())) as parts:
        assert (await ask(parts, "/api/embed", {"model": name, "input": "text"}))[0] == 200
        assert (await ask(parts, "/api/show", {"model": name}))[0] == 200
        assert (await ask(parts, "/api/embed", {"model": "all-minilm:33m", "input": "text"}))[0] == 404


async def test_a_model_that_is_served_under_such_a_name_goes_first():
    """Who calls a model of their own all-minilm gets that one."""
    async with assembled(fake_model(HashBackend(), id="all-minilm", aliases=())) as parts:
        _, reply = await ask(parts, "/api/show", {"model": "all-minilm:latest"})
        assert reply["modelfile"] == "FROM all-minilm\n"
        assert (await ask(parts, "/api/embed", {"model": "all-minilm", "input": "text"}))[0] == 200


async def test_any_name_is_taken_where_the_settings_say_so():
    """With `any_model_name`, a name that nobody serves embeds with the first model, whole or cut."""
    async with assembled(models={"any_model_name": True}) as parts:
        for more in ({"input": "text"}, {"input": "text", "dimensions": 3}, {"input": ""}):
            status, reply = await ask(parts, "/api/embed", {"model": "llama3", **more})
            assert (status, reply["model"]) == (200, "llama3")


# The server


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_it_runs(parts, method):
    """Under the prefix, the first line that Ollama's clients look for; the root belongs to others."""
    reply = await send(parts, "/ollama/", method=method)
    assert (reply.status, reply.body, reply.media_type) == (200, b"Ollama is running", "text/plain; charset=utf-8")
    assert (await send(parts, "/", method=method)).body != reply.body


async def test_the_version_is_quivers(parts):
    """Nobody is told that this is Ollama."""
    assert await ask(parts, "/api/version", method="GET") == (200, {"version": __version__})


DEEP = b'{"input":' + b"[" * 2000 + b"]" * 2000 + b"}"
REFUSED = {
    "no object": ("/api/embed", b"[]"),
    "no json": ("/api/embed", b"{input: 1}"),
    "NaN": ("/api/embed", b'{"input":NaN}'),
    "invalid utf-8": ("/api/embed", b'{"input":"\xff\xfe"}'),
    "a lone surrogate": ("/api/embed", b'{"input":"\\ud800"}'),
    "2,000-deep nesting": ("/api/embed", DEEP),
    "a number": ("/api/embed", {"input": 5}),
    "token ids": ("/api/embed", {"input": [101, 102]}),
    "an object": ("/api/embed", {"input": {"text": "a"}}),
    "dimensions a text": ("/api/embed", {"input": "a", "dimensions": "8"}),
    "truncate a text": ("/api/embed", {"input": "a", "truncate": "yes"}),
    "model a number": ("/api/embed", {"input": "a", "model": 5}),
    "too many texts": ("/api/embed", {"input": ["a"] * 3000}),
    "too long": ("/api/embed", {"input": "a" * 600, "truncate": False}),
    "prompt a list": ("/api/embeddings", {"prompt": ["a"]}),
    "no body": ("/api/embeddings", None),
    "name a list": ("/api/show", {"name": []}),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_bad_input_is_refused_with_the_reason(parts, what):
    """The reply is 400 with one sentence as `error`; the next request is answered."""
    status, reply = await ask(parts, *REFUSED[what])
    assert status == 400, reply
    assert list(reply) == ["error"]
    assert len(reply["error"]) > 10
    assert (await ask(parts, "/api/embed", {"input": "a"}))[0] == 200
