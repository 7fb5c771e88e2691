"""The settings: one frozen dataclass for each component that reads them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs

from quiver.config.accounts import AccountsConfig
from quiver.config.cache import CacheConfig
from quiver.config.jobs import JobsConfig
from quiver.config.scale import ScaleConfig
from quiver.config.setting import Secret, setting
from quiver.config.tls import TlsConfig

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
ANY = "*"
"""In a list of models: every one of the catalogue."""
Dtype = Literal["auto", "float32", "float16", "bfloat16", "int8"]
BackendName = Literal["auto", "onnx", "torch", "ct2"]
TokenIds = Literal["native", "cl100k", "refuse"]
MetricsFamily = Literal["tei", "inference", "fastembed"]
PoolingName = Literal["auto", "mean", "cls", "last_token", "splade"]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The listener, and what it refuses before anyone reads it."""

    host: str = setting(
        "127.0.0.1",
        "Address to listen on; 0.0.0.0 for every interface.",
        also=("HOST", "HOSTNAME", "INFERENCE_HOSTNAME", "INFINITY_HOST", "--hostname"),
    )
    port: int = setting(8000, "TCP port to listen on.", also=("PORT", "INFERENCE_PORT", "INFINITY_PORT", "-p"))
    tcp: bool = setting(True, "Listen on the port; false: in `socket_dir` alone.")
    socket_dir: Path | None = setting(
        None,
        "Directory for unix sockets beside the port: rest.sock has every API, rpc.sock JSON-RPC, admin.sock the dashboard. "
        "Whoever is in a file's group may connect.",
        also=("PATH_SOCKETS/hero_embedder_provider",),
    )
    processes: int = setting(
        1,
        "Server processes on this machine, at one port and its sockets; cores, memory and limits are divided between "
        "them. More than 1 needs Linux.",
    )
    url_prefix: str = setting(
        "",
        "Path that may stand before every route (/v1, or what a proxy leaves there); empty: none.",
        also=("INFINITY_URL_PREFIX",),
    )
    api_key: Secret = setting(
        Secret(""),
        "Key that every call but health checks must bring; empty: no key is asked for.",
        also=("API_KEY", "INFINITY_API_KEY"),
    )
    max_body_bytes: int = setting(
        16 << 20,
        "Largest body of a request, in bytes; a larger one is answered 413.",
        also=("PAYLOAD_LIMIT", "--payload-limit"),
    )
    max_concurrent_requests: int = setting(
        0,
        "Most requests that are at work at once; more wait for `queue_seconds`, and are then refused; 0: no bound.",
        also=("MAX_CONCURRENT_REQUESTS", "INFERENCE_MAX_CONCURRENT_REQUESTS", "RUNPOD_MAX_CONCURRENCY"),
    )
    queue_seconds: float = setting(
        0.0,
        "How long a request over `max_concurrent_requests` waits for its turn, in seconds; 0: not at all.",
        also=("INFERENCE_QUEUE_TIMEOUT_MS:ms",),
    )
    timeout_seconds: float = setting(
        120.0,
        "A request's deadline: how long it may take before it is answered 504, in seconds. A request may say less by "
        "`x-request-timeout` (in seconds), or as OpenAI's clients do. What would probably not be done in time is "
        "refused at once.",
    )
    max_inflight_bytes: int = setting(
        256 << 20, "Most bytes of request bodies at work at once; a request over it is refused with 429."
    )
    max_memory_bytes: int = setting(
        0,
        "Memory above which new work is refused with 429; 0: 85 % of what the container or the machine has.",
    )
    header_seconds: float = setting(10.0, "How long a client may take to send a request's head, in seconds.")
    body_seconds: float = setting(30.0, "How long a client may take to send a request's body, in seconds.")
    write_seconds: float = setting(
        30.0, "How long a client may take none of its reply, before its connection is cut, in seconds."
    )
    max_header_bytes: int = setting(16 << 10, "Largest head of a request, in bytes; a larger one is answered 431.")
    drain_seconds: float = setting(30.0, "How long a stopping server lets running requests finish, in seconds.")
    drain_delay_seconds: float = setting(
        0.2,
        "How long a stopping server still takes new requests, while /health/ready says 503 already, in seconds: as long "
        "as a load balancer needs to notice.",
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        "Origins that browsers may call from, * for any; empty: none.",
        also=(
            "CORS_ALLOWED_ORIGINS",
            "CORS_ALLOW_ORIGIN",
            "INFINITY_PERMISSIVE_CORS=*",
            "--cors-allow-origin",
            "--permissive-cors=*",
        ),
    )
    dashboard: bool = setting(
        False,
        "Show the dashboard at /admin, at the port too; a key with the scope admin opens it. At admin.sock it always is.",
    )
    root_dialects: tuple[str, ...] = setting(
        (),
        "APIs that own the root's paths which they share with others, where a request itself does not tell; the first "
        "that claims a path gets it. Under its own prefix (/tei, /cohere, …) each API is always whole.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Least level that is logged.", also=("LOG_LEVEL", "INFINITY_LOG_LEVEL")
    )
    log_format: Literal["auto", "text", "json"] = setting(
        "auto",
        "How log lines look; auto: text at a terminal, JSON elsewhere.",
        also=("LOG_FORMAT", "JSON_OUTPUT=json", "--json-output=json"),
    )
    metrics_families: tuple[MetricsFamily, ...] = setting(
        (), "Systems whose metrics /metrics shows beside Quiver's own: tei (te_…), inference (inference_…), fastembed."
    )
    otlp_endpoint: str = setting(
        "",
        "Collector of OpenTelemetry to send traces to, by gRPC (http://localhost:4317; https:// with TLS); empty: none. "
        "Needs the extra `otel`.",
        also=("OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    )
    otlp_service_name: str = setting(
        "quiver",
        "What the server is called in its traces.",
        also=("OTLP_SERVICE_NAME", "OTEL_SERVICE_NAME", "SERVICE_NAME"),
    )
    otlp_traces: bool = setting(
        True, "Send traces where `otlp_endpoint` is set; false: none all the same.", also=("OTEL_ENABLED",)
    )
    otlp_sample_ratio: float = setting(
        1.0,
        "Part of the traces that is sent, from 0 to 1; a request that belongs to a trace goes with it, sent or not.",
        also=("OTEL_SAMPLE_RATIO",),
    )


@dataclass(frozen=True, slots=True)
class ModelsConfig:
    """Which models, from where, in which arithmetic."""

    model: tuple[str, ...] = setting(
        (DEFAULT_MODEL,),
        "Model to serve: a hub id, an alias, or a local directory (starting with / or .). Repeat it for more; "
        "the first answers requests that name none. * lets a request name any model of the catalogue.",
        also=(
            "MODEL_ID",
            "MODEL_NAMES",
            "INFINITY_MODEL_ID",
            "INFERENCE_ALLOWED_EMBEDDING_MODELS+INFERENCE_ALLOWED_RERANK_MODELS",
            "--model-id",
            "--model-name-or-path",
        ),
    )
    served_model_name: tuple[str, ...] = setting(
        (),
        "What the model is called here, beside its own name; with several models, one for each.",
        also=("SERVED_MODEL_NAME", "INFINITY_SERVED_MODEL_NAME"),
    )
    revision: tuple[str, ...] = setting(
        (),
        "Commit, tag or branch of the model's repository, instead of the one that the catalogue has. One for all "
        "models, or one for each.",
        also=("REVISION", "INFINITY_REVISION"),
    )
    backend: tuple[BackendName, ...] = setting(
        ("auto",),
        "Runtime: onnx, torch (extra `torch`: GPUs) or ct2 (extra `ct2`); auto: torch where it finds a GPU, else onnx. "
        "One for all models, or one for each in their order.",
        also=("BACKEND", "INFINITY_ENGINE", "--engine"),
    )
    dtype: tuple[Dtype, ...] = setting(
        ("auto",),
        "Arithmetic: float32, int8 (with a scale of its own for each token), on a GPU bfloat16 or float16; auto: the "
        "best that keeps the model's quality. One for all models, or one for each.",
        also=("DTYPE", "DTYPES", "INFINITY_DTYPE"),
    )
    pooling: tuple[PoolingName, ...] = setting(
        ("auto",),
        "How the tokens of a text become one vector, where it should not be the model's own way: mean, cls, last_token, "
        "or splade for weights of words. One for all models, or one for each.",
        also=("POOLING", "INFINITY_POOLING_METHOD", "--pooling-method"),
    )
    batch_inputs: tuple[int, ...] = setting(
        (),
        "Most inputs in one forward pass; default: `batch_tokens` alone decides. One for all models, or one for each.",
        also=(
            "MAX_BATCH_REQUESTS",
            "BATCH_SIZES",
            "INFINITY_BATCH_SIZE",
            "INFERENCE_GPU_BATCH_SIZE",
            "--max-batch-requests",
            "--batch-size",
        ),
    )
    onnx_file: tuple[str, ...] = setting(
        (),
        "Run this ONNX file of the model's repository as it is (onnx/model_quantized.onnx), instead of a graph compiled "
        "from its weights. One for all models, or one for each.",
    )
    default_prompt_name: tuple[str, ...] = setting(
        (),
        "The model's own prompt that is put before each text of a request that names none (query, document, …). "
        "One for all models, or one for each.",
        also=("DEFAULT_PROMPT_NAME",),
    )
    default_prompt: str = setting(
        "", "Text that is put before each text of a request that names no prompt.", also=("DEFAULT_PROMPT",)
    )
    allow_models: tuple[str, ...] = setting(
        (),
        "Models that a request may name although they are not loaded: the first one that does has them fetched and "
        "loaded. * is every model of the catalogue.",
    )
    exclude_models: tuple[str, ...] = setting(
        (), "Patterns of what * leaves out (*-zh-*, *quantized*): of a model's id, or of the ONNX file that it runs."
    )
    any_model_name: bool = setting(
        False, "Answer requests for unknown models with the first model, instead of refusing them."
    )
    max_model_bytes: int = setting(
        0,
        "Most bytes of weights in memory; 0: no bound. Over it, models that were loaded on first use give way, the "
        "least recently used first.",
    )
    self_test: bool = setting(
        True,
        "Compare a loaded model with numbers that its true weights are known to give, and refuse it if they differ.",
    )
    data_dir: Path = setting(
        Path(platformdirs.user_data_dir("quiver")),
        "Directory of the server's state; a model in its models/ORG/NAME is taken before any other copy.",
    )
    hub_endpoint: str = setting("https://huggingface.co", "Hub to fetch models from.", also=("HF_ENDPOINT",))
    hub_token: Secret = setting(
        Secret(""),
        "Token for gated models.",
        also=("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN", "--hf-token", "--hf-api-token"),
    )
    hub_offline: bool = setting(False, "Never ask the hub; use what is on disk.", also=("HF_HUB_OFFLINE",))
    hub_cache: Path | None = setting(
        None,
        "Directory of the hub's cache; default: where huggingface_hub keeps it.",
        also=("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "--huggingface-hub-cache"),
    )

    def settings_of(self, name: str) -> "ModelSettings":
        """Return what is configured for a model; for one that is not in the list, what holds for all."""

        def value(setting: str) -> Any:
            given = getattr(self, setting)
            if len(given) > 1:
                return given[self.model.index(name)] if name in self.model else None
            return given[0] if given else None

        return ModelSettings(
            backend=value("backend") or "auto",
            dtype=value("dtype") or "auto",
            onnx_file=value("onnx_file") or None,
            prompt_name=value("default_prompt_name") or None,
            revision=value("revision") or None,
            pooling=value("pooling") or "auto",
            batch_inputs=value("batch_inputs") or None,
            served_name=(value("served_model_name") or None) if name in self.model else None,
        )


PER_MODEL = (
    "served_model_name",
    "revision",
    "backend",
    "dtype",
    "pooling",
    "batch_inputs",
    "onnx_file",
    "default_prompt_name",
)
"""Settings with one value for all models, or one for each in their order."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What is configured for one model."""

    backend: BackendName
    dtype: Dtype
    onnx_file: str | None
    prompt_name: str | None
    revision: str | None = None
    pooling: PoolingName = "auto"
    batch_inputs: int | None = None
    served_name: str | None = None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How inputs become batches, and how many may wait."""

    lanes: int = setting(0, "Forward passes at a time; 0: as many as cores.")
    batch_tokens: int = setting(
        0,
        "Most tokens in one forward pass; 0: as many as the backend does best with (224 on a CPU), and never "
        "more. A longer input runs alone.",
        also=("MAX_BATCH_TOKENS", "--max-batch-tokens"),
    )
    max_waiting_tokens: int = setting(
        1_000_000, "Most tokens that may wait for a lane; more is refused with 429 and a time to come back."
    )
    max_waiting_inputs: int = setting(
        0,
        "Most inputs that may wait for a lane, besides; 0: their tokens alone are counted.",
        also=("INFINITY_QUEUE_SIZE",),
    )
    max_client_batch_size: int = setting(
        2048,
        "Most inputs in one request.",
        also=("MAX_CLIENT_BATCH_SIZE", "INFERENCE_MAX_BATCH_SIZE", "INFINITY_MAX_CLIENT_BATCH_SIZE"),
    )
    max_wait_seconds: float = setting(
        0.0,
        "Longest that a request may be expected to take; if longer, it is refused at once with 429 and a time to come "
        "back; 0: up to its deadline.",
    )
    stall_seconds: float = setting(
        10.0,
        "How long a thread may be at the same piece of work (for a forward pass: or ten times what was to be expected) "
        "before it counts as stuck: then everyone who waits is answered 503, and the process ends with 70.",
    )
    encoders: int = setting(
        0,
        "Threads that turn texts into tokens; 0: as many as cores.",
        also=("TOKENIZATION_WORKERS", "--tokenization-workers"),
    )
    openai_ids: TokenIds = setting(
        "native",
        "What token ids that come by OpenAI's API are taken for: the model's own (native), or those of OpenAI's "
        "tokenizer (cl100k), as LangChain sends them; refuse takes none.",
    )
    cl100k_file: Path | None = setting(
        None,
        "File cl100k_base.tiktoken of OpenAI's tokenizer, or tiktoken's cache directory that holds it; read where "
        "`openai_ids` is cl100k.",
        also=("TIKTOKEN_CACHE_DIR",),
    )
    truncate: bool = setting(
        False,
        "Cut inputs that are longer than the model reads; false: refuse them.",
        also=("AUTO_TRUNCATE", "--auto-truncate"),
    )


@dataclass(frozen=True, slots=True)
class Config:
    """The whole tree; each part goes to the one component that reads it."""

    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    models: ModelsConfig = dataclasses.field(default_factory=ModelsConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    accounts: AccountsConfig = dataclasses.field(default_factory=AccountsConfig)
    jobs: JobsConfig = dataclasses.field(default_factory=JobsConfig)
    tls: TlsConfig = dataclasses.field(default_factory=TlsConfig)
    scale: ScaleConfig = dataclasses.field(default_factory=ScaleConfig)
