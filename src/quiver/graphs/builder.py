"""A small writer of ONNX graphs: each method adds nodes and returns the name of what they compute.

Weights stay outside the graph, as the arrays that they are on disk: the graph itself is some kilobytes, and what is
looked up in a memory-mapped file is shared with the page cache instead of copied (`backends/mapped.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
OPSETS = (("", 17), (MICROSOFT, 1))

MAX_KEY_BLOCK = 1 << 30

Weights = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class CompiledGraph:
    """A graph from packed tokens and the rows of attention to `result`, float32."""

    model: bytes
    weights: Weights
    """Initialisers that live outside the graph, by name."""
    inputs: tuple[str, ...]
    pooled: bool
    """The result has a row for each input, (B, ·), instead of one for each token, (T, ·)."""
    vocab_size: int
    max_positions: int
    key_block: int
    """Keys that attention adds up at a time."""


class GraphBuilder:
    """Collects nodes and initialisers; the same constant or weight is stored once."""

    def __init__(self, outer: "GraphBuilder | None" = None) -> None:
        self._outer = outer
        self._scope = f"{outer.new_name('Loop')}/" if outer else ""
        self.weights: dict[str, NDArray[Any]] = outer.weights if outer else {}
        self.unseen: int | None = outer.unseen if outer else None
        """A token that others do not attend to, wherever it stands."""
        self.key_block = MAX_KEY_BLOCK
        self._nodes: list[NodeProto] = []
        self.initialisers: dict[str, TensorProto] = outer.initialisers if outer else {}
        self.inputs: dict[str, ValueInfoProto] = outer.inputs if outer else {}
        self._memo: dict[tuple[Any, ...], str] = {}

    def new_name(self, kind: str) -> str:
        """Return a name that no other node has."""
        return f"{self._scope}{kind}_{len(self._nodes)}"

    def input(self, name: str, *shape: str, kind: int = TensorProto.INT64) -> str:
        """Declare an input, of integers unless said otherwise; the shape is of named sizes."""
        self.inputs[name] = helper.make_tensor_value_info(name, kind, shape)
        return name

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """Store a small value inside the graph."""
        array = np.asarray(value)
        name = f"const_{array.dtype}_{array.shape}_{array.tobytes().hex()}"
        if name not in self.initialisers:
            self.initialisers[name] = numpy_helper.from_array(array, name)
        return name

    def ints(self, *values: int) -> str:
        """Store a list of integers: a shape, some axes."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """Store one float32."""
        return self.constant(np.float32(value))

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Refer to an array that stays outside the graph."""
        if name not in self.initialisers:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value="memory")  # the bytes come with the session's options
            self.initialisers[name] = tensor
            self.weights[name] = array
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        return self.ops(kind, inputs, 1, domain=domain, **attributes)[0]

    def ops(self, kind: str, inputs: Sequence[str], outputs: int, *, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with several outputs; the same node over the same inputs is computed once."""
        key = (kind, domain, *inputs, outputs, repr(sorted(attributes.items())))
        if key not in self._memo:
            self._memo[key] = self.new_name(kind)
            names = [f"{self._memo[key]}.{i}" for i in range(outputs)]
            self._nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return [f"{self._memo[key]}.{i}" for i in range(outputs)]

    def loop(self, count: str, body: Callable[["GraphBuilder", str], str]) -> str:
        """Run `body(inner builder, index)` `count` times, one after another -> its results, stacked in front.

        The body may refer to everything outside of it. One part at a time is in memory besides the results.
        """
        inner = GraphBuilder(self)
        index, going = f"{inner._scope}index", f"{inner._scope}going"
        result = body(inner, index)
        nodes = [*inner._nodes, helper.make_node("Identity", [going], [f"{going}.on"])]
        graph = helper.make_graph(
            nodes,
            inner._scope.rstrip("/"),
            [
                helper.make_tensor_value_info(index, TensorProto.INT64, []),
                helper.make_tensor_value_info(going, TensorProto.BOOL, []),
            ],
            [
                helper.make_tensor_value_info(f"{going}.on", TensorProto.BOOL, []),
                helper.make_tensor_value_info(result, TensorProto.FLOAT, None),
            ],
        )
        name = f"{inner._scope}stacked"
        self._nodes.append(helper.make_node("Loop", [count, self.constant(np.bool_(1))], [name], body=graph))
        return name

    def finish(self, output: str, *, pooled: bool, vocab_size: int, max_positions: int) -> CompiledGraph:
        """Close the graph over `output`, float32, and name it `result`."""
        nodes = [*self._nodes, helper.make_node("Identity", [output], ["result"])]
        result = helper.make_tensor_value_info("result", TensorProto.FLOAT, ["B" if pooled else "T", "D"])
        graph = helper.make_graph(
            nodes, "quiver", list(self.inputs.values()), [result], list(self.initialisers.values())
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*o) for o in OPSETS], ir_version=8)
        return CompiledGraph(
            model=model.SerializeToString(),
            weights=self.weights,
            inputs=tuple(self.inputs),
            pooled=pooled,
            vocab_size=vocab_size,
            max_positions=max_positions,
            key_block=self.key_block,
        )
