"""The models that are known by name: catalogue.toml, read and checked."""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Self

import msgspec

from quiver.config import Dtype
from quiver.errors import ConfigError
from quiver.types import Kind, Pooling

CATALOGUE = Path(__file__).parent / "catalogue.toml"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?(?<!\.git)", re.ASCII)
_MAX_HUB_ID = 96
_BARE_NAME = re.compile(r"(?!.*\.\.)\w(?:[\w.-]*\w)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """What the true weights give for a text, to tell a damaged or exchanged model when it is loaded."""

    text: str
    first: tuple[float, ...]
    """The first numbers of its vector (or its logits, for a pair `query␞document`)."""
    tolerance: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What the server must know of a model beside its files."""

    id: str
    weights: str
    """The hub's repository that holds the files: another than `id` where that one has only ONNX copies."""
    revision: str = "main"
    """A commit of that repository, or a branch that is followed when the model is first fetched."""
    aliases: tuple[str, ...] = ()
    description: str = ""
    kind: Kind = "embed"
    pooling: Pooling = "cls"
    normalize: bool = True
    """Vectors have unit length."""
    dense: tuple[str, ...] = ()
    """Folders of the layers that follow the pooling (sentence-transformers' Dense), in order."""
    dimensions: int
    """Numbers in a vector; of a cross-encoder or classifier, its labels."""
    max_tokens: int
    """Most tokens of an input, special tokens included."""
    matryoshka: tuple[int, ...] = ()
    """Dimensions that the model was trained to be cut to."""
    layer_norm_before_cut: bool = False
    """A vector is standardised before it is cut, as nomic-embed-text-v1.5 was trained."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Prefix of an input, by task."""
    labels: tuple[str, ...] = ()
    """What a classifier's logits stand for."""
    multi_label: bool = False
    """Each of a classifier's labels is an answer by itself: any number of them may hold."""
    pair_template: tuple[str, str, str] | None = None
    """How a language model is asked about a pair: before it, the pair itself with {query} and {document}, after it."""
    yes_no: tuple[int, int] | None = None
    """Ids of the tokens whose logits are the answer to that question."""
    query_tokens: int = 0
    """A multi-vector model's query is filled with [MASK] to so many tokens."""
    licence: str = ""
    gated: bool = False
    """The hub asks for a token and the acceptance of terms."""
    dtype: Dtype | None = None
    """Arithmetic of this entry, whatever is configured: for names that promise one."""
    onnx_file: str | None = None
    """The repository's own graph, to run instead of a compiled one: where it has no safetensors, or when asked for."""
    pack: str | None = None
    """An installed package that carries the files, and the folder in it: `package/folder`."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Hash that a file must have, by its name."""
    golden: Golden | None = None


class Catalogue:
    """Specs by id or alias, in any case of letters."""

    def __init__(self, specs: Iterable[ModelSpec]) -> None:
        self._specs = tuple(specs)
        self._by_name: dict[str, ModelSpec] = {}
        for spec in self._specs:
            for name in (spec.id, *spec.aliases):
                self._add(name, spec)

    @classmethod
    def load(cls, path: Path = CATALOGUE) -> Self:
        """Read a catalogue.toml; raises `ConfigError`."""
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
        try:
            return cls(_spec(model_id, table) for model_id, table in tables.items())
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}") from error

    def find(self, name: str) -> ModelSpec | None:
        """Return the model that an id or alias names."""
        return self._by_name.get(name.lower())

    def __iter__(self) -> Iterator[ModelSpec]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _add(self, name: str, spec: ModelSpec) -> None:
        known = self._by_name.setdefault(name.lower(), spec)
        if known is not spec:
            raise ConfigError(f"{name!r} names both {known.id} and {spec.id}")


def is_hub_id(name: str) -> bool:
    """Tell whether the hub could have a repository of this name, ORG/NAME; such a name can lead nowhere as a path."""
    return len(name) <= _MAX_HUB_ID and bool(_HUB_ID.fullmatch(name))


def is_graph(name: str) -> bool:
    """Tell whether a name is that of an ONNX file inside a repository."""
    path = PurePosixPath(name)
    return path.suffix == ".onnx" and not path.is_absolute() and ".." not in path.parts


def _spec(model_id: str, table: Any) -> ModelSpec:
    if not isinstance(table, dict):
        raise ConfigError(f"{model_id!r} should be a table: [{model_id!r}]")
    known = [f.name for f in fields(ModelSpec)[1:]]
    for key in table:
        if key not in known:
            raise ConfigError(f"{model_id} has an unknown key {key!r} (known are: {', '.join(known)})")
    try:
        spec = msgspec.convert({"id": model_id, "weights": model_id, **table}, ModelSpec)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{model_id}: {error}") from error
    for complaint in _complaints(spec):
        raise ConfigError(f"{model_id}: {complaint}")
    return spec


def _complaints(spec: ModelSpec) -> Iterator[str]:
    if not (is_hub_id(spec.id) or _BARE_NAME.fullmatch(spec.id)) or not is_hub_id(spec.weights):
        yield "id and weights must have the form ORG/NAME (an id may be a name alone where weights are given)"
    if spec.dimensions < 1 or spec.max_tokens < 1:
        yield "dimensions and max_tokens must be positive"
    if not all(0 < size <= spec.dimensions for size in spec.matryoshka):
        yield f"matryoshka sizes must be 1 to {spec.dimensions}"
    if spec.onnx_file and not is_graph(spec.onnx_file):
        yield "onnx_file must be the path of an .onnx file in the repository"
    if spec.pair_template and not all(part in spec.pair_template[1] for part in ("{query}", "{document}")):
        yield "pair_template must have {query} and {document} in its middle"
    if (spec.pair_template is None) != (spec.yes_no is None):
        yield "pair_template and yes_no go together"
    if not all(_SHA256.fullmatch(value) for value in spec.sha256.values()):
        yield "a sha256 must be 64 lower-case hexadecimal digits"
