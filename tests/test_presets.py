"""Each preset stands in for its system: it starts with nothing else to set, and answers that system's own calls."""

from pathlib import Path

import httpx
import pytest

from quiver import config
from quiver.app import DIALECTS
from quiver.config import PRESETS
from quiver.models.catalogue import Catalogue
from server_process import serving

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED = {"QUIVER_MODEL": MINILM, "HF_HUB_OFFLINE": "1"}
"""What a machine without a hub must say where a preset's own models come from it."""
DIMENSIONS = 384


def load(preset, **env):
    """Return a preset's settings."""
    return config.load(preset=preset, env=env, flags={})


def setting(settings, name):
    """Return a setting by its name."""
    return getattr(getattr(settings, config.FIELDS[name].section), name)


# Its own calls


def embedding_inference_api(http):
    """Embed as its document has it, as its code has it, and list what there is."""
    reply = http.post("/api/embed", json={"input": ["hello world", "search"], "model": "Qdrant/all-MiniLM-L6-v2-onnx"})
    assert (reply.json()["count"], reply.json()["dimensions"]) == (2, DIMENSIONS)
    batch = http.post("/api/embed/batch", json={"texts": ["hello world"], "model": MINILM}).json()
    assert batch["embeddings"] == [reply.json()["embeddings"][0]]
    (embedder,) = http.get("/api/embedders").json()
    assert (embedder["id"], embedder["model_type"]) == (MINILM, "embedding")
    assert http.get("/health/live").json() == {"status": "ok"}
    refused = http.post("/api/embed/batch", json={"texts": ["a"] * 129, "model": MINILM})
    assert (refused.status_code, refused.json()["code"]) == (400, "BAD_REQUEST")
    asked = http.options("/api/embed", headers={"origin": "http://a.example", "access-control-request-method": "POST"})
    assert asked.headers["access-control-allow-origin"] == "*"


def ai_embedding_inference_server(http):
    """Embed one text and two; three are too many."""
    body = {"truncate": True, "truncation_direction": "Right", "prompt_name": None, "dimensions": None}
    one = http.post("/api/v1/embed", json={"inputs": "Hello world", **body}).json()
    two = http.post("/api/v1/embed", json={"inputs": ["Hello world", "Second document"]}).json()
    assert [len(item["embedding"]) for item in (*one["data"], *two["data"])] == [DIMENSIONS] * 3
    assert set(one["timings"]) == {"tokenization", "queue", "inference"}
    assert http.post("/api/v1/embed", json={"inputs": ["a", "b", "c"]}).is_client_error


def infinity_worker(http):
    """Run a job in both of its forms."""
    plain = http.post("/runsync", json={"input": {"model": MINILM, "input": "Hello world"}}).json()
    assert plain["status"] == "COMPLETED"
    assert len(plain["output"]["data"][0]["embedding"]) == DIMENSIONS
    routed = {"openai_route": "/v1/embeddings", "openai_input": {"model": MINILM, "input": ["Hello world"] * 2}}
    of_openai = http.post("/v2/any/runsync", json={"input": routed}).json()
    assert [item["embedding"] for item in of_openai["output"][0]["data"]] == [
        plain["output"]["data"][0]["embedding"]
    ] * 2
    assert set(http.get("/health").json()) == {"jobs", "workers"}


def hero_embedder_provider(http):
    """Embed under OpenAI's API, and list the models."""
    reply = http.post("/v1/embeddings", json={"model": MINILM, "input": "Hello world"}).json()
    assert len(reply["data"][0]["embedding"]) == DIMENSIONS
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [MINILM]
    assert http.get("/health").json()["status"] == "ok"
    assert http.post("/v1/embeddings", json={"model": MINILM, "input": "word " * 600}).status_code == 200


def fastembed_query_api(http):
    """Embed one text."""
    reply = http.post("/v1/embed", json={"text": "how to reset password"}).json()
    assert (len(reply["embedding"]), reply["model"], reply["cached"]) == (DIMENSIONS, "all-MiniLM-L6-v2", False)
    assert http.get("/health").json()["status"] == "healthy"


def tei(http):
    """Embed under any model's name, cut what is too long, and show the limits."""
    vectors = http.post("/embed", json={"inputs": ["What is deep learning?", "word " * 600]}).json()
    assert [len(vector) for vector in vectors] == [DIMENSIONS] * 2
    info = http.get("/info").json()
    assert (info["max_client_batch_size"], info["auto_truncate"]) == (32, True)
    refused = http.post("/embed", json={"inputs": ["a"] * 33})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "Validation")
    assert http.get("/health").content == b""
    named = http.post("/v1/embeddings", json={"input": "What is deep learning?", "model": "tei"}).json()
    assert named["data"][0]["embedding"] == pytest.approx(vectors[0], abs=1e-6)


def infinity(http):
    """Embed under any model's name, and list the models, as Infinity does."""
    reply = http.post("/embeddings", json={"model": "whatever", "input": ["Hello world", "word " * 600]}).json()
    assert [len(item["embedding"]) for item in reply["data"]] == [DIMENSIONS] * 2
    assert reply["id"].startswith("infinity-")
    assert http.get("/models").json()["data"][0]["owned_by"] == "infinity"
    assert set(http.get("/health").json()) == {"unix"}


CALLS = {
    "ai-embedding-inference-server": ai_embedding_inference_server,
    "embedding-inference-api": embedding_inference_api,
    "fastembed-query-api": fastembed_query_api,
    "hero-embedder-provider": hero_embedder_provider,
    "infinity": infinity,
    "infinity-worker": infinity_worker,
    "tei": tei,
}
SIZES = {"small"}
"""Presets that are for a machine, and not for a system."""


def test_every_preset_has_its_calls():
    """None is shipped that nobody has tried."""
    assert {path.stem for path in PRESETS.glob("*.toml")} == {*CALLS, *SIZES}


@pytest.mark.parametrize("preset", CALLS)
def test_a_preset_answers_its_systems_calls(preset):
    """Started with nothing else, and without a hub, it speaks the API of its system at the natural paths."""
    has_its_models = {Catalogue.load().find(name).id for name in load(preset).models.model} == {MINILM}
    env = {} if has_its_models else EMBEDDED
    with serving("--preset", preset, **env) as server, httpx.Client(base_url=server.ready_url()) as http:
        CALLS[preset](http)


@pytest.mark.parametrize("preset", CALLS)
def test_a_presets_models_are_known(preset):
    """Each is in the catalogue, so that its files and its pooling are what they should be."""
    assert all(Catalogue.load().find(name) for name in load(preset).models.model)


@pytest.mark.parametrize("preset", CALLS)
def test_a_presets_apis_exist(preset):
    """Those that own the root are mounted."""
    assert set(load(preset).server.root_dialects) <= {dialect.name for dialect in DIALECTS}


@pytest.mark.parametrize(
    ("preset", "host", "port", "batch"),
    [
        ("embedding-inference-api", "0.0.0.0", 8090, 128),  # noqa: S104  what the system does
        ("ai-embedding-inference-server", "0.0.0.0", 8080, 2),  # noqa: S104
        ("infinity-worker", "0.0.0.0", 8000, 8192),  # noqa: S104
        ("hero-embedder-provider", "127.0.0.1", 8092, 2048),
        ("fastembed-query-api", "0.0.0.0", 8000, 2048),  # noqa: S104
        ("tei", "0.0.0.0", 3000, 32),  # noqa: S104
        ("infinity", "0.0.0.0", 7997, 2048),  # noqa: S104
    ],
)
def test_a_preset_listens_where_its_system_does(preset, host, port, batch):
    """Address, port and the size of a request are those of its document."""
    settings = load(preset)
    assert (settings.server.host, settings.server.port, settings.engine.max_client_batch_size) == (host, port, batch)


# Its names


NAMES = {
    "embedding-inference-api": [
        ("INFERENCE_HOSTNAME", "127.0.0.1", "host", "127.0.0.1"),
        ("INFERENCE_PORT", "9000", "port", 9000),
        ("INFERENCE_ALLOWED_EMBEDDING_MODELS", "a/b,c/d", "model", ("a/b", "c/d")),
        ("INFERENCE_ALLOWED_EMBEDDING_MODELS", "*", "allow_models", ("*",)),
        ("INFERENCE_ALLOWED_EMBEDDING_MODELS", "*", "model", (MINILM,)),
        ("INFERENCE_ALLOWED_RERANK_MODELS", "e/f", "model", ("e/f",)),
        ("INFERENCE_MAX_BATCH_SIZE", "16", "max_client_batch_size", 16),
        ("INFERENCE_MAX_CONCURRENT_REQUESTS", "4", "max_concurrent_requests", 4),
        ("INFERENCE_QUEUE_TIMEOUT_MS", "1500", "queue_seconds", 1.5),
        ("HF_ENDPOINT", "https://hub.example", "hub_endpoint", "https://hub.example"),
        ("CORS_ALLOWED_ORIGINS", "https://a.example,https://b.example", "cors_origins", ("https://a.example", "https://b.example")),
        ("LOG_FORMAT", "pretty", "log_format", "text"),
        ("SERVICE_NAME", "mine", "otlp_service_name", "mine"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4317", "otlp_endpoint", "http://localhost:4317"),
        ("OTEL_ENABLED", "false", "otlp_traces", False),
        ("OTEL_SAMPLE_RATIO", "0.1", "otlp_sample_ratio", 0.1),
        ("INFERENCE_GPU_BATCH_SIZE", "32", "batch_inputs", (32,)),
        ("SERVER_SSL_ENABLED", "true", "tls", "on"),
        ("TLS_SERVER_CERT_PATH", "cert.pem", "tls_cert", "cert.pem"),
        ("TLS_SERVER_KEY_PATH", "key.pem", "tls_key", "key.pem"),
        ("SERVER_SSL_CERT_PATH", "cert.pem", "tls_cert", "cert.pem"),
        ("SERVER_SSL_KEY_PATH", "key.pem", "tls_key", "key.pem"),
    ],
    "ai-embedding-inference-server": [
        ("MODEL_ID", "BAAI/bge-large-en-v1.5", "model", ("BAAI/bge-large-en-v1.5",)),
        ("REVISION", "refs/pr/1", "revision", ("refs/pr/1",)),
        ("TOKENIZATION_WORKERS", "3", "encoders", 3),
        ("DTYPE", "float16", "dtype", ("float16",)),
        ("POOLING", "last-token", "pooling", ("last_token",)),
        ("MAX_CONCURRENT_REQUESTS", "4", "max_concurrent_requests", 4),
        ("MAX_BATCH_TOKENS", "1384", "batch_tokens", 1384),
        ("MAX_BATCH_REQUESTS", "5", "batch_inputs", (5,)),
        ("MAX_CLIENT_BATCH_SIZE", "8", "max_client_batch_size", 8),
        ("HOSTNAME", "127.0.0.1", "host", "127.0.0.1"),
        ("HOSTNAME", "web-7f9c", "host", "0.0.0.0"),  # noqa: S104
        ("PORT", "9000", "port", 9000),
        ("API_KEY", "key", "api_key", "key"),
        ("JSON_OUTPUT", "true", "log_format", "json"),
        ("OTLP_ENDPOINT", "http://localhost:4317", "otlp_endpoint", "http://localhost:4317"),
        ("OTLP_SERVICE_NAME", "mine", "otlp_service_name", "mine"),
    ],
    "infinity-worker": [
        ("MODEL_NAMES", "a/b;c/d", "model", ("a/b", "c/d")),
        ("BATCH_SIZES", "8", "batch_inputs", (8,)),
        ("BACKEND", "optimum", "backend", ("onnx",)),
        ("DTYPES", "fp16", "dtype", ("float16",)),
        ("DTYPES", "fp8", "dtype", ("int8",)),
        ("INFINITY_QUEUE_SIZE", "1000", "max_waiting_inputs", 1000),
        ("RUNPOD_MAX_CONCURRENCY", "10", "max_concurrent_requests", 10),
    ],
    "tei": [
        ("AUTO_TRUNCATE", "false", "truncate", False),
        ("DEFAULT_PROMPT_NAME", "query", "default_prompt_name", ("query",)),
        ("DEFAULT_PROMPT", "query: ", "default_prompt", "query: "),
        ("HF_TOKEN", "token", "hub_token", "token"),
        ("HUGGINGFACE_HUB_CACHE", "somewhere", "hub_cache", "somewhere"),
        ("SERVED_MODEL_NAME", "mine", "served_model_name", ("mine",)),
        ("PAYLOAD_LIMIT", "1000", "max_body_bytes", 1000),
        ("CORS_ALLOW_ORIGIN", "https://a.example", "cors_origins", ("https://a.example",)),
        ("LOG_LEVEL", "debug", "log_level", "debug"),
        ("OTLP_ENDPOINT", "https://collector.example:4317", "otlp_endpoint", "https://collector.example:4317"),
    ],
    "infinity": [
        ("INFINITY_MODEL_ID", "a/b;c/d;", "model", ("a/b", "c/d")),
        ("INFINITY_SERVED_MODEL_NAME", "mine", "served_model_name", ("mine",)),
        ("INFINITY_BATCH_SIZE", "16;", "batch_inputs", (16,)),
        ("INFINITY_REVISION", "main", "revision", ("main",)),
        ("INFINITY_ENGINE", "torch", "backend", ("torch",)),
        ("INFINITY_DTYPE", "bfloat16", "dtype", ("bfloat16",)),
        ("INFINITY_POOLING_METHOD", "cls", "pooling", ("cls",)),
        ("INFINITY_HOST", "127.0.0.1", "host", "127.0.0.1"),
        ("INFINITY_PORT", "9000", "port", 9000),
        ("INFINITY_URL_PREFIX", "/v1", "url_prefix", "/v1"),
        ("INFINITY_API_KEY", "key", "api_key", "key"),
        ("INFINITY_PERMISSIVE_CORS", "1", "cors_origins", ("*",)),
        ("INFINITY_LOG_LEVEL", "critical", "log_level", "error"),
        ("INFINITY_MAX_CLIENT_BATCH_SIZE", "10", "max_client_batch_size", 10),
    ],
    "hero-embedder-provider": [
        ("PATH_SOCKETS", "sockets", "socket_dir", "sockets/hero_embedder_provider"),
    ],
    "fastembed-query-api": [
        ("REDIS_URL", "redis://127.0.0.1:6379/9", "redis_url", "redis://127.0.0.1:6379/9"),
    ],
}  # fmt: skip
"""What the documents of each system list and Quiver has, by preset: the name, a value, and what it sets here."""


@pytest.mark.parametrize(
    ("preset", "name", "text", "field", "value"),
    [pytest.param(preset, *row, id=f"{preset}-{row[0]}-{row[1]}") for preset, rows in NAMES.items() for row in rows],
)
def test_a_systems_own_names_are_understood(preset, name, text, field, value):
    """What its deployments have in their environment says here what it said there, over the preset's own value."""
    found = setting(load(preset, **{name: text}), field)
    assert (str(found) if isinstance(found, Path) else getattr(found, "reveal", lambda: found)()) == value
    assert name == "HOSTNAME" or "*" in text or found != setting(load(preset), field)


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("ai-embedding-inference-server", "s3-embedding.server"),
        ("embedding-inference-api", "embedding-inference-api"),
        ("tei", "text-embeddings-inference.server"),
        ("infinity", "quiver"),
    ],
)
def test_a_preset_is_called_in_traces_what_its_system_is(preset, name):
    """The service has the name that its document has, and sends nothing until it is told where."""
    server = load(preset).server
    assert (server.otlp_service_name, server.otlp_endpoint) == (name, "")


@pytest.mark.parametrize("preset", CALLS)
def test_names_without_a_counterpart_stop_nothing(preset):
    """What another system has and Quiver has not, or calls others with, is no setting of ours, and no mistake either."""
    others = ("TLS_CLIENT_CERT_PATH", "TLS_CA_CERT_PATH", "CLIENT_MTLS_ENABLED", "RUST_LOG", "CUDA_ARENA_SIZE", "INFINITY_DEVICE",
              "OTEL_LOGS_ENABLED", "INFERENCE_MODEL_PATH")  # fmt: skip
    assert load(preset, **dict.fromkeys(others, "anything")) == load(preset)


def test_a_deployments_environment_works_as_it_is():
    """A server is configured by another system's names alone, and what they say is seen from outside."""
    env = {
        "MODEL_ID": MINILM,
        "AUTO_TRUNCATE": "false",
        "MAX_CLIENT_BATCH_SIZE": "3",
        "MAX_BATCH_TOKENS": "16384",
        "MAX_BATCH_REQUESTS": "4",
        "API_KEY": "key",
        "HOSTNAME": "b3f1c2d4e5a6",
        "HF_HUB_OFFLINE": "1",
    }
    with serving(
        "--preset", "tei", "--model-id", MINILM, "--auto-truncate", "--hostname", "127.0.0.1", **env
    ) as server:
        url = server.ready_url()
        assert url.startswith("http://127.0.0.1:")
        with httpx.Client(base_url=url, headers={"authorization": "Bearer key"}) as http:
            assert http.post("/embed", json={"inputs": ["word " * 600] * 3}).status_code == 200
            assert http.post("/embed", json={"inputs": ["a"] * 4}).status_code == 422
        assert httpx.post(f"{url}/embed", json={"inputs": "a"}).status_code == 401


def test_infinitys_prefix_gives_its_own_form():
    """Under /v1, where its users put it, the paths are Infinity's and not OpenAI's."""
    env = {"INFINITY_URL_PREFIX": "/v1", **EMBEDDED}
    with serving("--preset", "infinity", **env) as server, httpx.Client(base_url=server.ready_url()) as http:
        assert http.post("/v1/embeddings", json={"input": "a"}).json()["id"].startswith("infinity-")
        assert http.get("/v1/models").json()["data"][0]["owned_by"] == "infinity"
        assert "unix" in http.get("/health").json()
