"""A prebuilt ONNX file is checked before it runs, and so is each file that it says its tensors are in."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnx_files
from onnx_files import Export, load, refusal, texts_of
from quiver.backends.onnx_file import OnnxFileBackend
from quiver.engine.packing import pack
from quiver.models.files import USUAL_GRAPHS

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 90405214\n"


# The file


@pytest.mark.parametrize("file", USUAL_GRAPHS)
def test_the_usual_names(tmp_path: Path, file: str) -> None:
    """The file is found where exporters put it."""
    onnx_files.make(tmp_path, Export(file=file))

    assert load(tmp_path).name == "onnx file"


def test_the_first_choice(tmp_path: Path) -> None:
    """Of two files in the usual places, the one in the folder `onnx` is taken."""
    onnx_files.make(tmp_path, Export())
    onnx_files.make(tmp_path, Export(file="model.onnx", outputs={"sentence_embedding": "mean"}))

    assert not load(tmp_path).pooled


def test_the_file_that_is_named(tmp_path: Path) -> None:
    """The file that the catalogue or the operator names is taken, wherever the others are."""
    onnx_files.make(tmp_path)
    onnx_files.make(tmp_path, Export(file="onnx/model_other.onnx", outputs={"sentence_embedding": "mean"}))

    assert load(tmp_path, onnx_file="onnx/model_other.onnx").pooled


@pytest.mark.parametrize("name", [None, "onnx/model_q4.onnx", "../model.onnx", "/model.onnx"])
def test_no_file(tmp_path: Path, name: str | None) -> None:
    """A file that is not there, or not the model's, is refused by its name."""
    assert (name or "onnx/model.onnx and no model.onnx") in refusal(tmp_path, onnx_file=name)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda _: LFS_POINTER, "git lfs pull"),
        (lambda content: content[: len(content) // 2], "cut short"),
        (lambda content: content[:-1], "cut short"),
        (lambda _: b"", "cut short"),
        (lambda _: b"<!DOCTYPE html><html>Not found</html>", "not an ONNX file"),
        (lambda _: b"\x80\x04\x95 a pickle", "not an ONNX file"),
    ],
)
def test_damaged_file(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    """A pointer, a part of a file, or a file of another format is refused, naming file and reason."""
    file = onnx_files.make(tmp_path).file
    file.write_bytes(damage(file.read_bytes()))
    message = refusal(tmp_path)

    assert str(file) in message
    assert reason in message


def test_a_graph_that_onnx_runtime_refuses(tmp_path: Path) -> None:
    """A graph that is no valid one is refused, naming file and reason."""
    repository = onnx_files.make(tmp_path)
    model = onnx.load(repository.file)
    model.graph.node[0].op_type = "Fetch"
    repository.file.write_bytes(model.SerializeToString())
    message = refusal(tmp_path)

    assert str(repository.file) in message
    assert "Fetch" in message


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16"])
def test_another_precision(tmp_path: Path, dtype: str) -> None:
    """A prebuilt file cannot be made less precise: the refusal says to choose another file."""
    onnx_files.make(tmp_path)

    assert f"cannot be made {dtype}" in (message := refusal(tmp_path, dtype))
    assert "onnx_file" in message


# The files beside it


def assert_like_plain(folder: Path, plain: OnnxFileBackend) -> None:
    """Check that a repository gives the same bits as one that has its tensors inside the graph."""
    batch = pack(texts_of(9, 1, 30))
    np.testing.assert_array_equal(load(folder).forward(batch), plain.forward(batch))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> OnnxFileBackend:
    """Give the repository that has its tensors inside the graph."""
    return load(onnx_files.make(tmp_path_factory.mktemp("plain")).folder)


def test_external_data(tmp_path: Path, plain: OnnxFileBackend) -> None:
    """Tensors in a file beside the graph give the same bits as those inside it."""
    repository = onnx_files.make(tmp_path, Export(external="model.onnx_data"))

    assert repository.file.stat().st_size < 50_000
    assert_like_plain(tmp_path, plain)


def in_cache(folder: Path, shared: Path | None = None) -> Path:
    """Write a repository as the hub's cache keeps it: links to blobs, which may be links to a shared store."""
    snapshot, blobs = folder / "snapshots" / ("c" * 40), folder / "blobs"
    blobs.mkdir(parents=True)
    onnx_files.make(snapshot, Export(external="model.onnx_data"))
    for number, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        blob = file.rename(blobs / f"{number:040}")
        file.symlink_to(os.path.relpath(blob, file.parent))
        if shared:
            (shared / f"{number:02}").mkdir(parents=True)
            blob.symlink_to(os.path.relpath(blob.rename(shared / f"{number:02}" / blob.name), blobs))
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_in_the_hubs_cache(tmp_path: Path, plain: OnnxFileBackend, *, shared: bool) -> None:
    """Links to the blobs of the hub's cache are followed, also where these are links to its shared store."""
    snapshot = in_cache(tmp_path / "models--test--tiny", tmp_path / "blobs" if shared else None)

    assert (snapshot / "onnx/model.onnx_data").is_symlink()
    assert_like_plain(snapshot, plain)


def linked(_: Path, data: Path, secret: Path) -> str:
    """Put a link to the secret in place of the tensors."""
    data.unlink()
    data.symlink_to(secret)
    return data.name


def linked_relatively(_: Path, data: Path, secret: Path) -> str:
    """Put a link that leads up and out of the model in place of the tensors."""
    data.unlink()
    data.symlink_to(os.path.relpath(secret, data.parent))
    return data.name


def linked_folder(_: Path, data: Path, secret: Path) -> str:
    """Lead out by a link to a folder."""
    (data.parent / "deeper").symlink_to(secret.parent)
    return f"deeper/{secret.name}"


def linked_twice(_: Path, data: Path, secret: Path) -> str:
    """Lead out by a link to a link."""
    (data.parent / "first").symlink_to(secret)
    (data.parent / "second").symlink_to("first")
    return "second"


def linked_as_a_blob(root: Path, data: Path, secret: Path) -> str:
    """Pretend to be the cache, in a directory that is none."""
    blobs = root.parent.parent / "blobs"
    blobs.mkdir()
    secret.rename(blobs / "secret")
    data.unlink()
    data.symlink_to("../../../blobs/secret")
    return data.name


@pytest.mark.parametrize(
    "lead_out",
    [
        lambda _root, _data, secret: str(secret),
        lambda _root, data, _secret: str(data),
        lambda _root, _data, secret: f"../../../{secret.name}",
        lambda _root, _data, _secret: "sub/../model.onnx_data",
        lambda _root, _data, _secret: "*/_ORT_MEM_ADDR_/*",
        lambda _root, _data, _secret: "",
        lambda _root, _data, _secret: ".",
        linked,
        linked_relatively,
        linked_folder,
        linked_twice,
        linked_as_a_blob,
    ],
)
def test_external_data_leads_out(tmp_path: Path, lead_out: Callable[[Path, Path, Path], str]) -> None:
    """A graph whose tensors are said to be outside of the model's folder is refused, naming file and location."""
    repository = onnx_files.make(tmp_path / "checkout/model", Export(external="model.onnx_data"))
    data, secret = repository.file.with_name("model.onnx_data"), tmp_path / "secret"
    secret.write_bytes(data.read_bytes())
    location = lead_out(repository.folder, data, secret)
    onnx_files.relocate(repository.file, location)
    message = refusal(repository.folder)

    assert str(repository.file) in message
    assert f"{location!r}, which is not a file of the model's own folder" in message


def test_a_link_within_the_model(tmp_path: Path, plain: OnnxFileBackend) -> None:
    """A link that stays in the model's folder is followed."""
    repository = onnx_files.make(tmp_path, Export(external="model.onnx_data"))
    data = repository.file.with_name("model.onnx_data")
    data.rename(tmp_path / "weights.bin")
    data.symlink_to("../weights.bin")

    assert_like_plain(tmp_path, plain)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data.unlink(), "is missing"),
        (lambda data: data.write_bytes(LFS_POINTER), "git lfs pull"),
        (lambda data: data.write_bytes(data.read_bytes()[:-1]), "cut short"),
        (lambda data: data.write_bytes(b""), "cut short"),
    ],
)
def test_damaged_external_data(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    """Tensors that are missing, a pointer, or cut short are refused, naming file and reason."""
    repository = onnx_files.make(tmp_path, Export(external="model.onnx_data"))
    damage(repository.file.with_name("model.onnx_data"))
    message = refusal(tmp_path)

    assert "model.onnx_data" in message
    assert reason in message


@pytest.mark.parametrize("offset", ["-4096", "far"])
def test_tensor_nowhere(tmp_path: Path, offset: str) -> None:
    """A tensor at an impossible place in its file is refused."""
    repository = onnx_files.make(tmp_path, Export(external="model.onnx_data"))
    model = onnx.load(repository.file, load_external_data=False)
    next(entry for entry in model.graph.initializer[0].external_data if entry.key == "offset").value = offset
    repository.file.write_bytes(model.SerializeToString())

    assert str(repository.file) in refusal(tmp_path)


def outside() -> TensorProto:
    """Make a tensor that is said to be outside."""
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    return tensor


def in_constant() -> onnx.ModelProto:
    """Hide the tensor in a node's attribute."""
    return model_of([helper.make_node("Constant", [], ["t"], value=outside())])


def in_list() -> onnx.ModelProto:
    """Hide the tensor in an attribute that lists several."""
    return model_of([helper.make_node("Whatever", [], ["t"], domain="test", values=[outside()])])


def in_sparse() -> onnx.ModelProto:
    """Hide the tensor in the values of a sparse one."""
    indices = helper.make_tensor("i", TensorProto.INT64, [4], range(4))
    model = model_of([helper.make_node("Identity", ["t"], ["y"])])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(outside(), indices, [8]))
    return model


def in_subgraph() -> onnx.ModelProto:
    """Hide the tensor in a branch."""
    branch = helper.make_graph([helper.make_node("Identity", ["t"], ["y"])], "branch", [], [], [outside()])
    return model_of([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)])


def in_function() -> onnx.ModelProto:
    """Hide the tensor in a function's body."""
    constant = helper.make_node("Constant", [], ["t"], value=outside())
    model = model_of([helper.make_node("F", [], ["t"], domain="test")])
    model.functions.append(helper.make_function("test", "F", [], ["t"], [constant], [helper.make_opsetid("", 17)]))
    return model


def model_of(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Make a model of some nodes."""
    return helper.make_model(helper.make_graph(nodes, "hiding", [], []))


@pytest.mark.parametrize("hide", [in_constant, in_list, in_sparse, in_subgraph, in_function])
def test_hidden_external_data(tmp_path: Path, hide: Callable[[], onnx.ModelProto]) -> None:
    """A tensor that is said to be outside is found wherever in the graph it stands."""
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    onnx_files.save(tmp_path / "model/model.onnx", hide())

    assert "'../secret', which is not a file of the model's own folder" in refusal(tmp_path / "model")


# The inputs that it wants


def declare(file: Path, name: str, kind: int, shape: Sequence[Any]) -> None:
    """Let a graph declare an input of this type and shape, in place of one of the same name."""
    model = onnx.load(file)
    kept = [known for known in model.graph.input if known.name != name]
    del model.graph.input[:]
    model.graph.input.extend([*kept, helper.make_tensor_value_info(name, kind, shape)])
    file.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("pixel_values", TensorProto.FLOAT, ["B", 3, 224, 224]),
        ("task_id", TensorProto.INT64, []),
        ("use_cache_branch", TensorProto.BOOL, [1]),
        ("past_key_values.0.key", TensorProto.FLOAT, ["B", "heads", "past", 12]),
        ("past_key_values.0.key", TensorProto.FLOAT, ["B", 4, 16, 12]),
        ("past_key_values.0.key", TensorProto.INT64, ["B", 4, "past", 12]),
        ("attention_mask", TensorProto.FLOAT, ["B", "L"]),
    ],
)
def test_unknown_input(tmp_path: Path, name: str, kind: int, shape: Sequence[Any]) -> None:
    """A graph that wants what is not known is refused, naming the input."""
    repository = onnx_files.make(tmp_path)
    declare(repository.file, name, kind, shape)
    message = refusal(tmp_path)

    assert str(repository.file) in message
    assert repr(name) in message


def test_fixed_shape(tmp_path: Path) -> None:
    """A graph that reads inputs of one length alone is refused."""
    repository = onnx_files.make(tmp_path)
    declare(repository.file, "input_ids", TensorProto.INT64, ["B", 128])
    message = refusal(tmp_path)

    assert str(repository.file) in message
    assert "128" in message
