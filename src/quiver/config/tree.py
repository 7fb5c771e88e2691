"""The settings: one frozen dataclass for each component that reads them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
Dtype = Literal["auto", "float32", "float16", "bfloat16", "int8"]
BackendName = Literal["auto", "onnx", "torch", "ct2"]


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


def _setting(default: Any, help_text: str, *, env: tuple[str, ...] = ()) -> Any:
    """Declare a field; `env` lists the names that other systems give it, beside its own `QUIVER_…`."""
    return dataclasses.field(default=default, metadata={"help": help_text, "env": env})


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The listener, and what it refuses before anyone reads it."""

    host: str = _setting("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.", env=("HOST", "HOSTNAME"))
    port: int = _setting(8000, "TCP port to listen on.", env=("PORT",))
    api_key: Secret = _setting(
        Secret(""), "Key that every call but health checks must bring; empty: no key is asked for.", env=("API_KEY",)
    )
    max_body_bytes: int = _setting(16 << 20, "Largest body of a request, in bytes; a larger one is answered 413.")
    drain_seconds: float = _setting(30.0, "How long a stopping server lets running requests finish, in seconds.")
    cors_origins: tuple[str, ...] = _setting((), "Origins that browsers may call from; empty: none.")
    root_dialects: tuple[str, ...] = _setting(
        (),
        "APIs that own the root's paths which they share with others, where a request itself does not tell; the first "
        "that claims a path gets it. Under its own prefix (/tei, /cohere, …) each API is always whole.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "Least level that is logged.")
    log_format: Literal["auto", "text", "json"] = _setting(
        "auto", "How log lines look; auto: text at a terminal, JSON elsewhere."
    )


@dataclass(frozen=True, slots=True)
class ModelsConfig:
    """Which models, from where, in which arithmetic."""

    model: tuple[str, ...] = _setting(
        (DEFAULT_MODEL,),
        "Model to serve: a hub id, an alias, or a local directory (starting with / or .). Repeat it for more; "
        "the first answers requests that name none.",
        env=("MODEL_ID", "MODEL_NAMES"),
    )
    backend: tuple[BackendName, ...] = _setting(
        ("auto",),
        "Runtime: onnx, torch (extra `torch`: GPUs) or ct2 (extra `ct2`); auto: torch where it finds a GPU, else onnx. "
        "One for all models, or one for each in their order.",
        env=("BACKEND",),
    )
    dtype: tuple[Dtype, ...] = _setting(
        ("auto",),
        "Arithmetic: float32, int8 (with a scale of its own for each token), on a GPU bfloat16 or float16; auto: the "
        "best that keeps the model's quality. One for all models, or one for each.",
        env=("DTYPE", "DTYPES"),
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
        env=("DEFAULT_PROMPT_NAME",),
    )
    default_prompt: str = _setting(
        "", "Text that is put before each text of a request that names no prompt.", env=("DEFAULT_PROMPT",)
    )
    allow_models: tuple[str, ...] = _setting(
        (),
        "Models that a request may name although they are not loaded: the first one that does has them fetched and "
        "loaded. * is every model of the catalogue.",
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
    hub_endpoint: str = _setting("https://huggingface.co", "Hub to fetch models from.", env=("HF_ENDPOINT",))
    hub_token: Secret = _setting(Secret(""), "Token for gated models.", env=("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    hub_offline: bool = _setting(False, "Never ask the hub; use what is on disk.", env=("HF_HUB_OFFLINE",))
    hub_cache: Path | None = _setting(
        None, "Directory of the hub's cache; default: where huggingface_hub keeps it.", env=("HF_HUB_CACHE",)
    )

    def settings_of(self, name: str) -> "ModelSettings":
        """Return what is configured for a model; for one that is not in the list, what holds for all."""

        def value(setting: str) -> Any:
            given = getattr(self, setting)
            if len(given) > 1:
                return given[self.model.index(name)] if name in self.model else None
            return given[0] if given else None

        backend, dtype, onnx_file, prompt_name = map(value, PER_MODEL)
        return ModelSettings(backend or "auto", dtype or "auto", onnx_file or None, prompt_name or None)


PER_MODEL = ("backend", "dtype", "onnx_file", "default_prompt_name")
"""Settings with one value for all models, or one for each in their order."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What is configured for one model."""

    backend: BackendName
    dtype: Dtype
    onnx_file: str | None
    prompt_name: str | None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How inputs become batches, and how many may wait."""

    lanes: int = _setting(0, "Forward passes at a time; 0: as many as cores.")
    batch_tokens: int = _setting(
        0, "Most tokens in one forward pass; 0: the backend's own measure (128 on a CPU). A longer input runs alone."
    )
    max_waiting_tokens: int = _setting(
        1_000_000, "Most tokens that may wait for a lane; more is refused with 429 and a time to come back."
    )
    max_client_batch_size: int = _setting(2048, "Most inputs in one request.", env=("MAX_CLIENT_BATCH_SIZE",))
    timeout_seconds: float = _setting(120.0, "How long a request may take before it is answered 504, in seconds.")
    truncate: bool = _setting(
        False, "Cut inputs that are longer than the model reads; false: refuse them.", env=("AUTO_TRUNCATE",)
    )


@dataclass(frozen=True, slots=True)
class Config:
    """The whole tree; each part goes to the one component that reads it."""

    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    models: ModelsConfig = dataclasses.field(default_factory=ModelsConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
