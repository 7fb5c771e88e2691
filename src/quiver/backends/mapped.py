"""Weights that ONNX Runtime reads where they lie: from the pages of their file, which all sessions and processes share.

Handed over as arrays, each session would copy them. What no file holds byte for byte, because it was converted or put
together, is handed over all the same. Tables, whose rows are looked up as they are, are lent to all sessions: each would
map, or keep, one of its own. Of other weights a session keeps what it packed of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from quiver.graphs.builder import CompiledGraph
from quiver.models.weights import Weights

FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True, slots=True)
class MappedGraph:
    """A graph that knows where its weights lie."""

    model: bytes
    folder: Path | None = None
    """Of the files; None: there are none."""
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """What lies in no file."""
    tables: Mapping[str, ort.OrtValue] = field(default_factory=dict)
    """What is lent; whoever has a session keeps them as long."""

    def add_to(self, options: ort.SessionOptions) -> None:
        """Let a session find the weights."""
        if self.folder:
            options.add_session_config_entry(FOLDER, str(self.folder))
        arrays = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in self.arrays.values()]
        options.add_external_initializers(list(self.arrays), arrays)
        for name, table in self.tables.items():
            options.add_initializer(name, table)


def mapped(graph: CompiledGraph, weights: Weights) -> MappedGraph:
    """Name for each of a graph's weights the file that holds it, if one does; all of these are in one directory."""
    model, folder, arrays = ModelProto.FromString(graph.model), None, {}
    for tensor in model.graph.initializer:
        if tensor.name not in graph.weights:
            continue
        array = graph.weights[tensor.name]
        place = weights.place_of(array)
        if place is None or folder not in (None, place.file.parent):
            arrays[tensor.name] = array
            continue
        folder = place.file.parent
        _refer(tensor, location=place.file.name, offset=place.offset, length=array.nbytes)
    return MappedGraph(model.SerializeToString(), folder, arrays, _tables(model, graph, weights))


def _tables(model: ModelProto, graph: CompiledGraph, weights: Weights) -> dict[str, ort.OrtValue]:
    looked_up = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    arrays = {name: _alone(array, weights) for name, array in graph.weights.items() if name in looked_up}
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


def _alone(array: NDArray[Any], weights: Weights) -> NDArray[Any]:
    """Map an array without the rest of its file, which would stay in memory with it."""
    place = weights.place_of(array)
    if place is None:
        return np.ascontiguousarray(array)
    return np.memmap(place.file, array.dtype, mode="r", offset=place.offset, shape=array.shape)


def _refer(tensor: TensorProto, **about: object) -> None:
    del tensor.external_data[:]
    for key, value in about.items():
        tensor.external_data.add(key=key, value=str(value))
