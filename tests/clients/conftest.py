"""The server that the clients are tested against, and what it answers when it is asked without any client."""

import json
import os
import urllib.request

import pytest

TEXTS = ["a dog", "the cat sat on the mat", "çà et là"]
QUERY = "a pet"
EMBEDDER = "all-MiniLM-L6-v2"
RERANKER = "reranker"
CLASSIFIER = "classifier"


@pytest.fixture(scope="session")
def url():
    """Return the URL of the server that run.py has started."""
    return os.environ["CLIENTS_URL"]


@pytest.fixture(scope="session")
def post(url):
    """Return the function that posts JSON without any client's package."""

    def send(path, **body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)  # noqa: S310  our own URL
        with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310
            return json.load(reply)

    return send


@pytest.fixture(scope="session")
def expected_vectors(post):
    """Return the vectors of TEXTS."""
    return [item["embedding"] for item in post("/openai/v1/embeddings", model=EMBEDDER, input=TEXTS)["data"]]


@pytest.fixture(scope="session")
def expected_ranks(post):
    """Return index and score of TEXTS, the best first."""
    reply = post("/cohere/v2/rerank", model=RERANKER, query=QUERY, documents=TEXTS)
    return [(item["index"], item["relevance_score"]) for item in reply["results"]]


@pytest.fixture(scope="session")
def assert_vectors(expected_vectors):
    """Return the check that a client has read the vectors of TEXTS."""

    def check(vectors):
        assert len(vectors) == len(TEXTS)
        for vector, wanted in zip(vectors, expected_vectors, strict=True):
            assert list(vector) == pytest.approx(wanted, abs=1e-6)

    return check


@pytest.fixture(scope="session")
def assert_ranked(expected_ranks):
    """Return the check that a client has read index and score of TEXTS, the best first."""

    def check(ranked):
        assert [index for index, _ in ranked] == [index for index, _ in expected_ranks]
        assert [score for _, score in ranked] == pytest.approx([score for _, score in expected_ranks], abs=1e-6)

    return check
