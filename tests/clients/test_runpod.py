"""RunPod's package, unmodified."""

import os

import pytest

from conftest import EMBEDDER, QUERY, RERANKER, TEXTS

os.environ["RUNPOD_ENDPOINT_BASE_URL"] = f"{os.environ['CLIENTS_URL']}/v2"  # it is read when the package is imported
import runpod


@pytest.fixture(scope="module")
def endpoint():
    """Return an endpoint of RunPod's client: its id may be any."""
    return runpod.Endpoint("any-id", api_key="any")


@pytest.mark.client("runpod", "Endpoint.run_sync")
def test_run_sync(endpoint, assert_vectors, assert_ranked):
    """The output of a job that embeds, and of one that ranks."""
    embedded = endpoint.run_sync({"input": {"model": EMBEDDER, "input": TEXTS}})
    assert_vectors([item["embedding"] for item in embedded["data"]])
    ranked = endpoint.run_sync({"input": {"model": RERANKER, "query": QUERY, "docs": TEXTS}})
    assert_ranked([(item["index"], item["relevance_score"]) for item in ranked["results"]])


@pytest.mark.client("runpod", "Endpoint.run", "Job.status", "Job.output")
def test_run(endpoint, assert_vectors):
    """A job is taken at once, and its output is there in the end."""
    job = endpoint.run({"input": {"model": EMBEDDER, "input": TEXTS}})
    assert_vectors([item["embedding"] for item in job.output(timeout=10)["data"]])
    assert job.status() == "COMPLETED"


@pytest.mark.client("runpod", "Job.stream")
def test_stream(endpoint, assert_vectors):
    """The output of a job, as its only part."""
    (part,) = endpoint.run({"input": {"model": EMBEDDER, "input": TEXTS}}).stream()
    assert_vectors([item["embedding"] for item in part["data"]])


@pytest.mark.client("runpod", "Job.cancel")
def test_cancel(endpoint):
    """A job that has not ended by then is cancelled, and one that has keeps its end."""
    job = endpoint.run({"input": {"model": EMBEDDER, "input": TEXTS * 100}})
    assert job.cancel()["status"] in {"CANCELLED", "COMPLETED"}
    assert job.status() in {"CANCELLED", "COMPLETED"}


@pytest.mark.client("runpod", "Endpoint.health", "Endpoint.purge_queue")
def test_health_and_purge(endpoint):
    """Jobs and workers are counted, and nothing waits."""
    assert endpoint.health()["workers"]["ready"] >= 0
    assert endpoint.purge_queue()["removed"] == 0
