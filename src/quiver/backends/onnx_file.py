"""A repository's own ONNX file, on ONNX Runtime: for an architecture that is not compiled, or where it is asked for.

Such graphs read padded inputs. B inputs, L tokens of the longest, T tokens of all, H hidden, D numbers of a result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from quiver.backends.sessions import Sessions, cores
from quiver.config import Dtype
from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import USUAL_GRAPHS, ModelFiles, is_lfs_pointer
from quiver.models.spec import POSITIONS_AFTER_PADDING
from quiver.types import Floats, Ints, Kind, PackedBatch

"""Where exporters put their file, the first choice first."""
BATCH_TOKENS = 128
"""Measured: fewer pay for each short input's pass, more pay for padding."""
LONG = 1024
"""Attention over more tokens takes so much memory that it is given back after the pass."""

_ANY_VOCABULARY = 100
"""Token ids that every model has, for one that does not state its own number."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What config.json says of a graph's inputs."""

    vocab_size: int
    max_positions: int
    pad_id: int
    first_position: int
    """Row of the position table that an input's first token takes."""

    @classmethod
    def read(cls, files: ModelFiles, spec: ModelSpec) -> Self:
        config = files.json("config.json") if files.has("config.json") else {}

        def number(key: str, default: int) -> int:
            return config[key] if isinstance(config.get(key), int) else default

        after_padding = config.get("model_type") in POSITIONS_AFTER_PADDING
        first_position = number("pad_token_id", 1) + 1 if after_padding else 0
        return cls(
            vocab_size=number("vocab_size", _ANY_VOCABULARY),
            max_positions=number("max_position_embeddings", spec.max_tokens + first_position) - first_position,
            pad_id=number("pad_token_id", 0),
            first_position=first_position,
        )


@dataclass(frozen=True, slots=True)
class _Padded:
    """A batch laid into a row for each input."""

    batch: PackedBatch
    mask: NDArray[np.bool_]  # (B, L) where a token stands
    facts: _Facts

    @classmethod
    def of(cls, batch: PackedBatch, facts: _Facts) -> Self:
        return cls(batch, np.arange(batch.lengths.max()) < batch.lengths[:, None], facts)

    def lay(self, tokens: Ints, padding: int = 0) -> Ints:
        """(T,) -> (B, L)."""
        laid = np.full(self.mask.shape, padding, np.int64)
        laid[self.mask] = tokens
        return laid


_Feed = Callable[[_Padded], NDArray[Any]]

_GIVEN: Mapping[str, _Feed] = {
    "input_ids": lambda padded: padded.lay(padded.batch.ids, padded.facts.pad_id),
    "attention_mask": lambda padded: padded.mask,
    "input_mask": lambda padded: padded.mask,
    "token_type_ids": lambda padded: padded.lay(padded.batch.type_ids),
    "segment_ids": lambda padded: padded.lay(padded.batch.type_ids),
    "position_ids": lambda padded: padded.lay(padded.batch.positions + padded.facts.first_position),
}
"""What a graph may ask of a batch, by the name of its input."""
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_PAST = "past_key_values."

_INPUTS, _TOKENS = 2, 3
"""Axes of a result with a row for each input, (B, D), and of one with a row for each of its tokens, (B, L, D)."""
_WANTED: Mapping[Kind, Sequence[tuple[str, int]]] = {
    "embed": (
        ("sentence_embedding", _INPUTS),
        ("text_embeds", _INPUTS),
        ("last_hidden_state", _TOKENS),
        ("token_embeddings", _TOKENS),
        ("hidden_states", _TOKENS),
    ),
    "rerank": (("logits", _INPUTS),),
    "classify": (("logits", _INPUTS),),
    "sparse": (("logits", _TOKENS),),
    "multi_vector": (("contextual", _TOKENS), ("last_hidden_state", _TOKENS)),
}
"""The outputs that a kind of model may give, by name and number of axes, the first choice first."""


@dataclass(frozen=True, slots=True)
class _Output:
    """The one output that is read."""

    name: str
    pooled: bool
    yes_no: tuple[int, int] | None
    """The tokens whose logits after an input's last token are the answer."""

    def read(self, result: NDArray[Any], padded: _Padded) -> Floats:
        """(B, D) as it is; (B, L, D) -> the rows of tokens (T, D), or (B, 1) where the model answers yes or no."""
        if result.ndim == _INPUTS:
            rows = result
        elif self.yes_no:
            last = result[np.arange(len(result)), padded.batch.lengths - 1]  # (B, V)
            answers = last[:, self.yes_no].astype(np.float32)  # (B, 2)
            rows = answers[:, :1] - answers[:, 1:]
        else:
            rows = result[padded.mask]
        return rows.astype(np.float32, copy=False)


class OnnxFileBackend:
    """A prebuilt graph in ONNX Runtime sessions on the CPU."""

    name = "onnx file"
    padded = True
    exact = True
    batch_tokens = BATCH_TOKENS

    def __init__(
        self, sessions: Sessions, feeds: Mapping[str, _Feed], output: _Output, facts: _Facts, *, lanes: int
    ) -> None:
        self.lanes = lanes
        self.pooled = output.pooled
        self.vocab_size = facts.vocab_size
        self.max_positions = facts.max_positions
        self._sessions = sessions
        self._feeds = feeds
        self._output = output
        self._facts = facts

    def forward(self, batch: PackedBatch) -> Floats:
        """Return the graph's result: (T, ·), or (B, ·) where it is pooled."""
        padded = _Padded.of(batch, self._facts)
        given = {name: feed(padded) for name, feed in self._feeds.items()}
        options = _giving_memory_back() if padded.mask.size > LONG else None
        with self._sessions.free() as session:
            result = session.run([self._output.name], given, options)[0]
        return self._output.read(result, padded)

    def close(self) -> None:
        """Give back the sessions' memory."""
        self._sessions.close()


def _giving_memory_back() -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def load(files: ModelFiles, spec: ModelSpec, *, dtype: Dtype, lanes: int = 0) -> OnnxFileBackend:
    """Start the sessions of a repository's ONNX file; `lanes` 0 means one for each core. Raises `LoadError`."""
    path = _find(files, spec)
    if dtype != "float32":
        raise LoadError(
            f"{path} runs as it is and cannot be made {dtype}: leave dtype at float32, and for less precision choose "
            "another of the repository's files by onnx_file (often onnx/model_quantized.onnx)"
        )
    external = _external_files(path, files)
    num_bytes = sum(file.stat().st_size for file in (path, *external.values()))
    sessions = Sessions(partial(_start, path, external), num_bytes=num_bytes)
    facts = _Facts.read(files, spec)
    with sessions.free() as session:
        feeds = {declared.name: _feed(path, declared) for declared in session.get_inputs()}
        output = _choose(path, _try(path, session, feeds, facts), spec)
    return OnnxFileBackend(sessions, feeds, output, facts, lanes=lanes or cores())


def _find(files: ModelFiles, spec: ModelSpec) -> Path:
    candidates = (spec.onnx_file,) if spec.onnx_file else USUAL_GRAPHS
    name = next((name for name in candidates if files.has(name)), None)
    if name is None:
        raise LoadError(f"{spec.id} has no {' and no '.join(candidates)} in {files.root}: name its file by onnx_file")
    return files.path(name)


def _start(path: Path, external: Mapping[str, Path], options: ort.SessionOptions) -> ort.InferenceSession:
    # ONNX Runtime would open these files itself, but not where the hub's cache keeps them as links to its blobs.
    contents = [np.memmap(file, np.uint8, mode="r") for file in external.values()]
    options.add_external_initializers_from_files_in_memory(list(external), contents, list(map(len, contents)))
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it raises many kinds, all of them about this file
        raise LoadError(f"ONNX Runtime refuses {path}: {_one_line(error)}") from error


def _feed(path: Path, declared: ort.NodeArg) -> _Feed:
    """Find what an input is given; raises `LoadError` for one that is not known."""
    if declared.name in _GIVEN and declared.type in _INTEGERS:
        give, integer = _GIVEN[declared.name], _INTEGERS[declared.type]
        return lambda padded: give(padded).astype(integer, copy=False)
    if declared.name.startswith(_PAST) and declared.type in _FLOATS:
        match declared.shape:
            case [_, int(heads), str() | None, int(size)]:
                kind = _FLOATS[declared.type]
                return lambda padded: np.zeros((len(padded.mask), heads, 0, size), kind)
    raise LoadError(
        f"{path} wants an input {declared.name!r}, {declared.type} of shape {declared.shape}, which is not known "
        f"(known are {', '.join(_GIVEN)} of integers, and {_PAST}* of shape [batch, heads, past, size])"
    )


def _try(
    path: Path, session: ort.InferenceSession, feeds: Mapping[str, _Feed], facts: _Facts
) -> Mapping[str, NDArray[Any]]:
    """Run two short inputs: what the outputs hold is seen from them, whatever shapes the file declares."""
    zeros, positions = np.zeros(5, np.int64), np.array([0, 1, 2, 0, 1])  # (T,)
    padded = _Padded.of(PackedBatch(zeros, positions, zeros, np.array([0, 3, 5])), facts)
    names = [output.name for output in session.get_outputs() if output.type.startswith("tensor")]
    try:
        results = session.run(names, {name: feed(padded) for name, feed in feeds.items()})
    except Exception as error:  # as above
        raise LoadError(f"ONNX Runtime cannot run {path}: {_one_line(error)}") from error
    return dict(zip(names, results, strict=True))


def _choose(path: Path, results: Mapping[str, NDArray[Any]], spec: ModelSpec) -> _Output:
    """Find the output that holds what this kind of model gives; raises `LoadError`."""
    wanted = (*_WANTED[spec.kind], *([("logits", _TOKENS)] if spec.yes_no else []))
    fitting = [name for name, axes in wanted if name in results and results[name].ndim == axes]
    if not fitting and len(results) == 1:  # whatever it is called
        fitting = [name for name, result in results.items() if result.ndim in {axes for _, axes in wanted}]
    if not fitting:
        found = ", ".join(f"{name} ({result.ndim} axes)" for name, result in results.items())
        named = " or ".join(f"{name} ({axes} axes)" for name, axes in wanted)
        raise LoadError(f"{path} has no output for a model of kind {spec.kind}: wanted is {named}, but it has {found}")
    name = fitting[0]
    pooled, width = results[name].ndim == _INPUTS, results[name].shape[-1]
    if spec.kind in {"embed", "multi_vector"} and width != spec.dimensions:
        raise LoadError(f"{path} gives vectors of {width} numbers in {name}, but {spec.id} has {spec.dimensions}")
    if spec.dense and not pooled:
        raise LoadError(
            f"{path} gives hidden states, but the vectors of {spec.id} take more layers ({', '.join(spec.dense)}): "
            "choose a file with the output sentence_embedding by onnx_file"
        )
    return _Output(name, pooled or spec.yes_no is not None, spec.yes_no)


# Files are checked before ONNX Runtime opens any of them: a graph names the files of its tensors itself.


def _external_files(path: Path, files: ModelFiles) -> Mapping[str, Path]:
    """Check a graph and return the files beside it that hold its tensors, by the name that it has for them."""
    external: dict[str, Path] = {}
    for tensor in _tensors(_parse(path)):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in external:
            external[location] = _locate(path, location, files.root)
        end, size = _end(path, entries), external[location].stat().st_size
        if end > size or not size:
            raise LoadError(f"{path} keeps tensors in {location!r}, which is cut short: {size} bytes, not {end}")
    return external


def _parse(path: Path) -> ModelProto:
    _refuse_pointer(path)
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # of protobuf, which is not ours to import
        raise LoadError(f"{path} is cut short, corrupt, or not an ONNX file: {_one_line(error)}") from error
    if not model.graph.node:
        raise LoadError(f"{path} is cut short or not an ONNX file: there is no graph in it")
    return model


def _tensors(message: Any) -> Iterator[TensorProto]:
    """Yield each tensor of a protobuf message, wherever it stands: initialisers, constants, subgraphs, functions."""
    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            yield from _tensors(part)


def _locate(path: Path, location: str, root: Path) -> Path:
    file, parts = path.parent / location, PurePosixPath(location).parts
    # ONNX Runtime would take a location with a `*` for an address in memory.
    if (
        not parts
        or location.startswith("/")
        or {"..", "*"} & {*parts}
        or (file.exists() and not _is_within(file, root))
    ):
        raise LoadError(f"{path} keeps tensors in {location!r}, which is not a file of the model's own folder")
    if not file.is_file():
        raise LoadError(f"{path} keeps tensors in {location!r}, but {file} is missing: download it, too")
    _refuse_pointer(file)
    return file


def _is_within(file: Path, root: Path) -> bool:
    """Tell whether a file lies in the model's folder, or is a link of the hub's cache to one of the model's blobs."""
    root = root.resolve()
    if file.resolve().is_relative_to(root):
        return True
    if root.parent.name != "snapshots" or not file.is_symlink():
        return False
    # One link only is followed: a blob may itself be a link, to a store that all models share.
    blob = file.parent.resolve() / file.readlink()
    return blob.parent.resolve() == (root.parent.parent / "blobs").resolve()


def _end(path: Path, entries: Mapping[str, str]) -> int:
    try:
        return int(entries.get("offset") or 0) + int(entries.get("length") or 0)
    except ValueError as error:
        raise LoadError(f"{path} is corrupt: it has a tensor at {entries}") from error


def _refuse_pointer(path: Path) -> None:
    if is_lfs_pointer(path):
        raise LoadError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
