"""What a model that is not in the catalogue says of itself: in config.json, and in its sentence-transformers files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quiver.config import PoolingName
from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Pooling

Config = Mapping[str, Any]

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

_SIZES = ("hidden_size", "dim", "n_embd")
_POSITIONS = ("max_position_embeddings", "n_positions")
"""What architectures call these numbers: most of them, DistilBERT, and those that follow GPT-2."""
POSITIONS_AFTER_PADDING = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"})
"""Architectures whose position table begins behind the padding token's row."""
_NO_LIMIT = 1 << 24
"""A tokenizer without a limit states 1e30."""

_QUERY_TOKENS = 32
"""Length of a query where a multi-vector model states none, as in ColBERT's and PyLate's own code."""


def read_spec(model_id: str, files: ModelFiles) -> ModelSpec:
    """Read a model's spec from its own files; raises `LoadError` for what is not supported or would be a guess."""
    config = files.json("config.json")
    inner = config.get("text_config")  # models of texts and pictures keep apart what they say of either
    texts = inner if isinstance(inner, dict) else config
    dimensions = _first_integer(texts, _SIZES) or _integer(config, "projection_dim")
    if not dimensions:
        raise LoadError(f"{files.path('config.json')} states no hidden_size: is it an encoder's?")
    plain = ModelSpec(
        id=model_id,
        weights=model_id,
        pooling="mean",
        dimensions=dimensions,
        max_tokens=_max_tokens(files, texts),
        prompts=_prompts(files),
    )
    if files.has("modules.json"):
        return _with_modules(plain, files)
    return _by_architecture(plain, files, config)


def dense_folders(files: ModelFiles) -> tuple[str, ...]:
    """List the folders of a model's layers behind the transformer, in order; raises `LoadError`."""
    steps = _modules(files) if files.has("modules.json") else []
    return tuple(folder for kind, folder in steps if kind == "Dense")


def with_pooling(spec: ModelSpec, files: ModelFiles, pooling: PoolingName) -> ModelSpec:
    """Return the spec with the operator's way of pooling, where it gives vectors: nothing else is pooled."""
    if pooling in {"auto", spec.pooling} or spec.kind != "embed":
        return spec
    if pooling == "splade":
        return replace(_sparse(spec, files), dense=(), matryoshka=(), golden=None)
    return replace(spec, pooling=pooling, golden=None)


# Without sentence-transformers files


def _by_architecture(plain: ModelSpec, files: ModelFiles, config: Config) -> ModelSpec:
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if name.endswith("ForSequenceClassification"):
        return _classifier(plain, files, config)
    if name == "HF_ColBERT":
        return _colbert(plain, files)
    if name.endswith("ForCausalLM"):
        raise LoadError(
            f"{files.path('config.json')} is a language model's ({name}), and no modules.json says how it embeds texts: "
            "take a model of the catalogue, or one with sentence-transformers files"
        )
    if projection := _integer(config, "projection_dim"):  # CLIP's, of the token that ends a text
        return replace(plain, pooling="last_token", dimensions=projection)
    return plain


def _classifier(plain: ModelSpec, files: ModelFiles, config: Config) -> ModelSpec:
    """A cross-encoder gives one score for a pair, any other classifier one for each of its labels."""
    labels = _labels(files, config)
    if len(labels) == 1:
        return replace(plain, kind="rerank", pooling="cls", dimensions=1)
    multi_label = config.get("problem_type") == "multi_label_classification"
    return replace(
        plain, kind="classify", pooling="cls", dimensions=len(labels), labels=labels, multi_label=multi_label
    )


def _labels(files: ModelFiles, config: Config) -> tuple[str, ...]:
    names = config.get("id2label")
    if names is None:  # transformers does not write down its defaults
        return tuple(f"LABEL_{i}" for i in range(_integer(config, "num_labels") or 2))
    if not isinstance(names, dict) or not names or set(names) != {str(i) for i in range(len(names))}:
        raise LoadError(f"{files.path('config.json')} has an id2label that does not name its labels from 0 on")
    return tuple(str(names[str(i)]) for i in range(len(names)))


def _colbert(plain: ModelSpec, files: ModelFiles) -> ModelSpec:
    """A checkpoint of ColBERT's own code, which keeps its facts in a file of its own."""
    name = "artifact.metadata"
    facts = files.json(name)
    dimensions = _integer(facts, "dim")
    if not dimensions:
        raise LoadError(f"{files.path(name)} states no dim, the numbers in a token's vector")
    query, document = facts.get("query_token_id", "[unused0]"), facts.get("doc_token_id", "[unused1]")
    return replace(
        plain,
        kind="multi_vector",
        pooling="cls",
        dimensions=dimensions,
        query_tokens=_integer(facts, "query_maxlen") or _QUERY_TOKENS,
        prompts={"query": f"{query} ", "document": f"{document} "},
    )


# With sentence-transformers files


def _with_modules(plain: ModelSpec, files: ModelFiles) -> ModelSpec:
    steps = _modules(files)
    match steps:
        case [("Transformer", ""), ("Pooling", folder), *rest] if _is_tail(rest):
            return _pooled(plain, files, folder, normalize="Normalize" in dict(rest))
        case [("Transformer", ""), ("Dense", _), *rest] if _is_tail(rest):
            return _late_interaction(plain, files)
        case [("MLMTransformer" | "Transformer", ""), ("SpladePooling", folder)]:
            return _splade(plain, files, folder)
    chain = " → ".join(f"{kind} ({folder})" if folder else kind for kind, folder in steps)
    raise LoadError(
        f"{files.path('modules.json')} asks for {chain}, but only Transformer → Pooling → Normalize is supported, with "
        "Dense before Normalize or instead of Pooling, and Transformer → SpladePooling"
    )


def _modules(files: ModelFiles) -> Sequence[tuple[str, str]]:
    """Return the class and the folder of each step."""
    modules = files.json_list("modules.json")
    try:
        return [(module["type"].rpartition(".")[2], str(module["path"])) for module in modules]
    except (TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"{files.path('modules.json')} does not list modules by type and path") from error


def _is_tail(steps: Sequence[tuple[str, str]]) -> bool:
    """Tell whether there are layers only, and unit length behind them or not."""
    kinds = [kind for kind, _ in steps]
    layers = ["Dense"] * kinds.count("Dense")
    return kinds in (layers, [*layers, "Normalize"])


def _pooled(plain: ModelSpec, files: ModelFiles, folder: str, *, normalize: bool) -> ModelSpec:
    return replace(
        plain,
        pooling=_read_pooling(files, folder, plain.dimensions),
        normalize=normalize,
        dense=dense_folders(files),
        dimensions=_width_behind(files, plain.dimensions, "sentence_embedding"),
    )


def _late_interaction(plain: ModelSpec, files: ModelFiles) -> ModelSpec:
    """PyLate's form of a multi-vector model: the layers are for each token."""
    name = "config_sentence_transformers.json"
    if any(plain.prompts.values()):
        raise LoadError(f"{files.path(name)} has prompts besides the marks of queries and documents: not supported")
    facts = files.json(name) if files.has(name) else {}
    expands = facts.get("do_query_expansion") is not False
    return replace(
        plain,
        kind="multi_vector",
        pooling="cls",
        dense=dense_folders(files),
        dimensions=_width_behind(files, plain.dimensions, "token_embeddings"),
        query_tokens=(_integer(facts, "query_length") or _QUERY_TOKENS) if expands else 0,
        prompts={
            "query": str(facts.get("query_prefix", "[Q] ")),
            "document": str(facts.get("document_prefix", "[D] ")),
        },
    )


def _width_behind(files: ModelFiles, width: int, given: str) -> int:
    """Follow the layers, from `width` numbers on, and return how many leave the last one."""
    for folder in dense_folders(files):
        name = f"{folder}/config.json"
        layer = files.json(name)
        reads = layer.get("module_input_name", given)
        if reads != given or layer.get("use_residual"):
            raise LoadError(f"{files.path(name)} asks for more than a layer over {given}, which is not supported")
        if layer.get("in_features") != width or not _integer(layer, "out_features"):
            raise LoadError(f"{files.path(name)} does not take the {width} numbers that it is given")
        width = layer["out_features"]
    return width


def _splade(plain: ModelSpec, files: ModelFiles, folder: str) -> ModelSpec:
    name = f"{folder}/config.json"
    pooling = files.json(name)
    strategy, function = pooling.get("pooling_strategy", "max"), pooling.get("activation_function", "relu")
    if (strategy, function) != ("max", "relu"):
        raise LoadError(f"{files.path(name)} pools by {strategy} of {function}, but only max of relu is supported")
    return _sparse(plain, files)


def _sparse(plain: ModelSpec, files: ModelFiles) -> ModelSpec:
    words = _integer(files.json("config.json"), "vocab_size")
    if not words:
        raise LoadError(f"{files.path('config.json')} states no vocab_size, which a sparse model needs")
    return replace(plain, kind="sparse", pooling="cls", normalize=False, dimensions=words)


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


def _pooling_modes(config: Config) -> Sequence[str]:
    if mode := config.get("pooling_mode"):
        return [mode] if isinstance(mode, str) else [str(part) for part in mode]
    return [mode for flag, mode in _LEGACY_POOLINGS.items() if config.get(flag)] or ["mean"]


# Either way


def _max_tokens(files: ModelFiles, config: Config) -> int:
    positions = _first_integer(config, _POSITIONS)
    if positions and config.get("model_type") in POSITIONS_AFTER_PADDING:
        padding = _integer(config, "pad_token_id")
        positions -= 2 if padding is None else padding + 1
    limits = [limit for limit in (_stated_length(files), positions) if limit]
    if not limits:
        raise LoadError(
            f"{files.path('config.json')} states no max_position_embeddings, nor sentence_bert_config.json a "
            "max_seq_length, nor tokenizer_config.json a model_max_length"
        )
    return min(limits)


def _stated_length(files: ModelFiles) -> int | None:
    """Return the model's own limit; as sentence-transformers has it, the tokenizer's where there is no other."""
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        limit = _integer(files.json(name), key) if files.has(name) else None
        if limit and limit < _NO_LIMIT:
            return limit
    return None


def _prompts(files: ModelFiles) -> Mapping[str, str]:
    name = "config_sentence_transformers.json"
    prompts = files.json(name).get("prompts") if files.has(name) else None
    if not prompts:
        return {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise LoadError(f"{files.path(name)} has prompts that are not texts by task")
    return prompts


def _first_integer(table: Config, keys: Sequence[str]) -> int | None:
    return next(filter(None, (_integer(table, key) for key in keys)), None)


def _integer(table: Config, key: str) -> int | None:
    """Return a whole number, or None where it is absent, null or something else."""
    value = table.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
