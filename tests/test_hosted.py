"""What the dialects of hosted APIs (Cohere, Jina, Voyage, Mixedbread) promise beyond their recorded exchanges."""

import base64
import json

import numpy as np
import pytest

from conftest import assembled
from fakes import HashBackend, LogitBackend, byte_tokenizer, fake_model, hash_vector
from quiver import __version__
from quiver.api.call import Call

EMBED = {
    "cohere": ("/cohere/v2/embed", "texts"),
    "jina": ("/jina/v1/embeddings", "input"),
    "voyage": ("/voyage/v1/embeddings", "input"),
    "mixedbread": ("/mixedbread/v1/embeddings", "input"),
}
RERANK = {
    "cohere": ("/cohere/v1/rerank", "documents", "results", "relevance_score"),
    "jina": ("/jina/v1/rerank", "documents", "results", "relevance_score"),
    "voyage": ("/voyage/v1/rerank", "documents", "data", "relevance_score"),
    "mixedbread": ("/mixedbread/v1/reranking", "input", "data", "score"),
}
PROMPTS = {task: f"{task}: " for task in ("query", "document", "similarity", "classification", "clustering")}


async def send(parts, path, body, *, method="POST", query=None, **headers):
    """Send a body straight into the API; returns the whole reply."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return await parts.api.receive(Call(method, path, named, raw, query or {}))


async def ask(parts, path, body, **options):
    """Send a body straight into the API; returns status and decoded reply."""
    reply = await send(parts, path, body, **options)
    return reply.status, json.loads(reply.body)


async def embed(parts, name, texts, **options):
    """Embed texts through an API; returns the status, and the vectors or the error."""
    path, field = EMBED[name]
    status, reply = await ask(parts, path, {field: texts, **options})
    if status != 200:
        return status, reply
    rows = reply["embeddings"]["float"] if name == "cohere" else [item["embedding"] for item in reply["data"]]
    return status, np.float32(rows)


def vector_of(text):
    """Return the vector that the hash model gives a text."""
    return hash_vector(byte_tokenizer().encode([text], truncate=False)[0].ids)


# Embeddings


@pytest.mark.parametrize("name", EMBED)
async def test_a_text_has_one_vector_whatever_the_api(parts, name):
    """Each API hands on the model's own bits, in the order of the texts."""
    options = {"normalized": False} if name == "mixedbread" else {}
    _, vectors = await embed(parts, name, ["one", "two"], **options)
    assert np.array_equal(vectors, [vector_of("one"), vector_of("two")])


@pytest.mark.parametrize(
    ("name", "field", "word", "task"),
    [
        ("cohere", "input_type", "search_query", "query"),
        ("cohere", "input_type", "search_document", "document"),
        ("cohere", "input_type", "classification", "classification"),
        ("cohere", "input_type", "clustering", "clustering"),
        ("voyage", "input_type", "query", "query"),
        ("voyage", "input_type", "document", "document"),
        ("jina", "task", "retrieval.query", "query"),
        ("jina", "task", "retrieval.passage", "document"),
        ("jina", "task", "nl2code.query", "query"),
        ("jina", "task", "code.passage", "document"),
        ("jina", "task", "text-matching", "similarity"),
        ("jina", "task", "classification", "classification"),
        ("jina", "task", "separation", "clustering"),
    ],
)
async def test_the_purpose_of_a_text_chooses_the_models_prompt(name, field, word, task):
    """What an API calls a query, a document and so on gets the prompt that the model has for it."""
    async with assembled(fake_model(HashBackend(), prompts=PROMPTS)) as parts:
        _, vectors = await embed(parts, name, ["text"], **{field: word})
    assert np.array_equal(vectors[0], vector_of(PROMPTS[task] + "text"))


@pytest.mark.parametrize("prompt", ["query", "query:", "query: "])
async def test_a_prompt_is_set_apart_from_the_text(parts, prompt):
    """Mixedbread's callers leave out the colon, the space, or nothing, and mean the same."""
    _, vectors = await embed(parts, "mixedbread", ["text"], prompt=prompt, normalized=False)
    assert np.array_equal(vectors[0], vector_of("query: text"))


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("cohere", {}, slice(512)),
        ("cohere", {"truncate": "END"}, slice(512)),
        ("cohere", {"truncate": "START"}, slice(-512, None)),
        ("cohere", {"truncate": "NONE"}, None),
        ("jina", {}, None),
        ("jina", {"truncate": True}, slice(512)),
        ("voyage", {}, slice(512)),
        ("voyage", {"truncation": None}, slice(512)),
        ("voyage", {"truncation": False}, None),
        ("mixedbread", {"normalized": False}, slice(512)),
    ],
)
async def test_an_over_long_text_is_cut_or_refused_as_the_api_has_it(parts, name, options, kept):
    """Each API's own default holds, and so does what the request says."""
    text = "a" * 300 + "b" * 300
    status, vectors = await embed(parts, name, ["short", text], **options)
    if kept is None:
        assert status == 400
        assert "600 tokens" in json.dumps(vectors)
    else:
        assert np.array_equal(vectors[1], vector_of(text[kept]))


async def test_cohere_is_told_which_texts_were_cut(parts):
    """A cut text shows in `meta.warnings`; without one, there are none."""
    _, reply = await ask(parts, "/v1/embed", {"texts": ["a", "b" * 600]})
    assert reply["meta"]["warnings"] == ["longer than the model reads, and cut: the texts at 1"]
    _, reply = await ask(parts, "/v1/embed", {"texts": ["a"]})
    assert "warnings" not in reply["meta"]


async def test_smaller_forms_are_those_of_the_vector(parts):
    """Integers keep the direction, and bits its signs, the first number in the highest bit."""
    vector = vector_of("text")
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]

    _, reply = await ask(parts, "/v2/embed", {"texts": ["text"], "embedding_types": types})

    forms = {form: rows[0] for form, rows in reply["embeddings"].items()}
    assert list(forms) == types
    assert np.array_equal(np.frombuffer(base64.b64decode(forms["base64"]), "<f4"), vector)
    assert np.array_equal(np.unpackbits(np.uint8(forms["ubinary"])), vector > 0)
    assert np.array_equal(np.int16(forms["binary"]), np.int16(forms["ubinary"]) - 128)
    assert np.array_equal(np.int16(forms["uint8"]), np.int16(forms["int8"]) + 128)
    assert np.float64(forms["int8"]) @ vector / np.linalg.norm(np.float64(forms["int8"])) > 0.9999


@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
async def test_voyages_base64_holds_the_numbers_of_the_dtype(parts, dtype):
    """Its client reads the bytes as int8 or uint8, and finds what it would have found in the list."""
    body = {"input": ["text"], "output_dtype": dtype}
    _, numbers = await ask(parts, "/v1/embeddings", body)
    _, packed = await ask(parts, "/v1/embeddings", {**body, "encoding_format": "base64"})

    read_as = np.int8 if dtype in ("int8", "binary") else np.uint8
    unpacked = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), read_as)
    assert unpacked.tolist() == numbers["data"][0]["embedding"]


@pytest.mark.parametrize("asked", [{"normalized": True}, {}])
async def test_mixedbread_gives_unit_length_unless_told_otherwise(asked):
    """Even where the model's own pipeline does not; `normalized: false` leaves it out."""
    async with assembled(fake_model(LogitBackend(labels=4), dimensions=4)) as parts:
        _, vectors = await embed(parts, "mixedbread", ["a"], **asked)
        _, raw = await embed(parts, "mixedbread", ["a"], normalized=False)
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(raw) > 1.5


async def test_each_chunk_knows_its_document(parts):
    """The hash of an input stands at each of its tokens: chunks that are read together have the hash of the whole."""
    body = {"inputs": [["to ", "be"], ["be"], ["be"]]}
    _, reply = await ask(parts, "/v1/contextualizedembeddings", body)

    documents = [np.float32([chunk["embedding"] for chunk in document["data"]]) for document in reply["data"]]
    assert [document["index"] for document in reply["data"]] == [0, 1, 2]
    np.testing.assert_allclose(documents[0], [vector_of("to be")] * 2, atol=1e-6)
    np.testing.assert_allclose(documents[1], [vector_of("be")], atol=1e-6)
    assert reply["usage"]["total_tokens"] == 5 + 2 + 2


@pytest.mark.parametrize(
    "inputs", [[], [[]], [["a"], []], [["a"], [""]], [["a"]] * 1001, ["a"], [["a" * 300, "b" * 300]]]
)
async def test_a_document_without_chunks_spoils_the_request_alone(parts, inputs):
    """One bad document refuses its request with the reason; the next request is answered."""
    status, reply = await ask(parts, "/v1/contextualizedembeddings", {"inputs": inputs})
    assert (status, list(reply)) == (400, ["detail"])
    assert (await ask(parts, "/v1/contextualizedembeddings", {"inputs": [["a"]]}))[0] == 200


async def test_chunks_are_not_made_here(parts):
    """A request to cut documents is refused: vectors of whole documents would not be what was asked for."""
    body = {"inputs": [["a"]], "enable_auto_chunking": True}
    status, reply = await ask(parts, "/v1/contextualizedembeddings", body)
    assert status == 400
    assert "chunks" in reply["detail"]


@pytest.mark.parametrize("extra", [{"dimensions": 8}, {"late_chunking": True}])
async def test_token_vectors_go_with_nothing_that_would_be_ignored(parts, extra):
    """Jina's return_multivector has no cut and no context: asking for either is refused."""
    status, reply = await ask(parts, "/v1/embeddings", {"input": ["a"], "return_multivector": True, **extra})
    assert status == 422
    assert "return_multivector" in reply["detail"]


# Rerank


@pytest.fixture
async def reranker():
    """Return a server's parts around a cross-encoder."""
    async with assembled(fake_model(LogitBackend(), kind="rerank", dimensions=1)) as parts:
        yield parts


def score_of(query, document):
    """Return the sigmoid of the logit that the fake cross-encoder gives a pair."""
    pair = [*byte_tokenizer().encode([query], truncate=False)[0].ids]
    pair += [*byte_tokenizer().encode([document], truncate=False)[0].ids]
    return 1 / (1 + np.exp(-6 * np.float64(hash_vector(pair)[0])))


@pytest.mark.parametrize("name", RERANK)
async def test_documents_come_by_their_score(reranker, name):
    """Every API lists the best first, each by its place in the request, and no more than asked for."""
    path, field, list_name, score_name = RERANK[name]
    documents = [f"document {i}" for i in range(20)]
    scores = np.array([score_of("query", document) for document in documents])
    top = "top_k" if name in ("voyage", "mixedbread") else "top_n"

    status, reply = await ask(reranker, path, {"query": "query", field: documents, top: 7})

    assert status == 200
    order = [item["index"] for item in reply[list_name]]
    assert order == np.argsort(-scores)[:7].tolist()
    np.testing.assert_allclose([item[score_name] for item in reply[list_name]], scores[order], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "option", "unasked", "asked"),
    [
        ("cohere", "return_documents", None, {"text": "a"}),
        ("jina", "return_documents", {"text": "a"}, {"text": "a"}),
        ("voyage", "return_documents", None, "a"),
        ("mixedbread", "return_input", None, "a"),
    ],
)
async def test_documents_are_returned_as_the_api_has_it(reranker, name, option, unasked, asked):
    """As an object or a text, and without being asked for at Jina alone; `false` always leaves them out."""
    path, field, list_name, _ = RERANK[name]
    key = "input" if name == "mixedbread" else "document"
    for given, wanted in (({}, unasked), ({option: True}, asked), ({option: False}, None)):
        _, reply = await ask(reranker, path, {"query": "q", field: ["a"], **given})
        assert reply[list_name][0].get(key) == wanted


async def test_an_objects_fields_are_ranked_in_the_order_named(reranker):
    """The values stand one under another; without rank_fields, `text` alone counts."""
    document = {"title": "a", "year": 1600, "text": "b"}
    for rank_fields, text in ((["year", "title"], "1600\na"), (["title", "none"], "a"), (None, "b")):
        body = {"query": "q", "documents": [document], "rank_fields": rank_fields}
        _, reply = await ask(reranker, "/v1/rerank", body)
        assert reply["results"][0]["relevance_score"] == pytest.approx(score_of("q", text), abs=1e-6)


async def test_searches_are_counted_by_the_hundred(reranker):
    """Cohere bills a query with 101 documents as two searches."""
    for count, units in ((1, 1), (100, 1), (101, 2)):
        _, reply = await ask(reranker, "/v2/rerank", {"query": "q", "documents": ["a"] * count})
        assert reply["meta"]["billed_units"] == {"search_units": units}


# Tokens and models


async def test_cohere_tokens_are_the_models_without_special_ones(minilm):
    """Ids and strings are the tokenizer's, and detokenizing gives the text again."""
    async with assembled(minilm) as parts:
        _, reply = await ask(parts, "/v1/tokenize", {"text": "unbelievable vectors"})
        _, text = await ask(parts, "/v1/detokenize", {"tokens": reply["tokens"]})
    expected = minilm.tokenizer.tokens("unbelievable vectors", special_tokens=False)
    assert reply["tokens"] == [token.id for token in expected]
    assert "".join(reply["token_strings"]) == "unbelievablevectors"
    assert text["text"] == "unbelievable vectors"


async def test_pages_of_models_add_up_to_all():
    """Following next_page_token gives every model once, and ends."""
    async with assembled(models={"allow_models": ("*",)}) as parts:
        names, query = [], {"page_size": "7"}
        while query:
            _, reply = await ask(parts, "/v1/models", b"", method="GET", query=query)
            assert 1 <= len(reply["models"]) <= 7
            names += [model["name"] for model in reply["models"]]
            token = reply.get("next_page_token")
            query = {"page_size": "7", "page_token": token} if token else None
        assert names == [status.id for status in parts.service.models()]
        _, reply = await ask(parts, "/v1/models", b"", method="GET", query={"endpoint": "rerank", "page_size": "1000"})
        assert {name for model in reply["models"] for name in model["endpoints"]} >= {"embed", "rerank"}
        assert all("rerank" in model["endpoints"] for model in reply["models"])


@pytest.mark.parametrize("query", [{"page_size": "0"}, {"page_size": "x"}, {"page_token": "-1"}])
async def test_a_page_that_cannot_be_is_refused(parts, query):
    """Negative control of the above: what is no number is 400, and no endless list."""
    status, reply = await ask(parts, "/v1/models", b"", method="GET", query=query)
    assert (status, list(reply)) == (400, ["message", "id"])


async def test_mixedbread_says_who_is_there_under_its_prefix_alone(parts):
    """`GET /` is another API's at the root."""
    assert await ask(parts, "/mixedbread/", b"", method="GET") == (200, {"name": "quiver", "version": __version__})
    at_root = await send(parts, "/", b"", method="GET")
    assert b"quiver" not in at_root.body
