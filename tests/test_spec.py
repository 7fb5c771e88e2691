"""What a model that is not in the catalogue says of itself, in its own files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.models.spec import read_spec

BERT = {"model_type": "bert", "hidden_size": 8, "max_position_embeddings": 512, "pad_token_id": 0}
MODULES = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
]
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
ANOTHER_DENSE = {"type": "sentence_transformers.base.modules.Dense", "path": "3_Dense"}


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
            [*MODULES[:2], {"type": "sentence_transformers.models.LayerNorm", "path": "2_LayerNorm"}],
            r"Transformer → Pooling \(1_Pooling\) → LayerNorm \(2_LayerNorm\), but only Transformer → Pooling → Normalize",
        ),
        ([*MODULES, DENSE], r"Normalize \(2_Normalize\) → Dense \(2_Dense\), but only"),
        ([MODULES[0], DENSE, MODULES[1]], r"Transformer → Dense \(2_Dense\) → Pooling \(1_Pooling\), but only"),
        ([*MODULES[:2], MODULES[2], MODULES[2]], r"Normalize \(2_Normalize\) → Normalize \(2_Normalize\), but only"),
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


@pytest.mark.parametrize(
    ("files", "max_tokens"),
    [
        ({"tokenizer_config.json": {"model_max_length": 128}}, 128),
        ({"tokenizer_config.json": {"model_max_length": 4096}}, 512),
        ({"tokenizer_config.json": {"model_max_length": int(1e30)}}, 512),
        ({"tokenizer_config.json": {"model_max_length": 1e30}}, 512),
        (
            {"tokenizer_config.json": {"model_max_length": 128}, "sentence_bert_config.json": {"max_seq_length": 256}},
            256,
        ),
        ({"tokenizer_config.json": {"model_max_length": 77}, "config.json": {"hidden_size": 8}}, 77),
    ],
)
def test_the_tokenizers_length_is_the_last_word(tmp_path: Path, files: dict[str, Any], max_tokens: int) -> None:
    """It holds where the model states none, as sentence-transformers has it; a number for "no limit" does not."""
    assert read_spec("acme/tiny", model(tmp_path, files)).max_tokens == max_tokens


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"model_type": "distilbert", "dim": 16, "max_position_embeddings": 512}, (16, 512)),
        ({"model_type": "nomic_bert", "n_embd": 16, "n_positions": 8192}, (16, 8192)),
        ({"model_type": "qwen3", "hidden_size": 16, "max_position_embeddings": 40960}, (16, 40960)),
    ],
)
def test_architectures_have_words_of_their_own(tmp_path: Path, config: dict[str, Any], facts: tuple[int, int]) -> None:
    """The hidden size and the positions have several names."""
    spec = read_spec("acme/tiny", model(tmp_path, {"config.json": config}))
    assert (spec.dimensions, spec.max_tokens) == facts


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": {"model_type": "bert"}}, "states no hidden_size"),
        ({"config.json": {"hidden_size": 8}}, "states no max_position_embeddings"),
        (
            {"config.json": {"hidden_size": 8}, "tokenizer_config.json": {"model_max_length": int(1e30)}},
            "states no max_position_embeddings",
        ),
        ({"config_sentence_transformers.json": {"prompts": {"query": 1}}}, "has prompts that are not texts by task"),
        ({"modules.json": MODULES}, r"acme/tiny has no 1_Pooling/config\.json"),
        ({"modules.json": {}}, "should hold an array"),
        ({"config.json": BERT | {"architectures": ["HF_ColBERT"]}}, r"acme/tiny has no artifact\.metadata"),
        ({"config.json": BERT | {"architectures": ["HF_ColBERT"]}, "artifact.metadata": {}}, "states no dim"),
        ({"config.json": BERT | {"architectures": ["Qwen3ForCausalLM"]}}, "is a language model's"),
    ],
)
def test_files_that_say_too_little_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    """What cannot be known is an error, never a guess."""
    with pytest.raises(LoadError, match=message):
        read_spec("acme/tiny", model(tmp_path, files))


# Layers behind the pooling


def layer(given: int, wanted: int, **more: Any) -> dict[str, Any]:
    """Make a layer's config.json."""
    return {
        "in_features": given,
        "out_features": wanted,
        "activation_function": "torch.nn.modules.linear.Identity",
    } | more


def test_layers_are_listed_in_their_order(tmp_path: Path) -> None:
    """A vector has as many numbers as leave the last of them, and unit length only if the model says so."""
    files = {
        "modules.json": [*MODULES[:2], DENSE, ANOTHER_DENSE],
        "1_Pooling/config.json": {"pooling_mode_cls_token": True},
        "2_Dense/config.json": layer(8, 32),
        "3_Dense/config.json": layer(32, 4, module_input_name="sentence_embedding"),
    }
    spec = read_spec("acme/tiny", model(tmp_path, files))
    assert (spec.kind, spec.pooling, spec.normalize) == ("embed", "cls", False)
    assert (spec.dense, spec.dimensions) == (("2_Dense", "3_Dense"), 4)
    unit = read_spec("acme/tiny", model(tmp_path, {"modules.json": [*MODULES[:2], DENSE, ANOTHER_DENSE, MODULES[2]]}))
    assert unit == replace(spec, normalize=True)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (layer(9, 4), "does not take the 8 numbers that it is given"),
        ({"in_features": 8}, "does not take the 8 numbers"),
        (layer(8, 4, use_residual=True), "asks for more than a layer over sentence_embedding"),
        (layer(8, 4, module_input_name="token_embeddings"), "asks for more than a layer over sentence_embedding"),
    ],
)
def test_a_layer_that_would_be_computed_wrongly_is_named(tmp_path: Path, dense: dict[str, Any], message: str) -> None:
    """A layer that does not fit, or does more than a layer, is refused by its file."""
    model(tmp_path, {"2_Dense/config.json": dense})
    with pytest.raises(LoadError, match=rf"2_Dense/config\.json {message}"):
        pooled(tmp_path, {"pooling_mode": "mean"}, [*MODULES[:2], DENSE])


# Classifiers


def classifier(folder: Path, **facts: Any) -> ModelSpec:
    """Read a model that scores labels."""
    return read_spec(
        "acme/tiny", model(folder, {"config.json": BERT | {"architectures": ["BertForSequenceClassification"]} | facts})
    )


@pytest.mark.parametrize("facts", [{"id2label": {"0": "LABEL_0"}}, {"num_labels": 1}])
def test_one_label_makes_a_reranker(tmp_path: Path, facts: dict[str, Any]) -> None:
    """A model with a single score reads pairs."""
    spec = classifier(tmp_path, **facts)
    assert (spec.kind, spec.dimensions, spec.labels, spec.max_tokens) == ("rerank", 1, (), 512)


def test_several_labels_make_a_classifier(tmp_path: Path) -> None:
    """They come in the order of their logits, whatever the order of the file."""
    spec = classifier(tmp_path, id2label={"10": "k"} | {str(i): "abcdefghij"[i] for i in reversed(range(10))})
    assert (spec.kind, spec.labels, spec.dimensions) == ("classify", tuple("abcdefghijk"), 11)
    assert not spec.multi_label


def test_labels_may_hold_together(tmp_path: Path) -> None:
    """A model that was trained on several labels at a time says so."""
    assert classifier(tmp_path, problem_type="multi_label_classification").multi_label


def test_labels_that_are_not_written_down_have_the_usual_names(tmp_path: Path) -> None:
    """What transformers leaves out is its default: two labels."""
    assert classifier(tmp_path).labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize("names", [{"1": "a", "2": "b"}, {}, ["a", "b"], {"zero": "a"}])
def test_labels_that_do_not_count_from_zero_are_named(tmp_path: Path, names: Any) -> None:
    """A score with another label's name is worse than none."""
    with pytest.raises(LoadError, match=r"config\.json has an id2label that does not name its labels from 0 on"):
        classifier(tmp_path, id2label=names)


def test_a_pipeline_says_more_than_an_architecture(tmp_path: Path) -> None:
    """An embedding model may have been made from a classifier's checkpoint."""
    files = {
        "config.json": BERT | {"architectures": ["BertForSequenceClassification"]},
        "modules.json": MODULES,
        "1_Pooling/config.json": {"pooling_mode": "mean"},
    }
    assert read_spec("acme/tiny", model(tmp_path, files)).kind == "embed"


# Sparse and multi-vector models, and CLIP


def splade(folder: Path, pooling: dict[str, Any], transformer: str = "MLMTransformer", **facts: Any) -> ModelSpec:
    """Read a SPLADE model as sentence-transformers writes it."""
    modules = [
        {"type": f"sentence_transformers.sparse_encoder.models.{transformer}", "path": ""},
        {"type": "sentence_transformers.sparse_encoder.models.SpladePooling", "path": "1_SpladePooling"},
    ]
    config = BERT | {"architectures": ["BertForMaskedLM"], "vocab_size": 30522} | facts
    files = {"config.json": config, "modules.json": modules, "1_SpladePooling/config.json": pooling}
    return read_spec("acme/tiny", model(folder, files))


@pytest.mark.parametrize("transformer", ["MLMTransformer", "Transformer"])
@pytest.mark.parametrize("pooling", [{}, {"pooling_strategy": "max", "activation_function": "relu"}])
def test_splade_is_sparse(tmp_path: Path, pooling: dict[str, Any], transformer: str) -> None:
    """It has a number for each word of its vocabulary."""
    spec = splade(tmp_path, pooling, transformer)
    assert (spec.kind, spec.dimensions, spec.normalize, spec.max_tokens) == ("sparse", 30522, False, 512)


@pytest.mark.parametrize(
    ("pooling", "facts", "message"),
    [
        ({"pooling_strategy": "sum"}, {}, "pools by sum of relu, but only max of relu"),
        ({"activation_function": "log1p_relu"}, {}, "pools by max of log1p_relu"),
        ({}, {"vocab_size": None}, "states no vocab_size"),
    ],
)
def test_another_sparse_pooling_is_named(
    tmp_path: Path, pooling: dict[str, Any], facts: dict[str, Any], message: str
) -> None:
    """Weights that would be computed wrongly are refused."""
    with pytest.raises(LoadError, match=message):
        splade(tmp_path, pooling, **facts)


def test_a_masked_language_model_alone_embeds(tmp_path: Path) -> None:
    """Without a word of sparse vectors, it is an encoder like others."""
    config = BERT | {"architectures": ["BertForMaskedLM"]}
    assert read_spec("acme/tiny", model(tmp_path, {"config.json": config})).kind == "embed"


def test_colberts_own_checkpoints_are_multi_vector(tmp_path: Path) -> None:
    """Their metadata state the size of a token's vector, the length of a query, and the marks."""
    facts = {"dim": 128, "query_maxlen": 24, "query_token_id": "[unused5]", "doc_maxlen": 180}
    files = {"config.json": BERT | {"architectures": ["HF_ColBERT"]}, "artifact.metadata": facts}
    spec = read_spec("acme/tiny", model(tmp_path, files))
    assert (spec.kind, spec.dimensions, spec.normalize, spec.query_tokens) == ("multi_vector", 128, True, 24)
    assert spec.prompts == {"query": "[unused5] ", "document": "[unused1] "}


def pylate(folder: Path, **facts: Any) -> ModelSpec:
    """Read a multi-vector model as PyLate writes it."""
    files = {
        "modules.json": [MODULES[0], {"type": "pylate.models.Dense.Dense", "path": "1_Dense"}],
        "1_Dense/config.json": layer(8, 4, module_input_name="token_embeddings"),
        "config_sentence_transformers.json": facts,
    }
    return read_spec("acme/tiny", model(folder, files))


def test_layers_instead_of_pooling_are_multi_vector(tmp_path: Path) -> None:
    """PyLate's models have the last layer's numbers for each token, and their own marks and lengths."""
    spec = pylate(tmp_path, query_length=48, query_prefix="[Q] ", document_prefix="[D] ", prompts={"query": ""})
    assert (spec.kind, spec.dense, spec.dimensions, spec.query_tokens) == ("multi_vector", ("1_Dense",), 4, 48)
    assert spec.prompts == {"query": "[Q] ", "document": "[D] "}


def test_queries_are_filled_unless_the_model_says_otherwise(tmp_path: Path) -> None:
    """Query expansion is on where nothing is stated, to 32 tokens."""
    assert pylate(tmp_path).query_tokens == 32
    assert pylate(tmp_path, do_query_expansion=False).query_tokens == 0


def test_marks_and_prompts_do_not_go_together(tmp_path: Path) -> None:
    """A multi-vector model with prompts besides is refused: they would be lost."""
    with pytest.raises(LoadError, match="has prompts besides the marks"):
        pylate(tmp_path, prompts={"query": "search_query: "})


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "clip", "text_config": {"hidden_size": 16, "max_position_embeddings": 77}, "projection_dim": 8},
        {"model_type": "clip", "text_config": {}, "projection_dim": 8},
        {"model_type": "clip_text_model", "hidden_size": 16, "max_position_embeddings": 77, "projection_dim": 8},
    ],
)
def test_clip_embeds_texts_into_the_space_of_pictures(tmp_path: Path, config: dict[str, Any]) -> None:
    """A vector is the projection of the token that ends the text."""
    files = {"config.json": config, "tokenizer_config.json": {"model_max_length": 77}}
    spec = read_spec("acme/tiny", model(tmp_path, files))
    assert (spec.kind, spec.pooling, spec.dimensions, spec.max_tokens) == ("embed", "last_token", 8, 77)
