"""The values that every layer speaks: what a caller asks for, what the engine answers.

Shapes: B inputs, T tokens of all inputs together, H hidden size, D dimensions of a vector.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quiver.accounts import ApiKey, Request

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

Results = Floats | Sequence[Floats]
"""One for each input: rows of one array, or arrays of any shape."""

Input = str | Sequence[int]
"""One text, or the token ids of one text as the model's own tokenizer gives them, special tokens included."""


Pooling = Literal["mean", "cls", "last_token"]
Kind = Literal["embed", "rerank", "classify", "sparse", "multi_vector"]
"""What a model gives: a vector for an input; a score for a pair; scores for labels; weights of words; a vector for
each token."""

Activation = Literal["sigmoid", "softmax"]
"""Logits to probabilities: each label by itself, or shares among all."""

Side = Literal["left", "right"]
"""Where an over-long input is cut."""

IdsOf = Literal["native", "cl100k", "refuse", "configured"]
"""Whose token ids are: the model's own, those of OpenAI's tokenizer, nobody's, or what the server is told to take
them for."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that a cross-encoder reads together."""

    query: str
    document: str


class Priority(StrEnum):
    """Whose turn comes first at a lane: interactive inputs always go before bulk ones."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and for how long. Lanes take turns between callers, so that none can starve another."""

    id: str
    deadline: float = math.inf
    """When nobody waits for the answer any more, by the monotonic clock."""
    key: ApiKey | None = None
    """The key of an account that was shown, if calls need one."""
    priority: Priority = Priority.INTERACTIVE
    """The best turn that its requests may have."""
    request: Request | None = None
    """What makes this request the same as an earlier one, where the client says so."""
    tab: object = None
    """What all of its request is put on, where that is more than one call of the engine (`billing.py`)."""

    @property
    def account(self) -> str:
        """Name the user whose key it is; nobody's is empty."""
        return f"user {self.key.user.id}" if self.key else ""

    def seconds_left(self) -> float:
        """Return how long an answer is of use."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """What every request to a model may say."""

    model: str | None = None
    """An id or alias; None means the server's first model."""
    truncate: bool | None = None
    """Cut an over-long input instead of refusing it; None leaves it to the configuration."""
    truncate_side: Side = "right"
    """The end that is cut; of a pair, the document is cut and the query kept."""
    priority: Priority = Priority.INTERACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest(ModelRequest):
    """Inputs to turn into vectors, and how."""

    inputs: Sequence[Input]
    ids_of: IdsOf = "native"
    """Whose the token ids among the inputs are."""
    dimensions: int | None = None
    """Matryoshka cut; None keeps them all."""
    prompt: str | None = None
    """Put before each text, as it is."""
    prompt_name: str | None = None
    """One of the model's own prompts, by name; one that it does not have is refused."""
    task: str | None = None
    """What the inputs are for (query, document, …): the prompt of that name, where the model has one."""
    normalize: bool | None = None
    """Scale vectors to unit length, or not; None does as the model's own pipeline."""
    late_chunking: bool = False
    """Read all texts as one, so that each vector knows what stands around its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest(ModelRequest):
    """Documents to put in the order of their relevance to a query."""

    query: str
    documents: Sequence[str]
    top_n: int | None = None
    """How many of the best to return; None means all."""
    raw_scores: bool = False
    """Return a cross-encoder's logits instead of values from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityRequest(ModelRequest):
    """Texts to compare with a source."""

    source: str
    texts: Sequence[str]
    prompt_name: str | None = None
    """One of the model's own prompts, before the source and each text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest(ModelRequest):
    """Texts to cut into tokens; none is shortened."""

    texts: Sequence[str]
    special_tokens: bool = True
    """Add those that the model reads around a text."""
    prompt_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRequest(ModelRequest):
    """Token ids to turn back into texts."""

    ids: Sequence[Sequence[int]]
    special_tokens: bool = False
    """Write special tokens too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyRequest(ModelRequest):
    """Texts or pairs to give a score for each of the model's labels."""

    inputs: Sequence[str | Pair]
    raw_scores: bool = False
    """Return logits instead of probabilities."""
    activation: Activation | None = None
    """How logits become probabilities; None does as the model's number of labels has it."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went, in seconds. `compute` runs from hand-over to the lanes to the last vector."""

    encode: float = 0.0
    compute: float = 0.0
    total: float = 0.0
    queue: float = 0.0
    """The part of `compute` until a lane was free, on average over the inputs."""
    first: float = 0.0
    """The part of `compute` until a lane was free for the first of the inputs."""
    start: float = 0.0
    """When it began, by the performance counter."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request was worth."""

    num_tokens: int = 0
    """Tokens that the model read, special tokens included."""
    truncated: tuple[int, ...] = ()
    """The inputs that were cut, by their index."""
    timings: Timings = field(default_factory=Timings)
    cached: tuple[int, ...] = ()
    """The inputs whose results were known before, by their index."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector per input, in the order of the inputs."""

    model: str
    vectors: Floats  # (B, D), unit length where the model normalises
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class TokenEmbeddings:
    """One vector per token of each input, special tokens included, in the order of the inputs."""

    model: str
    vectors: Sequence[Floats]  # B × (T, D)
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class SparseVector:
    """The entries of a vector that are not zero, by rising index."""

    indices: Ints  # (N,) ids of the model's vocabulary
    values: Floats  # (N,)


@dataclass(frozen=True, slots=True)
class SparseEmbeddings:
    """One sparse vector per input, in the order of the inputs."""

    model: str
    vectors: Sequence[SparseVector]
    usage: Usage = field(default_factory=Usage)


ScoredBy = Literal["cross-encoder", "cosine", "maxsim"]
"""How a score came about: by a model that reads both texts, or from their vectors."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Documents by relevance, the best first; equals keep their order."""

    model: str
    scored_by: ScoredBy
    order: Ints  # (N,) indices of the documents
    scores: Floats  # (N,) of the documents in that order
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class Similarities:
    """The cosine of each text with the source, in the order of the texts."""

    model: str
    scores: Floats  # (N,)
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a text."""

    id: int
    text: str
    special: bool
    start: int | None
    """Where it begins in the text, in characters; None for a special token."""
    stop: int | None


@dataclass(frozen=True, slots=True)
class Tokenization:
    """The tokens of each text, in the order of the texts."""

    model: str
    tokens: Sequence[Sequence[Token]]
    texts: Sequence[str] = ()
    """What was cut: each text with its prompt before it."""


@dataclass(frozen=True, slots=True)
class Classification:
    """A score per label for each input, in the order of the inputs."""

    model: str
    labels: tuple[str, ...]
    scores: Floats  # (B, L)
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class Encoding:
    """One input as the model reads it."""

    ids: Ints  # (T,)
    type_ids: Ints | None = None  # (T,); None means all zeros: everything but a pair
    truncated: bool = False
    """It was longer, and was cut."""
    per_token: bool = False
    """A vector for each of its tokens is wanted instead of one for all."""
    unscaled: bool = False
    """Its vector, or vectors, are wanted as the model computes them, whatever their length."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Inputs laid end to end for one forward pass: no padding exists in here."""

    ids: Ints  # (T,)
    positions: Ints  # (T,) restart at 0 for each input
    type_ids: Ints  # (T,)
    cu_seqlens: Ints  # (B + 1,) input i is tokens cu_seqlens[i]:cu_seqlens[i + 1]
    per_token: bool = False
    """A result for each token is wanted, of some of the inputs at least."""

    @property
    def lengths(self) -> Ints:
        """Tokens of each input, shape (B,)."""
        return np.diff(self.cu_seqlens)


class ModelState(StrEnum):
    """What a model is doing."""

    AVAILABLE = "available"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class FileProgress:
    """How far the download of one file has come."""

    file: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """What the server can say about one model."""

    id: str
    state: ModelState
    kind: Kind = "embed"
    description: str = ""
    pooling: str = ""
    revision: str = ""
    """Commit or branch of the hub's repository that its files are of."""
    aliases: tuple[str, ...] = ()
    created: int = 0
    """Unix seconds of when it was loaded (0: not yet)."""
    dimensions: int = 0
    max_tokens: int = 0
    prompts: tuple[str, ...] = ()
    """Names of the prompts that it knows."""
    labels: tuple[str, ...] = ()
    backend: str = ""
    dtype: str = ""
    batch_tokens: int = 0
    """Most tokens in one forward pass (0: not loaded yet); a longer input runs alone."""
    num_bytes: int = 0
    """Size of its weights."""
    num_special_tokens: int = 0
    """Tokens that it reads around a text (0: not loaded yet)."""
    downloads: tuple[FileProgress, ...] = ()
    batch_invariant: bool = False
    """The warm-up found each vector bit-identical alone and packed on this machine."""
    error: str = ""
