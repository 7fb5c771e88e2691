"""How a catalogue is read: its keys, its names, its mistakes. What the shipped one says is in test_catalogue_facts.py."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from quiver.errors import ConfigError
from quiver.models.catalogue import CATALOGUE, Catalogue, Golden, ModelSpec, is_graph, is_hub_id

ENTRY = """
["acme/tiny"]
pooling = "mean"
dimensions = 8
max_tokens = 16
licence = "mit"
"""


def load(folder: Path, text: str) -> Catalogue:
    """Read a catalogue of this text."""
    path = folder / "catalogue.toml"
    path.write_text(text)
    return Catalogue.load(path)


def test_an_unknown_name_is_found_nowhere() -> None:
    """A name that nobody has is no error here."""
    assert Catalogue.load().find("acme/unheard-of") is None


def test_an_entry_needs_little(tmp_path: Path) -> None:
    """What is left out has a sensible default."""
    assert list(load(tmp_path, ENTRY)) == [
        ModelSpec(id="acme/tiny", weights="acme/tiny", pooling="mean", dimensions=8, max_tokens=16, licence="mit")
    ]


def test_an_entry_may_say_everything(tmp_path: Path) -> None:
    """Every field of a spec can be given."""
    text = f"""{ENTRY}
weights = "acme/original"
revision = "v2"
aliases = ["tiny"]
description = "the smallest"
kind = "rerank"
normalize = false
dense = ["2_Dense"]
matryoshka = [8, 4]
layer_norm_before_cut = true
prompts = {{ query = "query: " }}
labels = ["good", "bad"]
multi_label = true
pair_template = ["<", "{{query}}|{{document}}", ">"]
yes_no = [1, 2]
query_tokens = 32
gated = true
dtype = "int8"
onnx_file = "onnx/model.onnx"
pack = "acme_tiny/model"
sha256 = {{ "model.safetensors" = "{"a" * 64}" }}
golden = {{ text = "hello", first = [0.5, -1.0], tolerance = 0.01 }}
"""
    spec = load(tmp_path, text).find("TINY")
    assert spec == ModelSpec(
        id="acme/tiny",
        weights="acme/original",
        revision="v2",
        aliases=("tiny",),
        description="the smallest",
        kind="rerank",
        pooling="mean",
        normalize=False,
        dense=("2_Dense",),
        dimensions=8,
        max_tokens=16,
        matryoshka=(8, 4),
        layer_norm_before_cut=True,
        prompts={"query": "query: "},
        labels=("good", "bad"),
        multi_label=True,
        pair_template=("<", "{query}|{document}", ">"),
        yes_no=(1, 2),
        query_tokens=32,
        licence="mit",
        gated=True,
        dtype="int8",
        onnx_file="onnx/model.onnx",
        pack="acme_tiny/model",
        sha256={"model.safetensors": "a" * 64},
        golden=Golden(text="hello", first=(0.5, -1.0), tolerance=0.01),
    )
    defaults = {field.name: field.default for field in fields(ModelSpec) if field.default is not MISSING}
    assert [name for name, default in defaults.items() if getattr(spec, name) == default] == []


def test_the_catalogues_head_explains_every_key() -> None:
    """Whoever adds an entry finds each key, and no other, in the comment above."""
    head = CATALOGUE.read_text(encoding="utf-8").partition("\n\n\n")[0]
    explained = {
        word.strip(",")
        for line in head.splitlines()
        if line.startswith("#   ")
        for word in line[4:].split("  ")[0].split()
    }
    assert explained == {field.name for field in fields(ModelSpec)} - {"id"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTRY + "max_length = 3", "acme/tiny has an unknown key 'max_length'"),
        (ENTRY + 'id = "x/y"', "acme/tiny has an unknown key 'id'"),
        (ENTRY.replace('"mean"', '"max"'), r"acme/tiny: .*pooling"),
        (ENTRY.replace("dimensions = 8", ""), r"acme/tiny: .*dimensions"),
        (ENTRY.replace("8", '"8"'), r"acme/tiny: .*dimensions"),
        (ENTRY.replace("8", "0"), "must be positive"),
        (ENTRY + "matryoshka = [16]", "matryoshka sizes must be 1 to 8"),
        (ENTRY + 'sha256 = { "model.safetensors" = "abc" }', "64 lower-case hexadecimal digits"),
        (ENTRY.replace("acme/tiny", "../tiny"), "must have the form ORG/NAME"),
        (ENTRY.replace("acme/tiny", "..") + 'weights = "acme/tiny"', "must have the form ORG/NAME"),
        (ENTRY.replace("acme/tiny", "tiny"), "a name alone where weights are given"),
        (ENTRY + 'onnx_file = "model.bin"', "the path of an .onnx file"),
        (ENTRY + 'onnx_file = "../model.onnx"', "the path of an .onnx file"),
        (ENTRY + 'pair_template = ["", "{query}", ""]\nyes_no = [1, 2]', "must have {query} and {document}"),
        (ENTRY + "yes_no = [1, 2]", "pair_template and yes_no go together"),
        (ENTRY + "yes_no = [1, 2, 3]", r"acme/tiny: .*yes_no"),
        (ENTRY + 'kind = "translate"', r"acme/tiny: .*kind"),
        (ENTRY + 'golden = { text = "a" }', r"acme/tiny: .*first"),
        (ENTRY + 'weights = "a/../b"', "must have the form ORG/NAME"),
        ('title = "models"', "'title' should be a table"),
        ("[", "is not TOML"),
        (ENTRY + ENTRY, "is not TOML"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, text: str, message: str) -> None:
    """Mistakes are found when the catalogue is read, and name file, model and key."""
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "catalogue.toml") in caught.value.message


def test_an_entry_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    """A name alone will do where another repository has the weights."""
    spec = load(tmp_path, ENTRY.replace("acme/tiny", "tiny-q1") + 'weights = "acme/tiny"').find("tiny-q1")
    assert (spec.id, spec.weights) == ("tiny-q1", "acme/tiny")


@pytest.mark.parametrize("alias", ["ACME/Tiny", "small"])
def test_two_models_cannot_share_a_name(tmp_path: Path, alias: str) -> None:
    """An id or alias that leads to two models is an error that names both, in any case of letters."""
    other = ENTRY.replace("acme/tiny", "acme/other")
    with pytest.raises(ConfigError, match=f"'{alias}' names both acme/tiny and acme/other"):
        load(tmp_path, f'{ENTRY}aliases = ["Small"]\n{other}aliases = ["{alias}"]')


def test_a_missing_catalogue_is_named(tmp_path: Path) -> None:
    """A path to nothing is an error."""
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        Catalogue.load(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["acme/tiny", "BAAI/bge-small-en-v1.5", "a/b", "acme_1/t.i-n_y"])
def test_a_hub_id_is_known(name: str) -> None:
    """A name that the hub could have is taken."""
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "tiny", "/tiny", "acme/", "acme/tiny/x", "acme/ti ny", "acme\\tiny", "acme%2Ftiny", "acme/tiny\n"),
        *("../tiny", "acme/..", "acme/../tiny", ".acme/tiny", "acme/tiny.", "-acme/tiny", "acme/ti..ny"),
        *("acme/ti--ny", "acme/tiny.git", "acme/" + 92 * "x"),
    ],
)
def test_another_name_is_no_hub_id(name: str) -> None:
    """A name that could lead somewhere as a path, or that the hub refuses, is none."""
    assert not is_hub_id(name)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("model.onnx", True),
        ("onnx/model_q4.onnx", True),
        *[
            (name, False)
            for name in ("", "onnx", ".onnx", "model.onnx_data", "/model.onnx", "../model.onnx", "a/../b.onnx")
        ],
    ],
)
def test_a_graph_is_a_file_inside_a_repository(name: str, *, is_one: bool) -> None:
    """Its name ends with .onnx and leads nowhere else."""
    assert is_graph(name) is is_one
