"""Which files a model's weights are: safetensors, the layers behind them, or a repository's own graph."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from hub_machine import NAME, Machine, beside_a_hub, spec
from hub_server import Fault, tiny, write
from quiver.errors import LoadError
from quiver.models.catalogue import Golden
from quiver.models.files import ModelFiles
from quiver.models.hub import Found

GRAPH = "onnx/model.onnx"
BESIDE = ("onnx/Constant_7_attr__value", "onnx/model.onnx_data")
OTHERS = (
    "onnx/model_fp16.onnx",
    "onnx/model_fp16.onnx_data",
    "onnx/model_quantized.onnx",
    "gpu/Constant_1",
    "gpu/x.onnx",
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Return a machine beside a hub that has one model."""
    with beside_a_hub(tmp_path, monkeypatch) as machine:
        yield machine


def exported(*names: str) -> dict[str, bytes]:
    """Make a repository that holds graphs instead of safetensors."""
    files = tiny()
    del files["model.safetensors"], files[GRAPH]
    return files | {name: name.encode() for name in names or (GRAPH, *BESIDE, *OTHERS)}


def layered(**weights: bytes) -> dict[str, bytes]:
    """Make a sentence-transformers model with a layer behind its pooling."""
    files = tiny()
    modules = [*json.loads(files["modules.json"]), {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
    dense = {"in_features": 64, "out_features": 16}
    return files | {
        "modules.json": json.dumps(modules).encode(),
        "2_Dense/config.json": json.dumps(dense).encode(),
        **{f"2_Dense/{name.replace('_bin', '.bin')}": content for name, content in weights.items()},
    }


def weights_of(machine: Machine) -> list[str]:
    """List what was fetched beside descriptions, in order."""
    return [name for name in machine.hub.fetched() if not name.endswith(".json")]


# What is fetched


def test_without_safetensors_the_graph_is_run(machine: Machine) -> None:
    """It comes with its tensors, which lie beside it, before it; other precisions stay on the hub."""
    machine.publish(exported())
    found = machine.find()
    assert found.spec.onnx_file == GRAPH
    assert weights_of(machine) == [*BESIDE, GRAPH]
    assert found.files.path(GRAPH).read_bytes() == GRAPH.encode()


def test_a_graph_may_lie_at_the_top(machine: Machine) -> None:
    """Such a repository is served as well, and its data are told by the graph's name."""
    machine.publish(exported("model.onnx", "model.onnx.data", "model_int8.onnx"))
    assert machine.find().spec.onnx_file == "model.onnx"
    assert weights_of(machine) == ["model.onnx.data", "model.onnx"]


def test_safetensors_go_before_a_graph(machine: Machine) -> None:
    """Where there are both, the graph stays on the hub."""
    assert machine.find().spec.onnx_file is None
    assert weights_of(machine) == ["model.safetensors"]


def test_the_catalogue_may_want_the_graph(machine: Machine) -> None:
    """An entry with an onnx_file has that fetched, and not the safetensors beside it."""
    machine.publish(tiny() | exported("onnx/other.onnx"))
    assert machine.find(spec=spec(onnx_file="onnx/other.onnx")).spec.onnx_file == "onnx/other.onnx"
    assert weights_of(machine) == ["onnx/other.onnx"]


def test_the_operator_may_want_another_graph(machine: Machine) -> None:
    """The file that is asked for is fetched with its own data, whatever the catalogue says."""
    machine.publish(tiny() | exported())
    found = machine.find(spec=spec(onnx_file=GRAPH), onnx_file="onnx/model_fp16.onnx")
    assert found.spec.onnx_file == "onnx/model_fp16.onnx"
    assert weights_of(machine) == ["onnx/Constant_7_attr__value", "onnx/model_fp16.onnx_data", "onnx/model_fp16.onnx"]


def test_a_graph_of_the_operators_choice_is_held_against_no_numbers(machine: Machine) -> None:
    """The catalogue's golden numbers are those of full precision."""
    known = spec(golden=Golden(text="a", first=(0.5,)))
    assert machine.find(spec=known).spec.golden == known.golden
    assert machine.find(spec=known, onnx_file=GRAPH).spec.golden is None


def test_a_graph_that_is_not_there_is_named_with_those_that_are(machine: Machine) -> None:
    """The error lists what could have been asked for, and nothing is fetched."""
    machine.publish(tiny() | exported())
    with pytest.raises(LoadError, match=rf"has no onnx/model_q4\.onnx: its ONNX files are {GRAPH}, onnx/model_fp16"):
        machine.find(onnx_file="onnx/model_q4.onnx")
    assert machine.hub.fetched() == []


@pytest.mark.parametrize("name", [NAME, "./mine"])
@pytest.mark.parametrize("onnx_file", ["model.safetensors", "../model.onnx", "/model.onnx", "onnx"])
def test_what_is_no_graph_is_never_looked_for(machine: Machine, name: str, onnx_file: str) -> None:
    """A file of another kind, or one outside of the repository, touches neither disk nor network."""
    with pytest.raises(LoadError, match=f"'{onnx_file}' is no ONNX file: give its path in the repository"):
        machine.find(name, onnx_file=onnx_file)
    assert machine.hub.requests == []


def test_a_copy_that_is_named_is_the_one_that_is_run(machine: Machine) -> None:
    """With an ONNX file, an alias is a repository of its own, whose pins are not those of the original."""
    machine.publish(exported(), "xenova/tiny")
    original = spec(aliases=("Xenova/tiny",), revision="a" * 40, pack="no.pack/model", sha256={GRAPH: "0" * 64})
    found = machine.find("Xenova/tiny".lower(), original, GRAPH)
    assert (found.spec.id, found.spec.onnx_file) == (NAME, GRAPH)
    assert found.spec.revision == machine.hub.repositories["xenova/tiny"].commit
    assert all("xenova/tiny" in request for request in machine.hub.requests)


def test_without_an_onnx_file_a_copy_is_the_original(machine: Machine) -> None:
    """An alias leads to the repository with the weights."""
    machine.publish(exported(), "xenova/tiny")
    assert machine.find("xenova/tiny", spec(aliases=("xenova/tiny",))).spec.onnx_file is None
    assert all(NAME in request for request in machine.hub.requests)


@pytest.mark.parametrize("name", ["tiny", "ACME/Tiny"])
def test_the_originals_own_names_are_no_copies(machine: Machine, name: str) -> None:
    """A bare name, or the id in other letters, leads to the repository with the weights, ONNX file or not."""
    assert machine.find(name, spec(aliases=("tiny",)), GRAPH).spec.onnx_file == GRAPH
    assert all(NAME in request for request in machine.hub.requests)


def test_an_entry_may_lie_in_anothers_repository(machine: Machine) -> None:
    """Entries that differ in arithmetic or length share one repository, one cache and one directory."""
    level = spec(id="tiny-q1", dtype="int8")
    assert machine.find("tiny-q1", level).spec.id == "tiny-q1"
    assert all(NAME in request for request in machine.hub.requests)
    write(machine.config.data_dir / "models" / NAME, tiny(value=7))
    assert machine.find("tiny-q1", level).files.root == machine.config.data_dir / "models" / NAME


# The second start


@pytest.mark.parametrize("onnx_file", [None, "onnx/model_fp16.onnx"])
def test_a_graph_in_the_cache_needs_no_hub(machine: Machine, onnx_file: str | None) -> None:
    """What was fetched is found without a request, online and offline."""
    machine.publish(exported())
    first = machine.find(onnx_file=onnx_file)
    machine.hub.requests.clear()
    assert machine.find(onnx_file=onnx_file) == machine.find(onnx_file=onnx_file, hub_offline=True) == first
    assert machine.hub.requests == []


def test_another_graph_is_fetched_when_it_is_asked_for(machine: Machine) -> None:
    """A cache that holds one precision does not stand in for another."""
    machine.publish(exported())
    machine.find()
    with pytest.raises(LoadError, match="not \\(wholly\\) on this machine"):
        machine.find(onnx_file="onnx/model_quantized.onnx", hub_offline=True)
    machine.hub.requests.clear()
    machine.find(onnx_file="onnx/model_quantized.onnx")
    assert weights_of(machine) == ["onnx/model_quantized.onnx"]


def test_a_graph_that_another_program_fetched_is_no_reason_to_run_it(machine: Machine) -> None:
    """What is run must not depend on what the cache happens to hold, unless there is nobody to ask."""
    machine.publish(exported())
    machine.find()
    (absence,) = machine.config.hub_cache.glob("models--acme--tiny/.no_exist/*/model.safetensors")
    absence.unlink()
    assert machine.find(hub_offline=True).spec.onnx_file == GRAPH
    machine.publish(tiny())
    assert machine.find().spec.onnx_file is None


def test_corrupt_graphs_are_refused(machine: Machine) -> None:
    """A graph's data have a hash as safetensors have, on the way and on disk."""
    machine.publish(exported())
    machine.repository.faults[BESIDE[1]] = Fault.CORRUPT
    with pytest.raises(LoadError, match=r"wrong bytes .*model\.onnx_data has SHA-256"):
        machine.find()
    machine.repository.faults.clear()
    machine.find().files.path(BESIDE[1]).resolve().write_bytes(b"rot")
    with pytest.raises(LoadError, match=r"is corrupt: .*model\.onnx_data has SHA-256"):
        machine.find()


# Layers behind the pooling


def test_layers_are_fetched_before_the_weights(machine: Machine) -> None:
    """modules.json names their folders; a cache without one of them is no cache."""
    machine.publish(layered(**{"model.safetensors": save({"linear.weight": np.ones((16, 64), np.float32)})}))
    found = machine.find()
    assert (found.spec.dense, found.spec.dimensions) == (("2_Dense",), 16)
    assert weights_of(machine) == ["2_Dense/model.safetensors", "model.safetensors"]
    found.files.path("2_Dense/model.safetensors").unlink()
    with pytest.raises(LoadError, match="not \\(wholly\\) on this machine"):
        machine.find(hub_offline=True)


def test_a_layer_that_is_a_pickle_is_named(machine: Machine) -> None:
    """The weights are not fetched for a model that cannot run."""
    machine.publish(layered(pytorch_model_bin=b"\x80"))
    with pytest.raises(LoadError, match=r"has no 2_Dense/model\.safetensors: convert it, .*\(pickles are never read\)"):
        machine.find()
    assert weights_of(machine) == []


# From this machine


def in_directory(machine: Machine, files: dict[str, bytes], onnx_file: str | None = None) -> Found:
    """Serve a directory of the operator's."""
    return machine.find(str(write(machine.config.data_dir / "mine", files)), None, onnx_file)


def test_a_directory_of_graphs_is_served(machine: Machine) -> None:
    """The usual graph is run where there are no safetensors, and the one that is asked for where there are."""
    assert in_directory(machine, exported()).spec.onnx_file == GRAPH
    assert in_directory(machine, exported(), "onnx/model_fp16.onnx").spec.onnx_file == "onnx/model_fp16.onnx"
    assert in_directory(machine, tiny()).spec.onnx_file is None
    assert machine.hub.requests == []


def test_a_graph_that_a_directory_lacks_is_named(machine: Machine) -> None:
    """A missing file is an error before anything is loaded."""
    with pytest.raises(LoadError, match=r"mine has no onnx/none\.onnx"):
        in_directory(machine, exported(), "onnx/none.onnx")


def test_a_pointer_of_git_is_no_graph(machine: Machine) -> None:
    """A clone without its large files says what to run."""
    with pytest.raises(LoadError, match=r"onnx/model\.onnx is a Git LFS pointer, not the graph itself: run `git lfs"):
        in_directory(machine, exported() | {GRAPH: LFS_POINTER})


def test_a_converted_model_is_compiled(machine: Machine) -> None:
    """Where the operator has made safetensors of a model that the catalogue runs as a graph, these are taken."""
    write(machine.config.data_dir / "models" / NAME, tiny() | {GRAPH: b"unread"})
    assert machine.find(spec=spec(onnx_file="onnx/gone.onnx")).spec.onnx_file is None


# Sizes


def test_the_size_of_weights_is_that_of_what_is_loaded(tmp_path: Path) -> None:
    """Shards, or a graph with what lies beside it; nothing else in the directory counts."""
    shards = {f"model-{i}-of-2.safetensors": bytes(10 * i) for i in (1, 2)}
    index = {
        "weight_map": {
            "a": "model-1-of-2.safetensors",
            "b": "model-2-of-2.safetensors",
            "c": "model-2-of-2.safetensors",
        }
    }
    files = exported() | shards | {"model.safetensors.index.json": json.dumps(index).encode()}
    model = ModelFiles(write(tmp_path, files), "tiny")
    assert model.num_bytes() == 30
    assert model.num_bytes(GRAPH) == sum(map(len, (GRAPH, *BESIDE)))
    assert model.num_bytes("onnx/model_quantized.onnx") == len("onnx/model_quantized.onnx" + BESIDE[0])


def test_the_size_of_a_cached_model_is_that_of_its_bytes(machine: Machine) -> None:
    """The hub's cache links to its blobs: the links' own size is not meant."""
    assert machine.find().files.num_bytes() == len(tiny()["model.safetensors"])
