"""The settings: one frozen dataclass for each component that reads them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
ANY = "*"
"""In a list of models: every one of the catalogue."""
Dtype = Literal["auto", "float32", "float16", "bfloat16", "int8"]
BackendName = Literal["auto", "onnx", "torch", "ct2"]
TokenIds = Literal["native", "cl100k", "refuse"]
PoolingName = Literal["auto", "mean", "cls", "last_token", "splade"]


class Secret(str):
    """A string that prints as `***`; `reveal` gives its text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'" if self else "''"

    def __str__(self) -> str:
        return "***" if self else ""

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def reveal(self) -> str:
        """Return the text itself."""
        return "".join(self)


def _setting(default: Any, help_text: str, *, also: tuple[str, ...] = ()) -> Any:
    """Declare a field; `also` is what other systems call it, beside its own `QUIVER_…` and `--…`.

    NAME or --name   the same value
    NAME:ms          in milliseconds
    NAME=value       a switch that stands for a value
    NAME+NAME        two lists, one put after the other
    """
    return dataclasses.field(default=default, metadata={"help": help_text, "also": also})


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The listener, and what it refuses before anyone reads it."""

    host: str = _setting(
        "127.0.0.1",
        "Address to listen on; 0.0.0.0 for every interface.",
        also=("HOST", "HOSTNAME", "INFERENCE_HOSTNAME", "INFINITY_HOST", "--hostname"),
    )
    port: int = _setting(8000, "TCP port to listen on.", also=("PORT", "INFERENCE_PORT", "INFINITY_PORT", "-p"))
    url_prefix: str = _setting(
        "",
        "Path that may stand before every route (/v1, or what a proxy leaves there); empty: none.",
        also=("INFINITY_URL_PREFIX",),
    )
    api_key: Secret = _setting(
        Secret(""),
        "Key that every call but health checks must bring; empty: no key is asked for.",
        also=("API_KEY", "INFINITY_API_KEY"),
    )
    max_body_bytes: int = _setting(
        16 << 20,
        "Largest body of a request, in bytes; a larger one is answered 413.",
        also=("PAYLOAD_LIMIT", "--payload-limit"),
    )
    max_concurrent_requests: int = _setting(
        0,
        "Most requests that are at work at once; more wait for `queue_seconds`, and are then refused; 0: no bound.",
        also=("MAX_CONCURRENT_REQUESTS", "INFERENCE_MAX_CONCURRENT_REQUESTS", "RUNPOD_MAX_CONCURRENCY"),
    )
    queue_seconds: float = _setting(
        0.0,
        "How long a request over `max_concurrent_requests` waits for its turn, in seconds; 0: not at all.",
        also=("INFERENCE_QUEUE_TIMEOUT_MS:ms",),
    )
    timeout_seconds: float = _setting(
        120.0,
        "A request's deadline: how long it may take before it is answered 504, in seconds. A request may say less by "
        "`x-request-timeout` (in seconds), or as OpenAI's clients do. What would probably not be done in time is "
        "refused at once.",
    )
    max_wait_seconds: float = _setting(
        0.0,
        "Longest that a request may be expected to take; if longer, it is refused at once with 429 and a time to come "
        "back; 0: up to its deadline.",
    )
    max_inflight_bytes: int = _setting(
        256 << 20, "Most bytes of request bodies at work at once; a request over it is refused with 429."
    )
    max_memory_bytes: int = _setting(
        0,
        "Memory above which new work is refused with 429; 0: 85 % of what the container or the machine has.",
    )
    header_seconds: float = _setting(10.0, "How long a client may take to send a request's head, in seconds.")
    body_seconds: float = _setting(30.0, "How long a client may take to send a request's body, in seconds.")
    write_seconds: float = _setting(
        30.0, "How long a client may take none of its reply, before its connection is cut, in seconds."
    )
    max_header_bytes: int = _setting(16 << 10, "Largest head of a request, in bytes; a larger one is answered 431.")
    drain_seconds: float = _setting(30.0, "How long a stopping server lets running requests finish, in seconds.")
    drain_delay_seconds: float = _setting(
        0.2,
        "How long a stopping server still takes new requests, while /health/ready says 503 already, in seconds: as long "
        "as a load balancer needs to notice.",
    )
    cors_origins: tuple[str, ...] = _setting(
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
    root_dialects: tuple[str, ...] = _setting(
        (),
        "APIs that own the root's paths which they share with others, where a request itself does not tell; the first "
        "that claims a path gets it. Under its own prefix (/tei, /cohere, …) each API is always whole.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "Least level that is logged.", also=("LOG_LEVEL", "INFINITY_LOG_LEVEL")
    )
    log_format: Literal["auto", "text", "json"] = _setting(
        "auto",
        "How log lines look; auto: text at a terminal, JSON elsewhere.",
        also=("LOG_FORMAT", "JSON_OUTPUT=json", "--json-output=json"),
    )


@dataclass(frozen=True, slots=True)
class ModelsConfig:
    """Which models, from where, in which arithmetic."""

    model: tuple[str, ...] = _setting(
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
    served_model_name: tuple[str, ...] = _setting(
        (),
        "What the model is called here, beside its own name; with several models, one for each.",
        also=("SERVED_MODEL_NAME", "INFINITY_SERVED_MODEL_NAME"),
    )
    revision: tuple[str, ...] = _setting(
        (),
        "Commit, tag or branch of the model's repository, instead of the one that the catalogue has. One for all "
        "models, or one for each.",
        also=("REVISION", "INFINITY_REVISION"),
    )
    backend: tuple[BackendName, ...] = _setting(
        ("auto",),
        "Runtime: onnx, torch (extra `torch`: GPUs) or ct2 (extra `ct2`); auto: torch where it finds a GPU, else onnx. "
        "One for all models, or one for each in their order.",
        also=("BACKEND", "INFINITY_ENGINE", "--engine"),
    )
    dtype: tuple[Dtype, ...] = _setting(
        ("auto",),
        "Arithmetic: float32, int8 (with a scale of its own for each token), on a GPU bfloat16 or float16; auto: the "
        "best that keeps the model's quality. One for all models, or one for each.",
        also=("DTYPE", "DTYPES", "INFINITY_DTYPE"),
    )
    pooling: tuple[PoolingName, ...] = _setting(
        ("auto",),
        "How the tokens of a text become one vector, where it should not be the model's own way: mean, cls, last_token, "
        "or splade for weights of words. One for all models, or one for each.",
        also=("POOLING", "INFINITY_POOLING_METHOD", "--pooling-method"),
    )
    batch_inputs: tuple[int, ...] = _setting(
        (),
        "Most inputs in one forward pass; default: `batch_tokens` alone decides. One for all models, or one for each.",
        also=("MAX_BATCH_REQUESTS", "BATCH_SIZES", "INFINITY_BATCH_SIZE", "--max-batch-requests", "--batch-size"),
    )
    onnx_file: tuple[str, ...] = _setting(
        (),
        "Run this ONNX file of the model's repository as it is (onnx/model_quantized.onnx), instead of a graph compiled "
        "from its weights. One for all models, or one for each.",
    )
    default_prompt_name: tuple[str, ...] = _setting(
        (),
        "The model's own prompt that is put before each text of a request that names none (query, document, …). "
        "One for all models, or one for each.",
        also=("DEFAULT_PROMPT_NAME",),
    )
    default_prompt: str = _setting(
        "", "Text that is put before each text of a request that names no prompt.", also=("DEFAULT_PROMPT",)
    )
    allow_models: tuple[str, ...] = _setting(
        (),
        "Models that a request may name although they are not loaded: the first one that does has them fetched and "
        "loaded. * is every model of the catalogue.",
    )
    exclude_models: tuple[str, ...] = _setting(
        (), "Patterns of what * leaves out (*-zh-*, *quantized*): of a model's id, or of the ONNX file that it runs."
    )
    any_model_name: bool = _setting(
        False, "Answer requests for unknown models with the first model, instead of refusing them."
    )
    max_model_bytes: int = _setting(
        0,
        "Most bytes of weights in memory; 0: no bound. Over it, models that were loaded on first use give way, the "
        "least recently used first.",
    )
    self_test: bool = _setting(
        True,
        "Compare a loaded model with numbers that its true weights are known to give, and refuse it if they differ.",
    )
    data_dir: Path = _setting(
        Path(platformdirs.user_data_dir("quiver")),
        "Directory of the server's state; a model in its models/ORG/NAME is taken before any other copy.",
    )
    hub_endpoint: str = _setting("https://huggingface.co", "Hub to fetch models from.", also=("HF_ENDPOINT",))
    hub_token: Secret = _setting(
        Secret(""),
        "Token for gated models.",
        also=("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN", "--hf-token", "--hf-api-token"),
    )
    hub_offline: bool = _setting(False, "Never ask the hub; use what is on disk.", also=("HF_HUB_OFFLINE",))
    hub_cache: Path | None = _setting(
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

    lanes: int = _setting(0, "Forward passes at a time; 0: as many as cores.")
    batch_tokens: int = _setting(
        0,
        "Most tokens in one forward pass; 0: as many as the backend does best with (224 on a CPU), and never "
        "more. A longer input runs alone.",
        also=("MAX_BATCH_TOKENS", "--max-batch-tokens"),
    )
    max_waiting_tokens: int = _setting(
        1_000_000, "Most tokens that may wait for a lane; more is refused with 429 and a time to come back."
    )
    max_waiting_inputs: int = _setting(
        0,
        "Most inputs that may wait for a lane, besides; 0: their tokens alone are counted.",
        also=("INFINITY_QUEUE_SIZE",),
    )
    max_client_batch_size: int = _setting(
        2048,
        "Most inputs in one request.",
        also=("MAX_CLIENT_BATCH_SIZE", "INFERENCE_MAX_BATCH_SIZE", "INFINITY_MAX_CLIENT_BATCH_SIZE"),
    )
    stall_seconds: float = _setting(
        10.0,
        "How long a thread may be at the same piece of work (for a forward pass: or ten times what was to be expected) "
        "before it counts as stuck: then everyone who waits is answered 503, and the process ends with 70.",
    )
    encoders: int = _setting(
        0,
        "Threads that turn texts into tokens; 0: as many as cores.",
        also=("TOKENIZATION_WORKERS", "--tokenization-workers"),
    )
    openai_ids: TokenIds = _setting(
        "native",
        "What token ids that come by OpenAI's API are taken for: the model's own (native), or those of OpenAI's "
        "tokenizer (cl100k), as LangChain sends them; refuse takes none.",
    )
    cl100k_file: Path | None = _setting(
        None,
        "File cl100k_base.tiktoken of OpenAI's tokenizer, or tiktoken's cache directory that holds it; read where "
        "`openai_ids` is cl100k.",
        also=("TIKTOKEN_CACHE_DIR",),
    )
    truncate: bool = _setting(
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
