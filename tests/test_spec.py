"""What a model that is not in the catalogue says of itself, in its own files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.models.spec import dense_folders, read_spec

BERT = {"model_type": "bert", "hidden_size": 8, "max_position_embeddings": 512, "pad_token_id": 0}
MODULES = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
]


def model(folder: Path, files: dict[str, Any]) -> ModelFiles:
    """Write files of JSON beside a BERT's config.json."""
    for name, value in ({"config.json": BERT} | files).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))
    return ModelFiles(folder, "acme/tiny")


def pooled(folder: Path, pooling: dict[str, Any], modules: list[dict[str, str]] | None = None) -> ModelSpec:
    """Read a sentence-transformers model with this pooling."""
    return read_spec("acme/tiny", model(folder, {"modules.json": modules or MODULES, "1_Pooling/config.json": pooling}))


def test_a_bare_transformer_has_defaults(tmp_path: Path) -> None:
    """Without sentence-transformers files: mean pooling, unit length, all positions."""
    assert read_spec("acme/tiny", model(tmp_path, {})) == ModelSpec(
        id="acme/tiny", weights="acme/tiny", pooling="mean", normalize=True, dimensions=8, max_tokens=512
    )


def test_sentence_transformers_files_are_followed(tmp_path: Path) -> None:
    """Pooling, normalisation, length and prompts are the model's own."""
    files = {
        "modules.json": MODULES,
        "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_cls_token": True},
        "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "query: ", "document": ""}},
    }
    spec = read_spec("acme/tiny", model(tmp_path, files))
    assert (spec.pooling, spec.normalize, spec.max_tokens) == ("cls", True, 128)
    assert spec.prompts == {"query": "query: ", "document": ""}
    without = read_spec("acme/tiny", model(tmp_path, files | {"modules.json": MODULES[:2]}))
    assert without == replace(spec, normalize=False)


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last_token"),
        ({"pooling_mode": "cls", "embedding_dimension": 8}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "last_token"),
        ({"word_embedding_dimension": 8}, "mean"),
    ],
)
def test_pooling_is_read_in_both_spellings(tmp_path: Path, pooling: dict[str, Any], wanted: str) -> None:
    """Old files have a flag for each way, new ones a word."""
    assert pooled(tmp_path, pooling).pooling == wanted


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, "pools by weightedmean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, r"pools by cls \+ mean"),
        ({"pooling_mode": "max"}, "pools by max"),
        ({"pooling_mode": "mean", "include_prompt": False}, "leaves prompts out"),
        ({"word_embedding_dimension": 9}, r"pools vectors of 9 numbers, but config\.json says 8"),
    ],
)
def test_unsupported_pooling_is_named(tmp_path: Path, pooling: dict[str, Any], message: str) -> None:
    """Pooling that would be computed wrongly is refused, by its file."""
    with pytest.raises(LoadError, match=rf"1_Pooling/config\.json {message}"):
        pooled(tmp_path, pooling)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            [*MODULES[:2], {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}],
            r"Transformer → Pooling \(1_Pooling\) → Dense \(2_Dense\), but only Transformer → Pooling → Normalize",
        ),
        (MODULES[:1], "asks for Transformer, but only"),
        ([{"type": "a.Transformer", "path": "0_Transformer"}, *MODULES[1:]], r"asks for Transformer \(0_Transformer\)"),
        ([{"path": ""}], "does not list modules by type and path"),
        (["Transformer"], "does not list modules by type and path"),
    ],
)
def test_an_unsupported_module_is_named(tmp_path: Path, modules: list[Any], message: str) -> None:
    """A pipeline with other steps is refused, never cut short."""
    with pytest.raises(LoadError, match=rf"modules\.json .*{message}"):
        pooled(tmp_path, {"pooling_mode": "mean"}, modules)


def test_a_hostile_module_path_is_refused(tmp_path: Path) -> None:
    """A module's path cannot lead out of the model's directory."""
    with pytest.raises(LoadError, match="names a file outside itself"):
        pooled(tmp_path, {}, [MODULES[0], {"type": "a.Pooling", "path": "../.."}])


@pytest.mark.parametrize(
    ("config", "max_tokens"),
    [
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 0}, 513),
        ({"model_type": "camembert", "max_position_embeddings": 514}, 512),
        ({"model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 0}, 512),
    ],
)
def test_positions_begin_behind_the_padding(tmp_path: Path, config: dict[str, Any], max_tokens: int) -> None:
    """RoBERTa's table has rows that no token of a text can take."""
    assert (
        read_spec("acme/tiny", model(tmp_path, {"config.json": {"hidden_size": 8} | config})).max_tokens == max_tokens
    )


@pytest.mark.parametrize(("stated", "max_tokens"), [(256, 256), (4096, 512), (None, 512)])
def test_the_stated_length_holds_within_the_positions(tmp_path: Path, stated: int | None, max_tokens: int) -> None:
    """A model reads no more than it has positions, whatever its files claim."""
    files = model(tmp_path, {"sentence_bert_config.json": {"max_seq_length": stated}})
    assert read_spec("acme/tiny", files).max_tokens == max_tokens


def test_distilbert_calls_its_size_otherwise(tmp_path: Path) -> None:
    """`dim` is the hidden size there."""
    config = {"model_type": "distilbert", "dim": 16, "max_position_embeddings": 512}
    assert read_spec("acme/tiny", model(tmp_path, {"config.json": config})).dimensions == 16


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": {"model_type": "bert"}}, "states no hidden_size"),
        ({"config.json": {"hidden_size": 8}}, "states no max_position_embeddings"),
        ({"config_sentence_transformers.json": {"prompts": {"query": 1}}}, "has prompts that are not texts by task"),
        ({"modules.json": MODULES}, r"acme/tiny has no 1_Pooling/config\.json"),
        ({"modules.json": {}}, "should hold an array"),
    ],
)
def test_files_that_say_too_little_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    """What cannot be known is an error, never a guess."""
    with pytest.raises(LoadError, match=message):
        read_spec("acme/tiny", model(tmp_path, files))
