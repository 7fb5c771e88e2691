"""The wire forms of Text Embeddings Inference: its bodies and replies, and what the several shapes of a field mean."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import msgspec

from quiver import errors
from quiver.errors import InvalidInput, QuiverError
from quiver.types import Activation, Input, ModelStatus, Pair

Direction = Literal["Left", "left", "LEFT", "Right", "right", "RIGHT"]
Inputs = str | list[int | str | list[int]]
"""A text, the token ids of a text, or several of both."""


class ModelBody(msgspec.Struct, kw_only=True):
    """What every body may say."""

    model: str | None = None
    """Not TEI's: which model, where one of this name is served; else, as in TEI, the server's own."""


class CutBody(ModelBody, kw_only=True):
    """What happens to an over-long input."""

    truncate: bool | None = None
    truncation_direction: Direction | None = None
    """The end that is cut; null: the right one."""


class InputsBody(CutBody, kw_only=True):
    """Body of POST /embed_all and /embed_sparse."""

    inputs: Inputs
    prompt_name: str | None = None


class EmbedBody(InputsBody, kw_only=True):
    """Body of POST /embed."""

    normalize: bool | None = True
    dimensions: int | None = None


class RerankBody(CutBody, kw_only=True):
    """Body of POST /rerank."""

    query: str
    texts: list[str]
    raw_scores: bool | None = False
    return_text: bool | None = False


class PredictParameters(msgspec.Struct, kw_only=True):
    """Not TEI's: what huggingface_hub's `text_classification` sends."""

    top_k: Annotated[int, msgspec.Meta(ge=1)] | None = None
    function_to_apply: Activation | Literal["none"] | None = None


class PredictBody(CutBody, kw_only=True):
    """Body of POST /predict: a text, a pair `[a, b]`, or several of both `[[a], [a, b]]`."""

    inputs: str | list[str | list[str]]
    raw_scores: bool | None = False
    parameters: PredictParameters | None = None


class SimilarityInputs(msgspec.Struct):
    """A text, and those to compare with it."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(msgspec.Struct, kw_only=True):
    """How they are read."""

    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityBody(ModelBody, kw_only=True):
    """Body of POST /similarity."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


class TokenizeBody(ModelBody, kw_only=True):
    """Body of POST /tokenize."""

    inputs: str | list[str]
    add_special_tokens: bool | None = True
    prompt_name: str | None = None


class DecodeBody(ModelBody, kw_only=True):
    """Body of POST /decode: the token ids of a text, or of several."""

    ids: list[int | list[int]]
    skip_special_tokens: bool | None = True


class OpenAIBody(ModelBody, kw_only=True):
    """Body of POST /v1/embeddings."""

    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class AnyBody(ModelBody, kw_only=True):
    """Body of POST /: that of the verb which it looks like."""

    inputs: Any = None
    query: Any = None
    texts: Any = None


class VertexBody(msgspec.Struct):
    """Body of POST /vertex: bodies of POST /."""

    instances: list[msgspec.Raw]


class VertexReply(msgspec.Struct):
    """Reply of POST /vertex: what POST / replies to each."""

    predictions: list[list[Any]]


class TokenReply(msgspec.Struct):
    """One token, and where it stands in the text with its prompt, in bytes; a special one stands nowhere."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Weight(msgspec.Struct):
    """An entry of a sparse vector."""

    index: int
    value: float


class Prediction(msgspec.Struct):
    """A label and its score."""

    score: float
    label: str


class Rank(msgspec.Struct, kw_only=True):
    """A text by its place in the request, and its score."""

    index: int
    text: str | msgspec.UnsetType = msgspec.UNSET
    score: float


class ErrorReply(msgspec.Struct):
    """Body of every reply that is not a success."""

    error: str
    error_type: str


class EmbeddingType(msgspec.Struct):
    """Of a model that gives vectors: how its tokens become one."""

    pooling: str


class LabelType(msgspec.Struct):
    """Of a model that gives scores: what they stand for."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(msgspec.Struct, kw_only=True):
    """What the model is for: exactly one of these."""

    embedding: EmbeddingType | msgspec.UnsetType = msgspec.UNSET
    classifier: LabelType | msgspec.UnsetType = msgspec.UNSET
    reranker: LabelType | msgspec.UnsetType = msgspec.UNSET


class InfoReply(msgspec.Struct, kw_only=True):
    """Reply of GET /info."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: ModelType
    max_concurrent_requests: int
    """So many inputs may wait, however long they are: Quiver itself counts their tokens."""
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None = None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None = None
    docker_label: str | None = None


class OpenAIEmbedding(msgspec.Struct):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    embedding: list[float] | str
    index: int


class OpenAIUsage(msgspec.Struct):
    """What the request cost, in tokens."""

    prompt_tokens: int
    total_tokens: int


class OpenAIReply(msgspec.Struct):
    """Reply of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class OpenAIErrorReply(msgspec.Struct):
    """Body of what goes wrong at POST /v1/embeddings: flat, unlike OpenAI's own."""

    message: str
    code: int
    type: str


def read_inputs(given: Inputs) -> Sequence[Input]:
    """Tell the forms apart: flat numbers are the ids of one text, and so is an empty list. Raises `InvalidInput`."""
    if isinstance(given, str):
        inputs: Sequence[Input] = [given]
    elif {type(item) for item in given} <= {int}:
        inputs = [cast(list[int], given)]
    elif any(isinstance(item, int) for item in given):
        raise InvalidInput("`inputs` mixes numbers with texts: send the ids of each text in a list of their own")
    else:
        inputs = cast(list[Input], given)
    if not all(inputs):
        raise Empty("`inputs` cannot be empty")
    return inputs


def read_pairs(given: str | list[str | list[str]]) -> Sequence[str | Pair]:
    """Read the forms of a predict body; a flat list of two is one pair. Raises `InvalidInput`."""
    if isinstance(given, str):
        inputs: list[str | Pair] = [given]
    elif is_batch(given):
        inputs = [_text_or_pair(item) for item in given]
    else:
        inputs = [_text_or_pair(given)]
    if any(item in ("", Pair("", "")) for item in inputs):
        raise Empty("`inputs` cannot be empty")
    return inputs


def is_batch(given: str | list[str | list[str]]) -> bool:
    """Tell several inputs from one."""
    return isinstance(given, list) and any(isinstance(item, list) for item in given)


def _text_or_pair(texts: str | list[str | list[str]] | list[str]) -> str | Pair:
    match texts:
        case [str(text)]:
            return text
        case [str(first), str(second)]:
            return Pair(first, second)
    raise InvalidInput("`inputs` must be a text, [text] or [text, text], or a list of such lists")


def read_ids(given: list[int | list[int]]) -> Sequence[Sequence[int]]:
    """Tell the ids of one text from those of several. Raises `InvalidInput`."""
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise InvalidInput("`ids` mixes numbers with lists: send the ids of each text in a list of their own")
    lists = cast(list[list[int]], given) if kinds == {list} else [cast(list[int], given)]
    if not all(lists):
        raise Empty("`input_ids` cannot be empty")
    return lists


def model_type(status: ModelStatus) -> ModelType:
    """Say what a model is for."""
    labels = status.labels or tuple(f"LABEL_{i}" for i in range(status.dimensions))
    named = LabelType(
        id2label={str(i): label for i, label in enumerate(labels)},
        label2id={label: i for i, label in enumerate(labels)},
    )
    match status.kind:
        case "classify":
            return ModelType(classifier=named)
        case "rerank":
            return ModelType(reranker=named)
        case "sparse":
            return ModelType(embedding=EmbeddingType("splade"))
        case "multi_vector":
            return ModelType(embedding=EmbeddingType("none"))
        case _:
            return ModelType(embedding=EmbeddingType(status.pooling))


class Empty(InvalidInput):
    """There is nothing to compute; TEI refuses empty texts, too."""


STATUSES: dict[type[QuiverError], int] = {
    InvalidInput: 422,
    errors.InvalidJson: 400,
    Empty: 400,
    errors.WrongKind: 424,
    errors.EngineError: 424,
}
_ERROR_TYPES: dict[type[QuiverError], str] = {
    errors.Refused: "Validation",
    Empty: "Empty",
    errors.WrongKind: "Backend",
    errors.Unavailable: "Unhealthy",
    errors.Overloaded: "Overloaded",
    errors.RateLimited: "Overloaded",
    errors.InsufficientQuota: "Overloaded",
    errors.DeadlineExceeded: "Overloaded",
    errors.LaneDied: "Unhealthy",
    QuiverError: "Backend",
}
"""TEI's words; the nearest ancestor counts."""


def render_error(status: int, error: QuiverError) -> bytes:
    """Write an error as TEI does, but never as mere text: huggingface_hub reads objects only."""
    del status
    return msgspec.json.encode(ErrorReply(_message(error), _error_type(error)))


def render_flat_error(status: int, error: QuiverError) -> bytes:
    """Write an error as TEI does at its OpenAI route."""
    return msgspec.json.encode(OpenAIErrorReply(_message(error), status, _error_type(error)))


def _error_type(error: QuiverError) -> str:
    return next(_ERROR_TYPES[cls] for cls in type(error).__mro__ if cls in _ERROR_TYPES)


def _message(error: QuiverError) -> str:
    """Name the field, for which this shape has no place of its own."""
    field = (error.param or "").partition("[")[0]
    if field in error.message or isinstance(error, errors.WrongKind):
        return error.message
    return f"`{error.param}`: {error.message}"
