"""infinity-client, unmodified."""

import time

import pytest
from infinity_client import Client
from infinity_client.api.default import classify, embeddings, health, models, rerank
from infinity_client.models import ClassifyInput, OpenAIEmbeddingInputText, RerankInput

from conftest import CLASSIFIER, EMBEDDER, QUERY, RERANKER, TEXTS


@pytest.fixture(scope="module", params=["", "/v1", "/infinity", "/infinity/v1"])
def client(request, url):
    """Return Infinity's client, at the root and under Infinity's prefix, and below each where its users put it."""
    with Client(base_url=url + request.param, raise_on_unexpected_status=True) as client:
        yield client


@pytest.mark.client("infinity-client", "embeddings.sync")
def test_embeddings(client, assert_vectors):
    """Vectors in order, with the tokens counted."""
    reply = embeddings.sync(client=client, body=OpenAIEmbeddingInputText(input_=TEXTS, model=EMBEDDER))
    assert_vectors([item.embedding for item in reply.data])
    assert reply.usage.total_tokens > len(TEXTS)


@pytest.mark.client("infinity-client", "rerank.sync")
def test_rerank(client, assert_ranked):
    """All documents, the best first, with their texts where they are asked for."""
    body = RerankInput(query=QUERY, documents=TEXTS, model=RERANKER, return_documents=True)
    ranked = rerank.sync(client=client, body=body).results
    assert_ranked([(item.index, item.relevance_score) for item in ranked])
    assert [item.document for item in ranked] == [TEXTS[item.index] for item in ranked]


@pytest.mark.client("infinity-client", "classify.sync")
def test_classify(client, post):
    """Every label of each text with its probability."""
    found = classify.sync(client=client, body=ClassifyInput(input_=TEXTS, model=CLASSIFIER)).data
    for labels, text in zip(found, TEXTS, strict=True):
        wanted = post("/infinity/classify", input=[text], model=CLASSIFIER)["data"][0]
        assert [label.to_dict() for label in labels] == wanted
        assert sum(label.score for label in labels) == pytest.approx(1, abs=1e-5)


@pytest.mark.client("infinity-client", "models.sync")
@pytest.mark.parametrize("client", ["", "/infinity", "/infinity/v1"], indirect=True)
def test_models(client):
    """The served models are listed with their owners; the root's /v1/models is OpenAI's."""
    listed = {model.id: model.owned_by for model in models.sync(client=client).data}
    assert {RERANKER, CLASSIFIER} < listed.keys()
    assert all(listed.values())


@pytest.mark.client("infinity-client", "health.sync(base_url=…/infinity)")
def test_health(url):
    """Under Infinity's own prefix the server says what time it is; at the root, /health has a word only."""
    with Client(base_url=f"{url}/infinity", raise_on_unexpected_status=True) as client:
        assert health.sync(client=client)["unix"] == pytest.approx(time.time(), abs=60)
