"""Where a model's files lie: the operator's directory, an installed pack, the hub's cache, or the hub.

The only file that knows huggingface_hub, whose import is slow and waits until it is needed. A model's name is a key:
it never becomes a path, unless the operator wrote a path.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from quiver.config import ModelsConfig
from quiver.errors import LoadError
from quiver.models.catalogue import ModelSpec, is_graph, is_hub_id
from quiver.models.files import USUAL_GRAPHS, ModelFiles, external_data, is_lfs_pointer
from quiver.models.spec import dense_folders, read_spec

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Found", "ModelFiles", "Progress", "is_here", "is_local", "resolve"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMEOUT_SECONDS = 10.0
_REFUSALS = (401, 403)

_REQUIRED = ("config.json", "tokenizer.json")
_SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors")
_DESCRIPTIONS = (
    "artifact.metadata",
    "config.json",
    "*/config.json",
    "config_sentence_transformers.json",
    "model.safetensors.index.json",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer*.json",
)


class Progress(Protocol):
    """Is told how far the download of a file has come."""

    def __call__(self, file: str, done_bytes: int, total_bytes: int) -> None:
        """Take note; called from the thread that downloads."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """A model with all that it takes to load it; of a hub's snapshot, `spec.revision` is the commit."""

    spec: ModelSpec
    files: ModelFiles


def is_local(name: str) -> bool:
    """Tell whether the operator named a directory of this machine."""
    return name in {".", ".."} or name.startswith(("/", "./", "../", "~"))


def resolve(
    name: str, spec: ModelSpec | None, config: ModelsConfig, progress: Progress, onnx_file: str | None = None
) -> Found:
    """Find a model's files, in the order above; blocks while they are downloaded. Raises `LoadError`.

    `name` is what the operator asked for, `spec` its entry in the catalogue; without one, the files must say it all.
    `onnx_file` is the graph that the operator wants run as it is: of the repository that `name` is, even where that is
    a copy which the catalogue would pass over.
    """
    if onnx_file and not is_graph(onnx_file):
        raise LoadError(f"{onnx_file!r} is no ONNX file: give its path in the repository, such as {USUAL_GRAPHS[0]}")
    if is_local(name):
        return _found(_operators_directory(name), spec, onnx_file)
    if spec and (revision := config.settings_of(name).revision):  # what is known of the catalogue's own ends here
        spec = replace(spec, revision=revision, pack=None, sha256={}, golden=None)
    source = _Source.of(name, spec, config, onnx_file)
    if given := source.in_data_dir() or source.in_pack():
        source.verify(given)
        return _found(given, spec, onnx_file)
    snapshot = source.in_cache()
    if snapshot:
        source.verify(snapshot)
    else:
        snapshot = source.download(progress)
    found = _found(snapshot, spec, onnx_file)
    return replace(found, spec=replace(found.spec, revision=snapshot.root.name))


def is_here(spec: ModelSpec, config: ModelsConfig) -> bool:
    """Tell whether a model of the catalogue is on this machine already; asks no hub."""
    source = _Source.of(spec.id, spec, config, None)
    return bool(source.in_data_dir() or source.in_pack() or source.in_cache())


def _found(files: ModelFiles, spec: ModelSpec | None, onnx_file: str | None) -> Found:
    """Put files and what is known of them together."""
    spec = spec or read_spec(files.model, files)
    graph = onnx_file or files.own_graph(spec.onnx_file)
    if graph and is_lfs_pointer(path := files.path(graph)):
        raise LoadError(f"{path} is a Git LFS pointer, not the graph itself: run `git lfs pull`, or download it")
    # The golden numbers are those of full precision: a file of the operator's choice may have less.
    golden = None if onnx_file else spec.golden
    return Found(replace(spec, onnx_file=graph, golden=golden), files)


def _operators_directory(name: str) -> ModelFiles:
    try:
        root = Path(name).expanduser().absolute()
    except RuntimeError as error:  # no such user
        raise LoadError(f"{name}: {error}") from error
    if not root.is_dir():
        raise LoadError(f"{name} is not a directory: give the one that holds config.json and model.safetensors")
    return ModelFiles(root, root.resolve().name)


@dataclass(frozen=True, slots=True)
class _Source:
    """Every place where one model may lie."""

    model: str
    repository: str
    revision: str
    pack: str | None
    sha256: Mapping[str, str]
    onnx_file: str | None
    """The graph that must be there, whatever other weights are."""
    dense: tuple[str, ...] | None
    """Folders of the layers behind the pooling; None: the model's modules.json must say it, as all else."""
    config: ModelsConfig

    @classmethod
    def of(cls, name: str, spec: ModelSpec | None, config: ModelsConfig, onnx_file: str | None) -> Self:
        is_copy = spec and onnx_file and is_hub_id(name) and name.lower() not in {spec.id.lower(), spec.weights.lower()}
        repository = spec.weights if spec and not is_copy else name
        if not is_hub_id(repository):
            raise LoadError(
                f"{name!r} is no model: give a name of the catalogue, a hub id (ORG/NAME), "
                "or a directory (starting with / or ./)"
            )
        revision = config.settings_of(name).revision or "main"
        if spec is None:
            return cls(name, repository, revision, None, {}, onnx_file, None, config)
        if is_copy:  # what the catalogue pins is of another repository
            return cls(spec.id, repository, revision, None, {}, onnx_file, spec.dense, config)
        graph = onnx_file or spec.onnx_file
        return cls(spec.id, repository, spec.revision, spec.pack, spec.sha256, graph, spec.dense, config)

    @property
    def endpoint(self) -> str:
        return self.config.hub_endpoint.rstrip("/")

    @property
    def own_directory(self) -> Path:
        """Where the operator may put the model's files for good."""
        return self.config.data_dir.expanduser() / "models" / self.repository

    @property
    def cache(self) -> Path | None:
        return self.config.hub_cache.expanduser() if self.config.hub_cache else None

    @property
    def api(self) -> "HfApi":
        from huggingface_hub import HfApi  # noqa: PLC0415 - slow import

        return HfApi(endpoint=self.endpoint, token=self.config.hub_token.reveal() or None, library_name="quiver")

    def in_data_dir(self) -> ModelFiles | None:
        return ModelFiles(self.own_directory, self.model) if self.own_directory.is_dir() else None

    def in_pack(self) -> ModelFiles | None:
        """Look for the package without importing it: it is a carrier of files, and its code is none of ours."""
        package, _, folder = (self.pack or "").partition("/")
        found = importlib.util.find_spec(package) if package else None
        for location in (found.submodule_search_locations or ()) if found else ():
            files = ModelFiles(Path(location) / folder, self.model)
            if self._is_complete(files, self.onnx_file):
                return files
        return None

    def in_cache(self) -> ModelFiles | None:
        """Take the cached snapshot if it is whole; no network."""
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - slow import

        def cached(name: str) -> Any:
            return try_to_load_from_cache(self.repository, name, self.cache, self.revision)

        config = cached("config.json")
        if not isinstance(config, str):
            return None
        # Another program may have fetched the weights alone. Without modules.json, or the hub's word that there is
        # none, the pooling of a model that is not in the catalogue would be a guess.
        if self.dense is None and cached("modules.json") is None:
            return None
        files = ModelFiles(Path(config).parent, self.model)
        graph = self.onnx_file
        # A graph that another program fetched is no sign that the hub has no safetensors: only the hub's word is.
        if graph is None and (self.config.hub_offline or cached("model.safetensors") is not None):
            graph = files.own_graph()
        return files if self._is_complete(files, graph) else None

    def _is_complete(self, files: ModelFiles, graph: str | None) -> bool:
        weights = (graph,) if graph else files.weight_names()
        return bool(weights) and all(files.has(name) for name in (*_REQUIRED, *self._layers(files), *weights))

    def _layers(self, files: ModelFiles) -> Sequence[str]:
        """Name the weights of the layers behind the pooling."""
        folders = dense_folders(files) if self.dense is None else self.dense
        return [f"{folder}/model.safetensors" for folder in folders]

    def download(self, progress: Progress) -> ModelFiles:
        """Fetch the files that are not in the cache yet into it, each by an atomic rename, the weights last."""
        if self.config.hub_offline:
            raise LoadError(
                f"{self.model} is not (wholly) on this machine and hub_offline is set: "
                f"unset it, or put the files into {self.own_directory}"
            )
        with self._errors_translated():
            names = self._list()
            weights = self._weights(names)
            root = self._fetch("config.json", self.revision, progress).parent
            commit = root.name  # the branch may move on: all other files are of the commit that this one came from
            for name in ("modules.json", "model.safetensors"):
                if name not in names:
                    self._note_absence(name, commit, progress)
            for name in (name for name in names if _matches(name, _DESCRIPTIONS)):
                self._verify_new(self._fetch(name, commit, progress), self.sha256.get(name))
            files = ModelFiles(root, self.model)
            layers = self._layers(files)
            self._require(layers, names)
            for name in (*layers, *weights):
                self._verify_new(self._fetch(name, commit, progress), self.sha256.get(name))
        return files

    def verify(self, files: ModelFiles) -> None:
        """Hash the files whose hash is known: pinned in the catalogue, or a blob of the hub's cache."""
        graph = files.own_graph(self.onnx_file)
        weights = files.graph_names(graph) if graph else files.weight_names()
        for name in sorted({*self.sha256, *weights, *_REQUIRED}):
            if files.has(name) and (mismatch := _mismatch(files.path(name), self.sha256.get(name))):
                raise LoadError(
                    f"{self.model} is corrupt: {mismatch}. Delete that file and start again to fetch a good one"
                )

    def _verify_new(self, path: Path, pinned: str | None) -> None:
        mismatch = _mismatch(path, pinned)
        if not mismatch:
            return
        (path.parent / path.readlink() if path.is_symlink() else path).unlink()  # or the cache would offer it again
        path.unlink(missing_ok=True)
        raise LoadError(
            f"{self.endpoint} sent wrong bytes of {self.repository}: {mismatch}. The file is deleted: start again, "
            "and if that does not help, look for a proxy or mirror that changes files"
        )

    def _list(self) -> Sequence[str]:
        info = self.api.model_info(self.repository, revision=self.revision, timeout=_TIMEOUT_SECONDS)
        return [file.rfilename for file in info.siblings or ()]

    def _weights(self, names: Sequence[str]) -> Sequence[str]:
        """Choose the weights: whoever finds the last of them finds everything. Raises `LoadError` for what cannot run."""
        self._require(_REQUIRED, names)
        if self.onnx_file and self.onnx_file not in names:
            others = ", ".join(name for name in names if name.endswith(".onnx")) or "none at all"
            raise LoadError(f"{self._place} has no {self.onnx_file}: its ONNX files are {others}")
        safetensors = [name for name in names if _matches(name, _SAFETENSORS)]
        if safetensors and not self.onnx_file:
            return safetensors
        graph = self.onnx_file or next((graph for graph in USUAL_GRAPHS if graph in names), None)
        if graph is None:
            raise LoadError(
                f"{self._place} has no safetensors weights and no {' or '.join(USUAL_GRAPHS)}: {self._convert_it}"
            )
        return (*external_data(graph, names), graph)

    def _require(self, wanted: Sequence[str], names: Sequence[str]) -> None:
        if missing := [name for name in wanted if name not in names]:
            raise LoadError(f"{self._place} has no {' and no '.join(missing)}: {self._convert_it}")

    @property
    def _place(self) -> str:
        return f"{self.repository} on {self.endpoint}"

    @property
    def _convert_it(self) -> str:
        return f"convert it, and put the files into {self.own_directory} (pickles are never read)"

    def _fetch(self, name: str, revision: str, progress: Progress) -> Path:
        bar = _bar(name, progress)
        return Path(
            self.api.hf_hub_download(self.repository, name, revision=revision, cache_dir=self.cache, tqdm_class=bar)
        )

    def _note_absence(self, name: str, commit: str, progress: Progress) -> None:
        """Let the hub say that there is no such file: the cache remembers it."""
        from huggingface_hub.errors import RemoteEntryNotFoundError  # noqa: PLC0415 - slow import

        with suppress(RemoteEntryNotFoundError):
            self._fetch(name, commit, progress)

    @contextmanager
    def _errors_translated(self) -> Iterator[None]:
        try:
            yield
        except (LoadError, AttributeError, TypeError):  # told already, or a bug
            raise
        except Exception as error:  # HTTP, OS and Xet errors have no nearer ancestor in common
            raise LoadError(f"cannot download {self.repository}: {self._explain(error)}") from error

    def _explain(self, error: Exception) -> str:  # noqa: PLR0911 - one for each case
        from huggingface_hub import errors  # noqa: PLC0415 - slow import

        match error:
            case errors.GatedRepoError():
                return (
                    f"it is gated: accept its terms at {self.endpoint}/{self.repository} and set hub_token (HF_TOKEN)"
                )
            case errors.RepositoryNotFoundError():
                return (
                    f"{self.endpoint} has no such model, or it is private: check the name, or set hub_token (HF_TOKEN)"
                )
            case errors.RevisionNotFoundError():
                return f"it has no revision {self.revision} on {self.endpoint}"
            case errors.OfflineModeIsEnabled():
                return f"HF_HUB_OFFLINE is set: unset it, or put the files into {self.own_directory}"
            case errors.HfHubHTTPError():
                status = error.response.status_code
                advice = "check hub_token (HF_TOKEN) and its rights" if status in _REFUSALS else "try again later"
                return f"{self.endpoint} answered {status} ({error.response.reason_phrase}): {advice}"
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno:
            return f"the cache cannot be written ({reason}): check hub_cache (HF_HUB_CACHE) and the disk"
        return (
            f"{self.endpoint} cannot be reached or broke off ({reason}): check the network and hub_endpoint (HF_ENDPOINT), "
            f"or put the files into {self.own_directory}"
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _mismatch(path: Path, pinned: str | None) -> str | None:
    """Return how a file's hash differs from the one that it must have, if so."""
    # The hub's cache links to blobs, and names that of a large file by its SHA-256 as the hub states it. One link only is
    # followed: a blob may itself be a link, to a store that is named by hashes of another kind.
    blob = path.readlink().name if path.is_symlink() else ""
    wanted = pinned or (blob if _SHA256.fullmatch(blob) else None)
    if wanted is None:
        return None
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == wanted else f"{path} has SHA-256 {found}, but {wanted} is wanted"


def _bar(file: str, progress: Progress) -> Any:
    """Make the class that huggingface_hub takes for a tqdm bar of one file: as much of tqdm as it calls."""

    class Bar:
        def __init__(self, *_: Any, total: float | None = None, initial: float = 0, **__: Any) -> None:
            self.total, self.n = total, 0.0
            self.update(initial)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            progress(file, int(self.n), int(self.total or self.n))

        def update_transfer(self, n: float | None = 1) -> None:
            """Ignore bytes on the wire: those on disk are counted."""

        def set_postfix_str(self, *_: Any, **__: Any) -> None:
            """Show no speed."""

        set_transfer_postfix_str = set_postfix_str

        def close(self) -> None:
            """Hold nothing open."""

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

    return Bar
