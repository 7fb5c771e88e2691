"""What a model that is not in the catalogue says of itself in its sentence-transformers files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Pooling

_POOLINGS: Mapping[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last_token"}
_LEGACY_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""One flag for each way of pooling, as sentence-transformers wrote them before `pooling_mode`."""

_POSITIONS_AFTER_PADDING = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"})
"""Architectures whose position table begins behind the padding token's row."""


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """What follows the transformer: the defaults are those of a repository without sentence-transformers files."""

    pooling: Pooling = "mean"
    normalize: bool = True


def read_spec(model_id: str, files: ModelFiles) -> ModelSpec:
    """Read a model's spec from its own files; raises `LoadError` for a step that is not supported."""
    config = files.json("config.json")
    dimensions = _integer(config, "hidden_size") or _integer(config, "dim")
    if not dimensions:
        raise LoadError(f"{files.path('config.json')} states no hidden_size: is it an encoder's?")
    pipeline = _read_pipeline(files, dimensions)
    return ModelSpec(
        id=model_id,
        weights=model_id,
        pooling=pipeline.pooling,
        normalize=pipeline.normalize,
        dimensions=dimensions,
        max_tokens=_max_tokens(files, config),
        prompts=_prompts(files),
    )


def _read_pipeline(files: ModelFiles, dimensions: int) -> _Pipeline:
    if not files.has("modules.json"):
        return _Pipeline()
    modules = files.json_list("modules.json")
    try:
        steps = [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
    except (TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"{files.path('modules.json')} does not list modules by type and path") from error
    match steps:
        case [("Transformer", ""), ("Pooling", str(path))]:
            return _Pipeline(_read_pooling(files, path, dimensions), normalize=False)
        case [("Transformer", ""), ("Pooling", str(path)), ("Normalize", _)]:
            return _Pipeline(_read_pooling(files, path, dimensions), normalize=True)
    chain = " → ".join(f"{kind} ({path})" if path else kind for kind, path in steps)
    raise LoadError(
        f"{files.path('modules.json')} asks for {chain}, but only Transformer → Pooling → Normalize is supported"
    )


def _read_pooling(files: ModelFiles, folder: str, dimensions: int) -> Pooling:
    name = f"{folder}/config.json"
    config = files.json(name)
    width = config.get("embedding_dimension", config.get("word_embedding_dimension", dimensions))
    if width != dimensions:
        raise LoadError(f"{files.path(name)} pools vectors of {width} numbers, but config.json says {dimensions}")
    modes = _pooling_modes(config)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        supported = ", ".join(_POOLINGS)
        raise LoadError(
            f"{files.path(name)} pools by {' + '.join(modes)}, but only {supported} are supported, one at a time"
        )
    if config.get("include_prompt") is False:
        raise LoadError(f"{files.path(name)} leaves prompts out of the pooling, which is not supported")
    return _POOLINGS[modes[0]]


def _pooling_modes(config: Mapping[str, Any]) -> Sequence[str]:
    if mode := config.get("pooling_mode"):
        return [mode] if isinstance(mode, str) else [str(part) for part in mode]
    return [mode for flag, mode in _LEGACY_POOLINGS.items() if config.get(flag)] or ["mean"]


def _max_tokens(files: ModelFiles, config: Mapping[str, Any]) -> int:
    positions = _integer(config, "max_position_embeddings")
    if positions and config.get("model_type") in _POSITIONS_AFTER_PADDING:
        padding = _integer(config, "pad_token_id")
        positions -= 2 if padding is None else padding + 1
    name = "sentence_bert_config.json"
    stated = _integer(files.json(name), "max_seq_length") if files.has(name) else None
    limits = [limit for limit in (stated, positions) if limit]
    if not limits:
        raise LoadError(f"{files.path('config.json')} states no max_position_embeddings, nor {name} a max_seq_length")
    return min(limits)


def _prompts(files: ModelFiles) -> Mapping[str, str]:
    name = "config_sentence_transformers.json"
    prompts = files.json(name).get("prompts") if files.has(name) else None
    if not prompts:
        return {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise LoadError(f"{files.path(name)} has prompts that are not texts by task")
    return prompts


def _integer(table: Mapping[str, Any], key: str) -> int | None:
    """Return a whole number, or None where it is absent, null or something else."""
    value = table.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
