"""Unmodified clients against live servers; those that need environments of their own are in tests/clients/."""

import asyncio
import base64
import contextlib
import json

import cohere
import huggingface_hub
import numpy as np
import ollama
import openai
import pytest
from anyio.from_thread import start_blocking_portal

from conftest import listening
from fakes import LogitBackend, byte_tokenizer, fake_model, hash_model, hash_vector

LABELS = ("sad", "glad", "mad")
TEXTS = ["a dog", "the cat sat on the mat", "çà et là"]
QUERY = "a pet"


@pytest.fixture(scope="module")
def urls():
    """Run a server for each kind of model, in a thread of their own: the clients block."""
    models = {
        "embed": hash_model(),
        "rerank": fake_model(LogitBackend(), kind="rerank", dimensions=1),
        "classify": fake_model(LogitBackend(labels=3), kind="classify", labels=LABELS, dimensions=3),
    }
    with start_blocking_portal() as portal, contextlib.ExitStack() as servers:
        yield {
            kind: servers.enter_context(portal.wrap_async_context_manager(listening(model)))
            for kind, model in models.items()
        }


def logits(*texts, labels=1):
    """Return what `LogitBackend` gives a text, or a query and a document."""
    ids = np.concatenate([byte_tokenizer().encode([text], truncate=False)[0].ids for text in texts])
    return 6 * hash_vector(ids)[:labels]


def assert_vectors(vectors, texts=TEXTS):
    """Each text has the model's vector, in order."""
    wanted = [hash_vector(byte_tokenizer().encode([text], truncate=False)[0].ids) for text in texts]
    np.testing.assert_allclose(np.array(vectors, np.float32), wanted, atol=1e-6)


def assert_ranked(ranked, documents=TEXTS):
    """Pairs of index and score are all documents, the best first, with the model's scores."""
    scores = [float(1 / (1 + np.exp(-logits(QUERY, document)[0]))) for document in documents]
    wanted = sorted(enumerate(scores), key=lambda pair: -pair[1])
    assert [index for index, _ in ranked] == [index for index, _ in wanted]
    assert [score for _, score in ranked] == pytest.approx([score for _, score in wanted], abs=1e-6)


# openai


@pytest.mark.client("openai", "OpenAI.embeddings.create", "OpenAI.models.list", "OpenAI.models.retrieve")
def test_openai(urls):
    """Vectors in order, and the model in the list and by its name."""
    with openai.OpenAI(base_url=f"{urls['embed']}/v1", api_key="any") as client:
        assert_vectors([item.embedding for item in client.embeddings.create(model="hash", input=TEXTS).data])
        assert [model.id for model in client.models.list()] == ["test/hash"]
        assert client.models.retrieve("hash").id == "test/hash"


@pytest.mark.client("openai", "AsyncOpenAI.embeddings.create")
async def test_openai_async(urls):
    """The asynchronous client reads the same vectors."""
    async with openai.AsyncOpenAI(base_url=f"{urls['embed']}/v1", api_key="any") as client:
        reply = await client.embeddings.create(model="hash", input=TEXTS)
    assert_vectors([item.embedding for item in reply.data])


@pytest.mark.client(
    "openai",
    "AsyncOpenAI.files.create",
    "AsyncOpenAI.files.list",
    "AsyncOpenAI.files.retrieve",
    "AsyncOpenAI.files.content",
    "AsyncOpenAI.files.delete",
    "AsyncOpenAI.batches.create",
    "AsyncOpenAI.batches.retrieve",
    "AsyncOpenAI.batches.list",
    "AsyncOpenAI.batches.cancel",
)
async def test_openai_batches(urls):
    """A file goes in, a batch is done, its output is read; tests/test_batches.py has the rest."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": TEXTS}}
    async with openai.AsyncOpenAI(base_url=f"{urls['embed']}/v1", api_key="any") as client:
        file = await client.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch")
        assert (await client.files.retrieve(file.id)).id == file.id
        given = {"endpoint": "/v1/embeddings", "completion_window": "24h"}
        batch = await client.batches.create(input_file_id=file.id, **given)
        async with asyncio.timeout(20):
            while batch.status != "completed":
                await asyncio.sleep(0.05)
                batch = await client.batches.retrieve(batch.id)
        assert [one.id async for one in client.batches.list()] == [batch.id]
        output = json.loads((await client.files.content(batch.output_file_id)).text)
        assert_vectors([item["embedding"] for item in output["response"]["body"]["data"]])
        with pytest.raises(openai.BadRequestError):
            await client.batches.cancel(batch.id)
        assert (await client.files.delete(file.id)).deleted
        assert [one.id async for one in client.files.list()] == [batch.output_file_id]


@pytest.mark.client("openai", "AzureOpenAI.embeddings.create")
def test_azure_openai(urls):
    """The client of Azure's form names the model in the path."""
    with openai.AzureOpenAI(azure_endpoint=urls["embed"], api_version="2024-10-21", api_key="any") as client:
        assert_vectors([item.embedding for item in client.embeddings.create(model="hash", input=TEXTS).data])


# cohere


@pytest.fixture(params=[cohere.Client, cohere.ClientV2])
def cohere_client(request):
    """Return how to make each of Cohere's clients."""
    return lambda url: request.param("any", base_url=url)


@pytest.mark.client("cohere", "Client.embed", "ClientV2.embed")
@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecationWarning")  # its own, where it joins replies
def test_cohere_embed(urls, cohere_client):
    """Vectors as floats and as base64, however many the client sends at a time."""
    options = {"model": "hash", "input_type": "search_document", "embedding_types": ["float", "base64"]}
    with cohere_client(urls["embed"]) as client:
        reply = client.embed(texts=TEXTS, **options)
    assert_vectors(reply.embeddings.float_)
    assert_vectors([np.frombuffer(base64.b64decode(vector), "<f4") for vector in reply.embeddings.base64])


@pytest.mark.client("cohere", "Client.embed")
def test_cohere_embed_without_types(urls):
    """The first version's plain form gives a list, and more texts than one request may hold come back in order."""
    texts = [f"text number {i}" for i in range(200)]
    with cohere.Client("any", base_url=urls["embed"]) as client:
        assert_vectors(client.embed(texts=texts, model="hash", input_type="search_query").embeddings, texts)


@pytest.mark.client("cohere", "Client.rerank", "ClientV2.rerank")
def test_cohere_rerank(urls, cohere_client):
    """All documents, the best first, and only the best where so many are asked for."""
    with cohere_client(urls["rerank"]) as client:
        ranked = client.rerank(model="hash", query=QUERY, documents=TEXTS).results
        best = client.rerank(model="hash", query=QUERY, documents=TEXTS, top_n=1).results
    assert_ranked([(item.index, item.relevance_score) for item in ranked])
    assert best == ranked[:1]


@pytest.mark.client("cohere", "Client.tokenize", "ClientV2.tokenize", "Client.detokenize", "ClientV2.detokenize")
@pytest.mark.parametrize("offline", [True, False])
def test_cohere_tokenize(urls, cohere_client, offline):
    """The model's own token ids, and the text again; `offline` asks for a tokenizer first, and then the server."""
    with cohere_client(urls["embed"]) as client:
        tokens = client.tokenize(text="a dog", model="hash", offline=offline).tokens
        text = client.detokenize(tokens=tokens, model="hash", offline=offline).text
    assert tokens == byte_tokenizer().encode(["a dog"], truncate=False)[0].ids.tolist()
    assert text == "a dog"


@pytest.mark.client("cohere", "Client.models.list", "ClientV2.models.list")
def test_cohere_models(urls, cohere_client):
    """The served model, by Cohere's description."""
    with cohere_client(urls["embed"]) as client:
        assert [(model.name, model.context_length) for model in client.models.list().models] == [("test/hash", 512)]


def test_cohere_raises_its_own_exception(urls, cohere_client):
    """A model that is not served is the package's own NotFoundError."""
    with cohere_client(urls["embed"]) as client, pytest.raises(cohere.NotFoundError, match="not served here"):
        client.embed(texts=TEXTS, model="no-such-model", input_type="search_query", embedding_types=["float"])


# ollama


@pytest.fixture
def ollama_client(urls):
    """Return Ollama's client of the model that embeds."""
    with ollama.Client(host=urls["embed"]) as client:
        yield client


@pytest.mark.client("ollama", "Client.embed", "Client.embeddings")
def test_ollama_embed(ollama_client):
    """Vectors of many texts, and of one in the older form."""
    assert_vectors(ollama_client.embed(model="hash", input=TEXTS).embeddings)
    assert_vectors([ollama_client.embeddings(model="hash", prompt=text).embedding for text in TEXTS])


@pytest.mark.client("ollama", "Client.list", "Client.ps", "Client.show")
def test_ollama_models(ollama_client):
    """The served model, among all, among the running and by its name."""
    assert [model.model for model in ollama_client.list().models] == ["test/hash:latest"]
    assert [model.model for model in ollama_client.ps().models] == ["test/hash:latest"]
    assert "embedding" in ollama_client.show("hash").capabilities


def test_ollama_raises_its_own_exception(ollama_client):
    """A model that is not served is the package's own ResponseError, with 404."""
    with pytest.raises(ollama.ResponseError, match="model 'no-such-model' not found") as missing:
        ollama_client.embed(model="no-such-model", input="a")
    assert missing.value.status_code == 404


# huggingface_hub


@pytest.mark.client("huggingface_hub", "InferenceClient.feature_extraction")
@pytest.mark.parametrize("path", ["", "/embed"])
def test_feature_extraction(urls, path):
    """A vector for each text, at the root as at the path of its own."""
    with huggingface_hub.InferenceClient(base_url=urls["embed"] + path) as client:
        assert_vectors(np.concatenate([client.feature_extraction(text) for text in TEXTS]))


@pytest.mark.client("huggingface_hub", "InferenceClient.sentence_similarity")
@pytest.mark.parametrize("path", ["", "/similarity"])
def test_sentence_similarity(urls, path):
    """The cosine of each sentence with the first."""
    with huggingface_hub.InferenceClient(base_url=urls["embed"] + path) as client:
        similarities = client.sentence_similarity(TEXTS[0], other_sentences=TEXTS)
    vectors = [hash_vector(byte_tokenizer().encode([text], truncate=False)[0].ids) for text in TEXTS]
    np.testing.assert_allclose(similarities, [vector @ vectors[0] for vector in vectors], atol=1e-6)


@pytest.mark.client("huggingface_hub", "InferenceClient.text_classification")
@pytest.mark.parametrize("path", ["", "/predict"])
def test_text_classification(urls, path):
    """Every label with its probability, the likeliest first."""
    with huggingface_hub.InferenceClient(base_url=urls["classify"] + path) as client:
        found = client.text_classification(TEXTS[0])
    weights = np.exp(logits(TEXTS[0], labels=3))
    wanted = sorted(zip(weights / weights.sum(), LABELS, strict=True), reverse=True)
    assert [item.label for item in found] == [label for _, label in wanted]
    assert [item.score for item in found] == pytest.approx([float(score) for score, _ in wanted], abs=1e-6)


@pytest.mark.client("huggingface_hub", "InferenceClient.health_check", "InferenceClient.get_endpoint_info")
def test_endpoint_of_the_hubs_client(urls):
    """The endpoint says that it is well, and which model it runs."""
    with huggingface_hub.InferenceClient(urls["embed"], provider="hf-inference") as client:
        assert client.health_check()
        assert client.get_endpoint_info()["model_id"] == "test/hash"
