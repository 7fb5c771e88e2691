"""One loaded model: encodings in, results out. Holds no queue and knows no caller."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quiver.backends import Backend, onnx
from quiver.config import Dtype
from quiver.engine import tokenizer
from quiver.engine.packing import pack
from quiver.engine.pooling import normalise, pool, word_weights
from quiver.engine.tokenizer import Tokenizer
from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec
from quiver.models.files import ModelFiles
from quiver.types import Encoding, Floats, PackedBatch, Results

_PROBE_LENGTHS = (2, 17, 1, 40, 9, 33, 21, 5)
"""Tokens of the inputs that the warm-up computes alone and packed; all of them fill one batch on a CPU."""


class NotFinite(ValueError):
    """A result holds NaN or an infinity."""


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
        output = self.backend.forward(batch)
        if not np.isfinite(output).all():
            raise NotFinite("a result is not finite")
        if self.spec.kind in {"rerank", "classify"}:
            return output
        if self.spec.kind == "sparse":
            return word_weights(output, batch.cu_seqlens)
        if self.spec.kind == "multi_vector":
            return self._each_token(output, batch)
        vectors = output if self.backend.pooled else pool(output, batch.cu_seqlens, self.spec.pooling)
        vectors = normalise(vectors) if self.spec.normalize else vectors
        if any(encoding.per_token for encoding in encodings):
            tokens = self._each_token(output, batch)
            return [tokens[i] if e.per_token else vectors[i] for i, e in enumerate(encodings)]
        return vectors

    def _each_token(self, output: Floats, batch: PackedBatch) -> Sequence[Floats]:
        vectors = normalise(output) if self.spec.normalize else output
        return np.split(vectors, batch.cu_seqlens[1:-1])

    def is_batch_invariant(self) -> bool:
        """Tell whether this machine computes the same bits for an input alone and packed. Raises `LoadError`.

        It is also the warm-up: what is wrong with the weights' shapes shows here, before anyone is served.
        """
        try:
            return self._probe()
        except Exception as error:
            raise LoadError(f"{self.spec.id} is loaded but cannot compute: {error}") from error

    def _probe(self) -> bool:
        rng = np.random.default_rng(0)
        probes = [Encoding(rng.integers(0, self.backend.vocab_size, n)) for n in _PROBE_LENGTHS]
        alone = [self.compute([probe])[0] for probe in probes]
        orders = (np.arange(len(probes)), np.arange(len(probes))[::-1], rng.permutation(len(probes)))
        return all(
            np.array_equal(result, alone[i])
            for order in orders
            for i, result in zip(order, self.compute([probes[i] for i in order]), strict=True)
        )


def load(spec: ModelSpec, files: ModelFiles, *, dtype: Dtype, lanes: int) -> Model:
    """Load a model from its files; blocks. Raises `LoadError`, naming the file."""
    backend = onnx.load(files, spec, dtype=dtype, lanes=lanes)
    if spec.max_tokens > backend.max_positions:
        raise LoadError(f"{spec.id} has {backend.max_positions} positions, but max_tokens is {spec.max_tokens}")
    return Model(spec, dtype, tokenizer.load(files.path("tokenizer.json"), max_tokens=spec.max_tokens), backend)
