"""A model's weights as arrays over memory-mapped safetensors files: no other format is read.

safetensors checks each file's header and length when it is opened; after that, an array is a view of the file's bytes,
shared with the page cache and with every process that maps the same file.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from quiver.errors import LoadError
from quiver.models.files import SINGLE_WEIGHTS, WEIGHTS_INDEX, ModelFiles, is_lfs_pointer

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.pt", "model.pt", "model.pth")

_STORED = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
    "F64": "<f8",
}
"""How numpy reads each dtype of the format; it has none for bfloat16, which is the upper half of a float32."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]  # (bytes,) a view of the mapped file


@dataclass(frozen=True, slots=True)
class Place:
    """Where on disk an array lies, byte for byte."""

    file: Path
    """The file itself, whatever links led to it."""
    offset: int


class Weights(Mapping[str, NDArray[Any]]):
    """Read-only tensors by name. Floating-point ones come as float32: F32 as it lies on disk, others converted on access.

    Opening raises `LoadError` for a file that is missing, cut short, corrupt or of another format; asking for a tensor
    that is not there raises it too, naming tensor and file.
    """

    def __init__(self, files: ModelFiles) -> None:
        names = files.weight_names()
        if not names:
            raise LoadError(_no_weights(files))
        self._source = files.root / (SINGLE_WEIGHTS if names == (SINGLE_WEIGHTS,) else WEIGHTS_INDEX)
        mapped = {name: _map(files.path(name)) for name in names}
        self._mapped = {files.path(name).resolve(): _span(data) for name, data in mapped.items()}
        shards = {name: dict(_tensors(files.path(name), data)) for name, data in mapped.items()}
        self._tensors = shards[SINGLE_WEIGHTS] if SINGLE_WEIGHTS in shards else _merge(files, shards)

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._tensors:
            raise LoadError(f"{self._source} has no tensor {name!r}, which config.json's architecture needs")
        return _array(name, self._tensors[name])

    def place_of(self, array: NDArray[Any]) -> Place | None:
        """Tell where an array lies that is a part of one of these files as it stands; None for any other."""
        start = array.__array_interface__["data"][0]
        if not (array.flags.c_contiguous and array.nbytes):
            return None
        for path, (begin, size) in self._mapped.items():
            if begin <= start and start + array.nbytes <= begin + size:
                return Place(path, start - begin)
        return None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the tensor, or `default` if there is none."""
        if name not in self:
            return default
        return self[name]


def _no_weights(files: ModelFiles) -> str:
    for name in _PICKLES:
        if files.has(name):
            return (
                f"{files.root / name} is a pickle, which can run any code when it is opened, and is never read: "
                "convert the model to safetensors or ONNX, or choose a revision that has them"
            )
    return f"{files.model or 'the model'} has no weights: {files.root / SINGLE_WEIGHTS} is missing"


def _merge(files: ModelFiles, shards: Mapping[str, Mapping[str, _Tensor]]) -> dict[str, _Tensor]:
    """Take each tensor from the shard that the index names."""
    merged = {}
    for name, shard in files.weight_map().items():
        if name not in shards[shard]:
            raise LoadError(f"{files.root / shard} has no tensor {name!r}, which {WEIGHTS_INDEX} says it holds")
        merged[name] = shards[shard][name]
    return merged


def _map(path: Path) -> NDArray[np.uint8]:
    """Let safetensors check a file, then map it."""
    try:
        if is_lfs_pointer(path):
            raise LoadError(
                f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull`, or download it"
            )
        with safe_open(path, framework="numpy"):
            mapped = np.memmap(path, np.uint8, mode="r")  # (bytes,)
    except SafetensorError as error:
        raise LoadError(f"{path} is cut short, corrupt, or not a safetensors file: {error}") from error
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}") from error
    return np.asarray(mapped)


def _span(data: NDArray[np.uint8]) -> tuple[int, int]:
    """Return where in memory a mapped file begins, and its size."""
    return data.__array_interface__["data"][0], data.nbytes


def _tensors(path: Path, mapped: NDArray[np.uint8]) -> Iterator[tuple[str, _Tensor]]:
    # The file: 8 bytes with the header's length | the header, JSON | the tensors, at offsets from the header's end.
    base = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8:base].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        yield name, _Tensor(path, entry["dtype"], tuple(entry["shape"]), mapped[base + start : base + end])


def _array(name: str, tensor: _Tensor) -> NDArray[Any]:
    stored = _STORED.get(tensor.dtype)
    if stored is None:
        raise LoadError(
            f"{tensor.file} stores the tensor {name!r} as {tensor.dtype}, which is not read: convert it to F32"
        )
    array: NDArray[Any] = tensor.data.view(stored).reshape(tensor.shape)
    if tensor.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    elif tensor.dtype in {"F16", "F64"}:
        array = array.astype(np.float32)
    array = np.require(array, requirements="A")  # some writers leave the header's length odd
    array.flags.writeable = False
    return array
