"""A checkpoint as transformers reads it: safetensors in a local directory, and no code but transformers' own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.models.weights import Weights

_CLASSES = {
    "embed": "AutoModel",
    "multi_vector": "AutoModel",
    "rerank": "AutoModelForSequenceClassification",
    "classify": "AutoModelForSequenceClassification",
    "sparse": "AutoModelForMaskedLM",
}
"""What transformers calls a model of each kind."""
_POOLER = "pooler."
"""The beginning of tensors that no vector comes from: some checkpoints leave them out."""


def read_model(files: ModelFiles, spec: ModelSpec, dtype: str) -> Any:
    """Read a directory as a module of transformers, ready to compute; raises `LoadError`."""
    kind = files.json("config.json").get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        version = f"transformers {transformers.__version__}"
        raise LoadError(f"{files.path('config.json')} names the architecture {kind!r}, which {version} does not know")
    Weights(files)  # finds what is missing or corrupt, and says so in our own words
    model, report = _read(files, spec, dtype)
    _check(files, spec, report)
    model.config.use_cache = False  # a decoder would keep keys and values for words that never come
    return model.eval().requires_grad_(False)


def _read(files: ModelFiles, spec: ModelSpec, dtype: str) -> tuple[Any, Mapping[str, Any]]:
    auto_class = getattr(transformers, "AutoModelForCausalLM" if spec.yes_no else _CLASSES[spec.kind])
    try:
        read: tuple[Any, Mapping[str, Any]] = auto_class.from_pretrained(
            files.root,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds, all of them about these files
        reason = str(error).strip().partition("\n")[0]
        raise LoadError(f"transformers cannot load {files.root}: {reason}") from error
    return read


def _check(files: ModelFiles, spec: ModelSpec, report: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers has made up a part."""
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        shapes = f"{tuple(stored)}, but config.json asks for {tuple(wanted)}"
        raise LoadError(f"{files.root}: the tensor {name!r} has the shape {shapes}")
    unused = _POOLER if spec.kind in {"embed", "multi_vector"} else ()
    for name in sorted(report["missing_keys"]):
        if not name.startswith(unused):
            raise LoadError(f"{files.root} has no tensor {name!r}, which config.json's architecture needs")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars, and from reporting what is found out here."""
    logging = transformers.utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
