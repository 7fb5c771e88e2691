"""A model's files and its weights: the bytes that lie on disk, or an error that names the file."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from quiver.errors import LoadError
from quiver.models.files import ModelFiles
from quiver.models.weights import Weights

WORDS = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
PLACES = np.arange(5, dtype=np.int64)


def files(folder: Path, tensors: dict[str, np.ndarray] | None = None) -> ModelFiles:
    """Write a checkpoint."""
    save_file(tensors or {"words": WORDS, "places": PLACES}, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelFiles(folder, "acme/tiny")


def write_raw(path: Path, dtype: str, shape: list[int], data: bytes, *, pad: int = 0) -> None:
    """Write a safetensors file by hand, for what its library does not write from numpy."""
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    header += b" " * (pad + -len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def base(array: np.ndarray) -> object:
    """Walk down to the memory that an array is a view of."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


# What is there


def test_tensors_come_as_they_lie_on_disk(tmp_path: Path) -> None:
    """Names, shapes, dtypes and values are the checkpoint's, and metadata is no tensor."""
    weights = Weights(files(tmp_path))
    assert set(weights) == {"words", "places"}
    assert len(weights) == 2
    for name, wanted in (("words", WORDS), ("places", PLACES)):
        assert weights[name].dtype == wanted.dtype
        assert np.array_equal(weights[name], wanted)


def test_float32_is_not_copied(tmp_path: Path) -> None:
    """Two readings of a tensor are the same mapped memory."""
    weights = Weights(files(tmp_path))
    assert np.shares_memory(weights["words"], weights["words"])
    assert type(base(weights["words"])).__module__ == "mmap"


def test_an_array_is_found_where_it_lies(tmp_path: Path) -> None:
    """Its place holds its very bytes, whatever links led there; a copy, and what lies in no order, has none."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    files(tmp_path / "model", {"words": WORDS, "places": PLACES})
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "blobs" / "abc")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    weights = Weights(ModelFiles(tmp_path / "model"))
    for array in (weights["words"], weights["words"][1:], weights["places"]):
        place = weights.place_of(array)
        assert place
        assert place.file == (tmp_path / "blobs" / "abc").resolve()
        assert place.file.read_bytes()[place.offset :][: array.nbytes] == array.tobytes()
    for other in (weights["words"].copy(), weights["words"].T, WORDS):
        assert weights.place_of(other) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_tensors_are_read_only(tmp_path: Path, dtype: type) -> None:
    """No tensor can be written to, converted or not."""
    words = Weights(files(tmp_path, {"words": WORDS.astype(dtype)}))["words"]
    with pytest.raises(ValueError, match="read-only"):
        words[0] = 1


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_become_float32(tmp_path: Path, dtype: type) -> None:
    """Half and double precision arrive as the nearest float32."""
    words = Weights(files(tmp_path, {"words": WORDS.astype(dtype)}))["words"]
    assert words.dtype == np.float32
    assert np.array_equal(words, WORDS.astype(dtype).astype(np.float32))


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    """bfloat16, which numpy does not have, arrives exactly: it is the upper half of a float32."""
    values = np.array([0.0, -1.5, 3.140625, 1e30, np.inf], np.float32)
    write_raw(tmp_path / "model.safetensors", "BF16", [5], (values.view(np.uint32) >> 16).astype("<u2").tobytes())
    found = Weights(ModelFiles(tmp_path))["x"]
    assert found.dtype == np.float32
    assert np.array_equal(found, (values.view(np.uint32) & 0xFFFF0000).view(np.float32))


def test_an_odd_header_is_read(tmp_path: Path) -> None:
    """Tensors that a writer put at an unaligned offset arrive aligned."""
    write_raw(tmp_path / "model.safetensors", "F32", [3, 4], WORDS.tobytes(), pad=1)
    found = Weights(ModelFiles(tmp_path))["x"]
    assert found.flags.aligned
    assert np.array_equal(found, WORDS)


def test_an_empty_tensor_is_read(tmp_path: Path) -> None:
    """A tensor without numbers has its shape."""
    assert Weights(files(tmp_path, {"none": np.zeros((0, 4), np.float32)}))["none"].shape == (0, 4)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """Asking for what is not there names tensor and file; asking whether it is there raises nothing."""
    weights = Weights(files(tmp_path))
    assert "nowhere" not in weights
    assert weights.get("nowhere") is None
    assert np.array_equal(weights.get("words"), WORDS)
    with pytest.raises(LoadError, match=r"model\.safetensors has no tensor 'nowhere'"):
        weights["nowhere"]


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    """A dtype that no one reads is an error when its tensor is asked for."""
    write_raw(tmp_path / "model.safetensors", "F8_E4M3", [4], b"\0" * 4)
    with pytest.raises(LoadError, match="stores the tensor 'x' as F8_E4M3"):
        Weights(ModelFiles(tmp_path))["x"]


# Shards


def shard(folder: Path, weight_map: object) -> ModelFiles:
    """Write a checkpoint of two files and the index given."""
    for name in ("a", "b"):
        save_file({name: np.full(3, ord(name), np.float32)}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return ModelFiles(folder)


def test_shards_are_one_mapping(tmp_path: Path) -> None:
    """Each tensor comes from the file that the index names."""
    weights = Weights(shard(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}))
    assert (weights["a"][0], weights["b"][0], len(weights)) == (ord("a"), ord("b"), 2)
    with pytest.raises(LoadError, match=r"index\.json has no tensor 'c'"):
        weights["c"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"b": "a.safetensors"}, r"a\.safetensors has no tensor 'b'"),
        ({"a": "c.safetensors"}, r"c\.safetensors is missing"),
        ({"a": "../a.safetensors"}, "names a file outside itself"),
        ({"a": "/etc/passwd"}, "names a file outside itself"),
        ({"a": 1}, "has no weight_map"),
        (["a"], "has no weight_map"),
    ],
)
def test_a_wrong_index_is_named(tmp_path: Path, weight_map: object, message: str) -> None:
    """An index that names what is not there, or leads out of the directory, is refused."""
    with pytest.raises(LoadError, match=message):
        Weights(shard(tmp_path, weight_map))


# What is not


def test_truncation_is_refused_anywhere(tmp_path: Path) -> None:
    """A file cut at any byte is refused by name, when it is opened."""
    whole = save({"words": WORDS, "places": PLACES})
    path = tmp_path / "model.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError, match=re.escape(str(path))):
            Weights(ModelFiles(tmp_path))
    path.write_bytes(whole)
    assert len(Weights(ModelFiles(tmp_path))) == 2


def test_a_flipped_header_is_refused_or_harmless(tmp_path: Path) -> None:
    """Whatever bit of the header flips, the file is refused by name, or each tensor that is still named reads right."""
    tensors = {"words": WORDS, "places": PLACES}
    whole = save(tensors)
    length = 8 + int.from_bytes(whole[:8], "little")
    outcomes = Counter(refusal(tmp_path, tensors, flip(whole, position)) is None for position in range(length))
    assert outcomes[False] > outcomes[True] > 0


def flip(content: bytes, position: int) -> bytes:
    """Flip one bit of a byte, another one for each position."""
    flipped = bytearray(content)
    flipped[position] ^= 1 << position % 8
    return bytes(flipped)


def refusal(folder: Path, tensors: dict[str, np.ndarray], content: bytes) -> str | None:
    """Say how a file is refused, or hold what it gives against `tensors`."""
    (folder / "model.safetensors").write_bytes(content)
    try:
        weights = Weights(ModelFiles(folder))
    except LoadError as error:
        return one_line(error, folder / "model.safetensors")
    assert all(np.array_equal(weights[name], tensors[name]) for name in tensors.keys() & weights.keys())
    return None


def one_line(error: LoadError, path: Path) -> str:
    """Return the message, which must name the file in one line."""
    assert str(path) in error.message
    assert "\n" not in error.message
    return error.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90868376\n", "is a Git LFS pointer"),
        (b"", "is cut short, corrupt, or not a safetensors file"),
        (b"<!doctype html><title>Sign in</title>", "is cut short, corrupt, or not a safetensors file"),
        (b"PK\x03\x04" + bytes(100), "is cut short, corrupt, or not a safetensors file"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """What is no safetensors file is refused by name, in one line."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(LoadError, match=message) as caught:
        Weights(ModelFiles(tmp_path))
    one_line(caught.value, tmp_path / "model.safetensors")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    """A directory with a pickle alone is refused with the reason."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(LoadError, match=r"pytorch_model\.bin is a pickle, .* convert the model to safetensors or ONNX"):
        Weights(ModelFiles(tmp_path))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    """A directory without weights is refused by the file that it lacks."""
    with pytest.raises(LoadError, match=r"acme/tiny has no weights: .*/model\.safetensors is missing"):
        Weights(ModelFiles(tmp_path, "acme/tiny"))


# Files


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", ""])
def test_no_name_leads_out_of_the_directory(tmp_path: Path, name: str) -> None:
    """Names that come out of a model's own files stay inside its directory."""
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "secret").write_text("{}")
    for ask in (ModelFiles(inside).path, ModelFiles(inside).has, ModelFiles(inside).json):
        with pytest.raises(LoadError, match="names a file outside itself"):
            ask(name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The error says which model lacks which file, and where it was looked for."""
    with pytest.raises(LoadError, match=r"acme/tiny has no tokenizer\.json: .*/tokenizer\.json is missing"):
        ModelFiles(tmp_path, "acme/tiny").path("tokenizer.json")
    assert not ModelFiles(tmp_path).has("tokenizer.json")


@pytest.mark.parametrize(
    ("content", "read", "message"),
    [
        (b'{"a": ', ModelFiles.json, "is not JSON"),
        (b"\xff\xfe", ModelFiles.json, "is not JSON"),
        (b"[" * 100_000, ModelFiles.json_list, "is not JSON"),
        (b"[]", ModelFiles.json, "should hold an object, but holds a list"),
        (b"{}", ModelFiles.json_list, "should hold an array, but holds a dict"),
    ],
)
def test_broken_json_is_named(
    tmp_path: Path, content: bytes, read: Callable[[ModelFiles, str], object], message: str
) -> None:
    """A file that does not hold what it should is an error that names it."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(LoadError, match=rf"config\.json {message}"):
        read(ModelFiles(tmp_path), "config.json")
