"""Small honest implementations that stand in for the expensive parts."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from quiver.backends import Backend
from quiver.engine.model import Model
from quiver.engine.tokenizer import Tokenizer
from quiver.models.catalogue import ModelSpec
from quiver.types import Encoding, Floats, PackedBatch

HIDDEN = 32
MAX_TOKENS = 512
SPEC = ModelSpec(
    id="test/hash",
    weights="test/hash",
    aliases=("hash",),
    pooling="cls",
    normalize=False,  # the hash is a unit vector already; once more would move its last bits
    dimensions=HIDDEN,
    max_tokens=MAX_TOKENS,
)


def byte_tokenizer(max_tokens: int = MAX_TOKENS) -> Tokenizer:
    """Make a tokenizer whose ids are the bytes of the text, so that distinct texts have distinct ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, max_tokens, len(alphabet), num_tail=0)


def hash_vector(ids: Sequence[int]) -> Floats:
    """Return the unit vector (HIDDEN,) that `HashBackend` gives an input."""
    digest = hashlib.shake_256(np.array(ids, np.int64).tobytes()).digest(HIDDEN)
    vector = np.frombuffer(digest, np.uint8).astype(np.float32) - np.float32(127.5)
    return vector / np.sqrt((vector * vector).sum(keepdims=True))


class FakeClock:
    """A clock that stands still until it is told how late it is."""

    def __init__(self, seconds: float = 1000.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        """Return the time."""
        return self.seconds

    def pass_by(self, seconds: float) -> None:
        """Let time pass."""
        self.seconds += seconds


class HashBackend:
    """A backend whose vector is a hash of the input's ids; `before` is called with each batch."""

    name = "hash"
    padded = False
    exact = True
    pooled = False
    vocab_size = 256
    max_positions = MAX_TOKENS

    def __init__(
        self, *, lanes: int = 2, batch_tokens: int = 128, before: Callable[[PackedBatch], None] = lambda _: None
    ) -> None:
        self.lanes = lanes
        self.batch_tokens = batch_tokens
        self.closed = False
        self._before = before

    def forward(self, batch: PackedBatch) -> Floats:
        """Return (T, HIDDEN): every token of an input has the input's vector."""
        self._before(batch)
        ends = batch.cu_seqlens
        vectors = [hash_vector(batch.ids[start:end]) for start, end in pairwise(ends)]
        return np.repeat(np.stack(vectors), batch.lengths, axis=0)

    def close(self) -> None:
        """Note that it is over."""
        self.closed = True


class TokenBackend(HashBackend):
    """A backend that gives each token the hash of its own id, whatever stands beside it."""

    def forward(self, batch: PackedBatch) -> Floats:
        """Return (T, HIDDEN)."""
        self._before(batch)
        return np.stack([hash_vector([token]) for token in batch.ids])


class LogitBackend(HashBackend):
    """A backend with a head: the logits of an input are the first numbers of its hash, six times as large."""

    pooled = True

    def __init__(self, *, labels: int = 1, **options: object) -> None:
        super().__init__(**options)
        self._labels = labels

    def forward(self, batch: PackedBatch) -> Floats:
        """Return (B, labels)."""
        self._before(batch)
        vectors = [hash_vector(batch.ids[start:end]) for start, end in pairwise(batch.cu_seqlens)]
        return 6 * np.stack(vectors)[:, : self._labels]


class LentBackend:
    """A backend that outlives the server that it is lent to."""

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self.lanes = backend.lanes
        self.batch_tokens = backend.batch_tokens
        self.padded = backend.padded
        self.exact = backend.exact
        self.pooled = backend.pooled
        self.vocab_size = backend.vocab_size
        self.max_positions = backend.max_positions
        self.forward = backend.forward

    def close(self) -> None:
        """Stay open: the owner closes it."""


def hash_model(**backend: object) -> Model:
    """Make a model of the hash backend."""
    return fake_model(HashBackend(**backend))


def fake_model(backend: Backend, **facts: object) -> Model:
    """Make a model of a backend; `facts` change what is known of it."""
    return Model(replace(SPEC, **facts), "float32", byte_tokenizer(), backend)


def encodings(lengths: Sequence[int], *, seed: int = 0, vocab_size: int = 256) -> list[Encoding]:
    """Make random encodings of the given lengths."""
    rng = np.random.default_rng(seed)
    return [Encoding(rng.integers(0, vocab_size, n)) for n in lengths]
