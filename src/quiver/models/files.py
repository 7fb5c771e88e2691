"""The files of one model, found by their names alone."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quiver.errors import LoadError

SINGLE_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
USUAL_GRAPHS = ("onnx/model.onnx", "model.onnx")
"""Where a repository keeps its own graph in full precision, if it has one."""

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A directory that holds a model; `model` is the name that errors call it by."""

    root: Path
    model: str = ""

    def path(self, name: str) -> Path:
        """Return where a file lies; raises `LoadError` if it is not there."""
        path = self._locate(name)
        if not path.is_file():
            raise LoadError(f"{self.model or 'the model'} has no {name}: {path} is missing")
        return path

    def has(self, name: str) -> bool:
        """Tell whether a file is there."""
        return self._locate(name).is_file()

    def json(self, name: str) -> dict[str, Any]:
        """Read an object from a JSON file; raises `LoadError`."""
        value = self._decode(name)
        if not isinstance(value, dict):
            raise LoadError(f"{self._locate(name)} should hold an object, but holds a {type(value).__name__}")
        return value

    def json_list(self, name: str) -> list[Any]:
        """Read an array from a JSON file; raises `LoadError`."""
        value = self._decode(name)
        if not isinstance(value, list):
            raise LoadError(f"{self._locate(name)} should hold an array, but holds a {type(value).__name__}")
        return value

    def weight_map(self) -> Mapping[str, str]:
        """Return the file of each tensor of sharded weights, as their index has it; raises `LoadError`."""
        shards = self.json(WEIGHTS_INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise LoadError(f"{self._locate(WEIGHTS_INDEX)} has no weight_map from tensors to files")
        return shards

    def weight_names(self) -> tuple[str, ...]:
        """List the safetensors files that the weights are made of, present or not; empty if there is no sign of any."""
        if self.has(SINGLE_WEIGHTS):
            return (SINGLE_WEIGHTS,)
        return tuple(sorted(set(self.weight_map().values()))) if self.has(WEIGHTS_INDEX) else ()

    def own_graph(self, wanted: str | None = None) -> str | None:
        """Return the ONNX graph to run: the wanted one if it is here, or the usual one where there are no safetensors."""
        if wanted and self.has(wanted):
            return wanted
        return None if self.weight_names() else next(filter(self.has, USUAL_GRAPHS), None)

    def graph_names(self, onnx_file: str) -> tuple[str, ...]:
        """List an ONNX graph and the files beside it that hold its tensors."""
        folder = self._locate(onnx_file).parent
        inside = [path.relative_to(self.root).as_posix() for path in folder.iterdir()] if folder.is_dir() else []
        return (*external_data(onnx_file, inside), onnx_file)

    def num_bytes(self, onnx_file: str | None = None) -> int:
        """Return the size of the weights on disk: of the safetensors, or of an ONNX graph with what lies beside it."""
        names = self.graph_names(onnx_file) if onnx_file else self.weight_names()
        return sum(self.path(name).stat().st_size for name in names)

    def _decode(self, name: str) -> Any:
        path = self.path(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise LoadError(f"{path} is not JSON: {error}") from error
        except OSError as error:
            raise LoadError(f"cannot read {path}: {error.strerror}") from error

    def _locate(self, name: str) -> Path:
        # Names of parts and shards come out of the model's own files: they must not lead out of its directory.
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise LoadError(f"{self.root} names a file outside itself: {name!r}")
        return self.root.joinpath(*parts)


def external_data(onnx_file: str, names: Iterable[str]) -> Sequence[str]:
    """Choose the files that an ONNX graph may keep its tensors in: those of its name, and constants, in its folder."""
    graph = PurePosixPath(onnx_file)
    paths = (path for path in map(PurePosixPath, names) if path.parent == graph.parent and path != graph)
    return sorted(str(path) for path in paths if path.name.startswith((graph.name, "Constant_")))


def is_lfs_pointer(path: Path) -> bool:
    """Tell whether a file is what Git leaves in place of a large one that it has not fetched; raises `LoadError`."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from error
