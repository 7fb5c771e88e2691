"""Compiled graphs over packed tokens, on ONNX Runtime."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from quiver.backends.dense import read_dense
from quiver.backends.mapped import MappedGraph, mapped
from quiver.backends.sessions import Sessions, cores, share_arena
from quiver.config import Dtype
from quiver.errors import LoadError
from quiver.graphs import compile_graph
from quiver.graphs.builder import CompiledGraph
from quiver.graphs.heads import Head
from quiver.graphs.rows import lay_rows
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.models.weights import Weights
from quiver.types import Floats, PackedBatch

BATCH_TOKENS = 224
"""Measured: fewer stream the weights through the caches too often, with more the attention over packed inputs
costs more than it saves."""
MASKS = ("[MASK]", "<mask>")


_GIVEN: Mapping[str, Callable[[PackedBatch], NDArray[Any]]] = {
    "ids": lambda batch: batch.ids,
    "positions": lambda batch: batch.positions,
    "type_ids": lambda batch: batch.type_ids,
    "firsts": lambda batch: batch.cu_seqlens[:-1],
    "lasts": lambda batch: batch.cu_seqlens[1:] - 1,
}
"""What a graph may ask of a batch, by the name of its input."""


class OnnxBackend:
    """A compiled graph in ONNX Runtime sessions on the CPU."""

    name = "onnx"
    padded = False
    exact = True
    batch_tokens = BATCH_TOKENS

    def __init__(self, graph: CompiledGraph, weights: Weights, *, lanes: int) -> None:
        self.lanes = lanes
        self.pooled = graph.pooled
        self.vocab_size = graph.vocab_size
        self.max_positions = graph.max_positions
        self._inputs = graph.inputs
        self._key_block = graph.key_block
        num_bytes = sum(weight.nbytes for weight in graph.weights.values())
        found = mapped(graph, weights)
        self._tables = found.tables  # read by a pass for as long as it runs, and not kept by its session
        self._sessions = Sessions(partial(_start, found), num_bytes=num_bytes)

    def forward(self, batch: PackedBatch) -> Floats:
        """Return the graph's result: (T, ·), or (B, ·) where it is pooled."""
        given = {name: _GIVEN[name](batch) for name in self._inputs if name in _GIVEN}
        if "cells" in self._inputs:
            rows = lay_rows(batch.lengths, self._key_block)
            given |= {"cells": rows.cells, "segments": rows.segments, "places": rows.places}
        with self._sessions.free() as session:
            result: Floats = session.run(["result"], {name: given[name] for name in self._inputs})[0]
        return result

    def close(self) -> None:
        """Give back the sessions' memory."""
        self._sessions.close()


def load(files: ModelFiles, spec: ModelSpec, *, dtype: Dtype, lanes: int = 0) -> OnnxBackend:
    """Compile the model of a directory and start its session; `lanes` 0 means one for each core."""
    config, weights = files.json("config.json"), Weights(files)
    head = Head(
        kind=spec.kind,
        pooling=spec.pooling,
        dense=tuple(read_dense(files, folder) for folder in spec.dense),
        unseen=_mask(files) if spec.query_tokens else None,
        yes_no=spec.yes_no,
    )
    try:
        graph = compile_graph(config, weights, dtype, head)
    except LoadError as error:
        raise LoadError(f"cannot build {files.root}: {error.message}") from error
    return OnnxBackend(graph, weights, lanes=lanes or cores())


def _mask(files: ModelFiles) -> int | None:
    """Return the id of the mask token."""
    added = files.json("tokenizer.json").get("added_tokens", [])
    return next((token["id"] for token in added if token["content"] in MASKS), None)


def _start(graph: MappedGraph, options: ort.SessionOptions) -> ort.InferenceSession:
    graph.add_to(options)
    share_arena(options)
    try:
        return ort.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises many kinds, all of them about this graph
        raise LoadError(f"ONNX Runtime refuses the compiled graph: {error}") from error
