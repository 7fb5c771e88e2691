"""What sessions have in common: the tables that they look rows up in, and the arena that they compute in."""

import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import psutil
import pytest
from onnx import helper
from safetensors.numpy import save_file

from quiver.backends import onnx
from quiver.backends.mapped import mapped
from quiver.backends.sessions import session_options, share_arena
from quiver.graphs.builder import CompiledGraph, GraphBuilder
from quiver.models.catalogue import Catalogue
from quiver.models.files import ModelFiles
from quiver.models.weights import Weights

TABLE_BYTES = 30522 * 384 * 4
"""What the embedded model's words take."""
NUM_FLOATS = 8 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_sessions_map_a_table_once(minilm_files: ModelFiles) -> None:
    """Nothing else of the file stays in memory, for all else was packed."""
    spec = Catalogue.load().find(minilm_files.model)
    assert spec
    file = minilm_files.path("model.safetensors").resolve()
    before = large_mappings_of(file)
    backend = onnx.load(minilm_files, spec, dtype="float32", lanes=2)
    assert large_mappings_of(file) == before + 1
    backend.close()
    del backend
    assert large_mappings_of(file) == before


def large_mappings_of(file: Path) -> int:
    """Count the parts of a file that this process has mapped, of those that can hold the table."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    spans = [re.match(r"(\w+)-(\w+) ", line) for line in lines if line.endswith(str(file))]
    return sum(int(span[2], 16) - int(span[1], 16) >= TABLE_BYTES for span in spans if span)


def lookup(weights: Weights) -> CompiledGraph:
    """Compile a graph that looks rows up."""
    builder = GraphBuilder()
    rows = builder.op("Gather", builder.weight("table", weights["table"]), builder.input("ids", "T"))
    return builder.finish(rows, pooled=False, vocab_size=5, max_positions=9)


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_a_table_is_lent_whether_it_lies_in_a_file_or_not(tmp_path: Path, stored: type) -> None:
    """As it lies on disk, or converted: sessions read one and the same, and find in it what was stored."""
    table = np.arange(20, dtype=stored).reshape(5, 4) / 8
    save_file({"table": table}, tmp_path / "model.safetensors")
    weights = Weights(ModelFiles(tmp_path, "acme/tiny"))
    found = mapped(lookup(weights), weights)
    assert (found.folder is None) == (stored is np.float16)
    for _ in range(2):
        options = session_options(threads=1)
        found.add_to(options)
        session = ort.InferenceSession(found.model, options, providers=["CPUExecutionProvider"])
        assert np.array_equal(session.run(None, {"ids": np.array([4, 0])})[0], table[[4, 0]].astype(np.float32))


def summing(*, is_shared: bool) -> ort.InferenceSession:
    """Start a session that computes as many numbers as it is told, and returns one."""
    given, result = helper.make_tensor_value_info("n", 7, [1]), helper.make_tensor_value_info("result", 1, [])
    nodes = [
        helper.make_node("ConstantOfShape", ["n"], ["zeros"]),
        helper.make_node("Cos", ["zeros"], ["ones"]),
        helper.make_node("ReduceSum", ["ones"], ["result"], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "summing", [given], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    options = session_options(threads=1)
    if is_shared:
        share_arena(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("is_shared", [True, False])
def test_what_one_session_took_serves_the_next(*, is_shared: bool) -> None:
    """Of two that share the arena, the second takes no memory for as large a batch; with one of its own, it would."""
    first, second = summing(is_shared=is_shared), summing(is_shared=is_shared)
    first.run(None, {"n": np.array([NUM_FLOATS])})
    before = psutil.Process().memory_info().rss
    second.run(None, {"n": np.array([NUM_FLOATS])})
    taken = psutil.Process().memory_info().rss - before
    assert (taken < NUM_FLOATS) == is_shared, f"{taken} bytes"
