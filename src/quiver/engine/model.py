"""One loaded model: encodings in, results out. Holds no queue and knows no caller."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quiver.backends import Backend, ct2, onnx, onnx_file, pytorch
from quiver.config import BackendName, Dtype, ModelSettings
from quiver.engine import tokenizer
from quiver.engine.packing import pack
from quiver.engine.pooling import largest_logits, normalise, pool, word_weights
from quiver.engine.tokenizer import Tokenizer
from quiver.errors import LoadError, NotFinite
from quiver.graphs import is_known
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Encoding, Floats, PackedBatch, Pair, Results

_PROBE_LENGTHS = (2, 17, 1, 127, 29, 15, 9, 21, 3)
"""Tokens of the inputs that the warm-up computes alone and packed: they fill one batch on a CPU, and in some orders one
of them would straddle the blocks in which products are added up."""
FIRST_RATE = 1000.0
"""Tokens per second that are assumed of a model before any were measured."""
_PAIR_MARK = "␞"
_ROUNDING = 0.05
"""How far fewer bits may move a number."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What the first forward passes showed."""

    batch_invariant: bool = True
    """This machine gives the same bits alone and packed."""
    tokens_per_second: float = FIRST_RATE
    """Speed of a forward pass of the largest batch."""
    fingerprint: str = ""
    """Of the bits that it gives for some inputs: other weights, or another machine's arithmetic, give others."""


@dataclass(frozen=True, slots=True)
class Model:
    """A tokenizer, a backend, and what the catalogue says of them."""

    spec: ModelSpec
    dtype: Dtype
    tokenizer: Tokenizer
    backend: Backend

    def compute(self, encodings: Sequence[Encoding]) -> Results:
        """Encodings -> B results in full precision; blocks, in at most `backend.lanes` threads at once.

        A result is a vector (H,), or logits (L,), the weights of words (V,), or a vector for each token (T, D).
        """
        batch = pack(encodings)
        results = self._results(self.backend.forward(batch), batch, encodings)
        if not (np.isfinite(results).all() if isinstance(results, np.ndarray) else _are_finite(results)):
            raise NotFinite("the model makes NaN or infinity of this input")
        return results

    def _results(self, output: Floats, batch: PackedBatch, encodings: Sequence[Encoding]) -> Results:
        match self.spec.kind:
            case "rerank" | "classify":
                return output
            case "sparse":
                largest = output if len(output) == len(encodings) else largest_logits(output, batch.cu_seqlens)
                return word_weights(largest)
            case "multi_vector":
                return np.split(normalise(output) if self.spec.normalize else output, batch.cu_seqlens[1:-1])
            case "embed":
                return self._embed(output, batch, encodings)

    def _embed(self, output: Floats, batch: PackedBatch, encodings: Sequence[Encoding]) -> Results:
        # With one token in each input, its state is the pooled one.
        is_pooled = len(output) == len(encodings)
        pooled = output if is_pooled else pool(output, batch.cu_seqlens, self.spec.pooling)
        vectors = normalise(pooled) if self.spec.normalize else pooled
        if not any(encoding.per_token or encoding.unscaled for encoding in encodings):
            return vectors
        tokens = np.split(output, batch.cu_seqlens[1:-1])
        return [tokens[i] if e.per_token else pooled[i] if e.unscaled else vectors[i] for i, e in enumerate(encodings)]

    def warm_up(self) -> WarmUp:
        """Compute the largest batch and some small ones.

        What is wrong with the weights' shapes shows here, before anyone is served. Raises `LoadError`.
        """
        try:
            probes = self._probes()
            alone = [self.compute([probe])[0] for probe in probes]
            is_invariant = self._is_batch_invariant(probes, alone)
            return WarmUp(is_invariant, self._compute_largest(), _fingerprint(alone))
        except Exception as error:
            raise LoadError(f"{self.spec.id} is loaded but cannot compute: {error}") from error

    def _compute_largest(self) -> float:
        """Compute the largest batch, which shows its speed once others have gone before; returns tokens per second."""
        length = min(self.spec.max_tokens, self.backend.batch_tokens)
        largest = [Encoding(np.zeros(length, np.int64))] * max(1, self.backend.batch_tokens // length)
        start = time.perf_counter()
        self.compute(largest)
        return length * len(largest) / (time.perf_counter() - start)

    def _probes(self) -> list[Encoding]:
        rng = np.random.default_rng(0)
        lengths = [min(length, self.spec.max_tokens) for length in _PROBE_LENGTHS]
        return [Encoding(rng.integers(0, self.backend.vocab_size, n)) for n in lengths]

    def _is_batch_invariant(self, probes: Sequence[Encoding], alone: Sequence[Floats]) -> bool:
        rng = np.random.default_rng(0)
        orders = (np.arange(len(probes)), np.arange(len(probes))[::-1], rng.permutation(len(probes)))
        return all(
            np.array_equal(result, alone[i])
            for order in orders
            for i, result in zip(order, self.compute([probes[i] for i in order]), strict=True)
        )

    def check_golden(self) -> None:
        """Compare with numbers that the true weights are known to give. Raises `LoadError`."""
        if not (golden := self.spec.golden):
            return
        query, _, document = golden.text.partition(_PAIR_MARK)
        (encoding,) = self.tokenizer.encode([Pair(query, document) if document else query], truncate=True)
        found = self.compute([encoding])[0][: len(golden.first)]
        tolerance = golden.tolerance if self.dtype == "float32" else max(golden.tolerance, _ROUNDING)
        if np.abs(found - np.array(golden.first)).max() > tolerance:
            raise LoadError(
                f"{self.spec.id} computes {np.round(found, 4).tolist()} for {golden.text!r}, but its true weights give "
                f"{list(golden.first)}: its files are damaged or another model's (self_test=false loads it all the same)"
            )


def _fingerprint(results: Sequence[Floats]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for result in results:
        digest.update(np.ascontiguousarray(result, np.float32).tobytes())
    return digest.hexdigest()


def _are_finite(results: Sequence[Floats]) -> bool:
    return all(np.isfinite(result).all() for result in results)


def load(spec: ModelSpec, files: ModelFiles, settings: ModelSettings, *, lanes: int) -> Model:
    """Load a model from its files; blocks. Raises `LoadError`, naming the file, or `MissingExtra`."""
    name = settings.backend
    if name == "auto":
        name = "torch" if spec.onnx_file is None and pytorch.has_gpu() else "onnx"
    dtype = settings.dtype if settings.dtype != "auto" else spec.dtype
    if dtype is None:
        dtype = pytorch.best_dtype() if name == "torch" else "float32"
    if name == "onnx" and dtype in {"float16", "bfloat16"}:
        dtype = "float32"  # a CPU computes in no half precision: better than asked for
    backend = _load_backend(name, spec, files, dtype, lanes)
    if spec.max_tokens > backend.max_positions:
        backend.close()
        raise LoadError(f"{spec.id} has {backend.max_positions} positions, but max_tokens is {spec.max_tokens}")
    return Model(spec, dtype, tokenizer.load(files.path("tokenizer.json"), spec), backend)


def _load_backend(name: BackendName, spec: ModelSpec, files: ModelFiles, dtype: Dtype, lanes: int) -> Backend:
    match name:
        case "torch":
            return pytorch.load(files, spec, dtype=dtype, lanes=lanes)
        case "ct2":
            return ct2.load(files, spec, dtype=dtype, lanes=lanes)
    # Compiled is best; the repository's own ONNX file runs where it is asked for, or is all there is.
    can_compile = files.weight_names() and is_known(files.json("config.json"))
    if spec.onnx_file or (not can_compile and files.own_graph()):
        return onnx_file.load(files, spec, dtype=dtype, lanes=lanes)
    return onnx.load(files, spec, dtype=dtype, lanes=lanes)
