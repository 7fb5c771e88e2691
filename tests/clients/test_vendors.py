"""voyageai, mixedbread, rerankers and langchain-openai, unmodified."""

import asyncio

import pytest
import voyageai
from langchain_openai import OpenAIEmbeddings
from mixedbread import Mixedbread, NotFoundError
from rerankers import Reranker

from conftest import EMBEDDER, QUERY, RERANKER, TEXTS


@pytest.fixture(scope="module")
def voyage(url):
    """Return Voyage's client."""
    return voyageai.Client(api_key="any", base_url=f"{url}/v1")


@pytest.fixture(scope="module")
def mixedbread(url):
    """Return Mixedbread's client."""
    with Mixedbread(base_url=url, api_key="any") as client:
        yield client


@pytest.mark.client("voyageai", "Client.embed")
@pytest.mark.parametrize("input_type", [None, "document"])
def test_voyage_embed(voyage, assert_vectors, input_type):
    """Vectors in order, with the tokens counted."""
    reply = voyage.embed(TEXTS, model=EMBEDDER, input_type=input_type)
    assert_vectors(reply.embeddings)
    assert reply.total_tokens > len(TEXTS)


@pytest.mark.client("voyageai", "Client.embed(output_dtype=…)")
@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
def test_voyage_embed_smaller_numbers(voyage, dtype):
    """A byte for each number, or for eight of them, in the range of its type."""
    vectors = voyage.embed(TEXTS, model=EMBEDDER, output_dtype=dtype).embeddings
    assert {len(vector) for vector in vectors} == {384 // 8 if "binary" in dtype else 384}
    assert all(type(number) is int for number in vectors[0])
    assert (min(vectors[0]) < 0) == (not dtype.startswith("u"))


@pytest.mark.client("voyageai", "AsyncClient.embed", "AsyncClient.rerank")
def test_voyage_async(url, assert_vectors, assert_ranked):
    """The asynchronous client reads the same."""

    async def ask():
        client = voyageai.AsyncClient(api_key="any", base_url=f"{url}/v1")
        return await client.embed(TEXTS, model=EMBEDDER), await client.rerank(QUERY, TEXTS, model=RERANKER)

    embedded, ranked = asyncio.run(ask())
    assert_vectors(embedded.embeddings)
    assert_ranked([(item.index, item.relevance_score) for item in ranked.results])


@pytest.mark.client("voyageai", "Client.rerank")
def test_voyage_rerank(voyage, assert_ranked):
    """All documents, the best first; the client puts their texts beside the scores."""
    ranked = voyage.rerank(QUERY, TEXTS, model=RERANKER).results
    assert_ranked([(item.index, item.relevance_score) for item in ranked])
    assert [item.document for item in ranked] == [TEXTS[item.index] for item in ranked]
    assert voyage.rerank(QUERY, TEXTS, model=RERANKER, top_k=1).results == ranked[:1]


def test_voyage_raises_its_own_exception(voyage):
    """A model that is not served is the package's own InvalidRequestError, with the reason."""
    with pytest.raises(voyageai.error.InvalidRequestError, match="no-such-model"):
        voyage.embed(TEXTS, model="no-such-model")


@pytest.mark.client("mixedbread", "Mixedbread.embed", "Mixedbread.embeddings.create")
def test_mixedbread_embed(mixedbread, assert_vectors):
    """Vectors in order, by either name of the call."""
    for call in (mixedbread.embed, mixedbread.embeddings.create):
        assert_vectors([item.embedding for item in call(model=EMBEDDER, input=TEXTS).data])


@pytest.mark.client("mixedbread", "Mixedbread.embed(encoding_format=[…])")
def test_mixedbread_embed_in_two_forms(mixedbread, assert_vectors):
    """Each item holds all the forms that were asked for."""
    data = mixedbread.embed(model=EMBEDDER, input=TEXTS, encoding_format=["float", "ubinary"]).data
    assert_vectors([item.embedding.float for item in data])
    assert {len(item.embedding.ubinary) for item in data} == {384 // 8}


@pytest.mark.client("mixedbread", "Mixedbread.rerank")
def test_mixedbread_rerank(mixedbread, assert_ranked):
    """All documents, the best first, with their texts where they are asked for."""
    reply = mixedbread.rerank(model=RERANKER, query=QUERY, input=TEXTS, return_input=True)
    assert_ranked([(item.index, item.score) for item in reply.data])
    assert [item.input for item in reply.data] == [TEXTS[item.index] for item in reply.data]


def test_mixedbread_raises_its_own_exception(mixedbread):
    """A model that is not served is the package's own NotFoundError."""
    with pytest.raises(NotFoundError, match="no-such-model"):
        mixedbread.embed(model="no-such-model", input=TEXTS)


@pytest.mark.client("rerankers", "Reranker(api_provider=…).rank", "Reranker(api_provider=…).score")
@pytest.mark.parametrize(
    ("provider", "path"),
    [
        ("cohere", "/v1/rerank"),
        ("cohere", "/v2/rerank"),
        ("jina", "/v1/rerank"),
        ("voyage", "/v1/rerank"),
        ("mixedbread.ai", "/v1/reranking"),
        ("text-embeddings-inference", "/rerank"),
    ],
)
def test_rerankers(url, assert_ranked, provider, path):
    """One client under five vendors' APIs: the same documents, the same scores."""
    ranker = Reranker(RERANKER, model_type="APIRanker", api_provider=provider, api_key="any", url=url + path)
    ranked = ranker.rank(QUERY, TEXTS)
    assert_ranked([(result.document.doc_id, result.score) for result in ranked.results])
    best = ranked.results[0]
    assert ranker.score(QUERY, best.document) == pytest.approx(best.score, abs=1e-6)


@pytest.mark.client("langchain-openai", "OpenAIEmbeddings.embed_documents", "OpenAIEmbeddings.embed_query")
@pytest.mark.parametrize("as_tokens", [True, False])
def test_langchain_openai(url, assert_vectors, as_tokens):
    """The same vectors, whether LangChain cuts texts into OpenAI's tokens, as it does unless told not to, or sends texts."""
    embeddings = OpenAIEmbeddings(
        base_url=f"{url}/v1", api_key="any", model=EMBEDDER, check_embedding_ctx_length=as_tokens
    )
    assert_vectors(embeddings.embed_documents(TEXTS))
    assert_vectors([embeddings.embed_query(text) for text in TEXTS])
