"""A hub of models on this machine, with a model for it: the endpoints that a download uses, and faults on demand."""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import numpy as np
from safetensors.numpy import save

API = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)/revision/(?P<revision>[^/?]+)")
FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
PATIENCE_SECONDS = 20.0

TENSORS = {"words": np.arange(4096, dtype=np.float32).reshape(64, 64)}


def tiny(value: int = 0, **more: bytes) -> dict[str, bytes]:
    """Make the files of a model, among others that nobody needs."""
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    return {
        "README.md": b"# Tiny",
        "config.json": json.dumps({"model_type": "bert", "hidden_size": 64, "max_position_embeddings": 32}).encode(),
        "tokenizer.json": b"{}",
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": b'{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}',
        "model.safetensors": save({name: array + np.float32(value) for name, array in TENSORS.items()}),
        "onnx/model.onnx": b"unread",
        "pytorch_model.bin": b"unread",
        **more,
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Lay files out in a directory."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


class Fault(Enum):
    """What goes wrong when a file is asked for."""

    CORRUPT = auto()
    """As many bytes, but others."""
    SHORT = auto()
    """Half of the bytes, with a length that matches them."""
    CUT = auto()
    """Half of the bytes, then the connection breaks; only once."""
    HELD = auto()
    """Half of the bytes, and the rest when the hub's `gate` is opened."""


@dataclass
class Repository:
    """The files of one commit."""

    files: Mapping[str, bytes]
    token: str | None = None
    """Gated: files are for those who bring it."""
    faults: dict[str, Fault] = field(default_factory=dict)
    parent: "Repository | None" = None
    """The commit before, which can still be asked for by its hash."""

    @property
    def commit(self) -> str:
        """A hash of all that the commit holds."""
        names = sorted(self.files)
        return hashlib.sha1(b"".join(n.encode() + self.files[n] for n in names), usedforsecurity=False).hexdigest()

    def at(self, revision: str) -> "Repository | None":
        """Return the commit that a revision names."""
        if revision in {"main", self.commit}:
            return self
        older = self.parent
        while older and older.commit != revision:
            older = older.parent
        return older

    def etag(self, name: str) -> str:
        """Name a file's content as the hub does: large files by SHA-256, others by git's hash."""
        content = self.files[name]
        if is_large(name):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def is_large(name: str) -> bool:
    """Tell whether a hub keeps a file outside of git."""
    return name.endswith(".safetensors") or ".onnx" in name


class Hub:
    """A server on 127.0.0.1 while the context is open; it stops answering afterwards."""

    def __init__(self, repositories: Mapping[str, Repository], *, prefix: str = "") -> None:
        self.repositories = dict(repositories)
        self.prefix = prefix
        """What stands before all of its paths, as behind a proxy of a company."""
        self.failing: int | None = None
        """The status that it answers to everything."""
        self.storage: str | None = None
        """Where it sends those who ask for large files; None: it has them itself."""
        self.gate = threading.Event()
        """Lets the second half of held files pass."""
        self.requests: list[str] = []
        """Method and path of each request, in order."""
        self.headers: list[Mapping[str, str]] = []
        """What each request brought, by names in lower case."""
        self._asked = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}{self.prefix}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.close()

    def close(self) -> None:
        """Leave the network."""
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def note(self, request: str, headers: Mapping[str, str]) -> None:
        """Remember a request."""
        with self._asked:
            self.requests.append(request)
            self.headers.append(headers)
            self._asked.notify_all()

    def wait_for(self, method: str, name: str, times: int = 1) -> None:
        """Wait until a file was asked for so many times."""

        def asked() -> bool:
            return sum(r.startswith(method) and r.endswith(name) for r in self.requests) >= times

        with self._asked:
            assert self._asked.wait_for(asked, PATIENCE_SECONDS), f"nobody asked for {name}: {self.requests}"

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for, in order."""
        return [
            FILE.search(request)["name"]
            for request in self.requests
            if request.startswith("GET /") and FILE.search(request)
        ]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        return Handler


class _Handler(BaseHTTPRequestHandler):
    """One request for one connection: nothing is kept alive, so that a closed hub is gone at once."""

    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def _answer(self) -> None:
        self.hub.note(f"{self.command} {self.path}", {key.lower(): value for key, value in self.headers.items()})
        if self.hub.failing:
            self._fail(self.hub.failing)
            return
        path = self.path.removeprefix(self.hub.prefix)
        asked = API.match(path) or FILE.match(path)
        head = self.hub.repositories.get(asked["repository"]) if asked else None
        repository = head.at(asked["revision"]) if asked and head else None
        if asked is None or head is None:
            self._fail(404, "RepoNotFound")
        elif repository is None:
            self._fail(404, "RevisionNotFound")
        elif asked.re is API:
            self._describe(asked["repository"], repository)
        elif repository.token and self.headers["Authorization"] != f"Bearer {repository.token}":
            self._fail(403 if "Authorization" in self.headers else 401, "GatedRepo")
        elif asked["name"] not in repository.files:
            self._fail(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
        else:
            self._send_file(repository, asked["name"])

    def _fail(self, status: int, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        self._send(status, {"X-Error-Code": code, **(headers or {}), "Content-Length": "0"}, b"")

    def _describe(self, name: str, repository: Repository) -> None:
        siblings = [{"rfilename": file} for file in repository.files]
        body = json.dumps({"id": name, "sha": repository.commit, "siblings": siblings}).encode()
        self._send(200, {"Content-Type": "application/json", "Content-Length": str(len(body))}, body)

    def _send_file(self, repository: Repository, name: str) -> None:
        content, etag = repository.files[name], f'"{repository.etag(name)}"'
        headers = {"X-Repo-Commit": repository.commit, "ETag": etag, "Accept-Ranges": "bytes"}
        if is_large(name):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        if is_large(name) and self.hub.storage:
            self._send(302, headers | {"Location": self.hub.storage + self.path, "Content-Length": "0"}, b"")
            return
        if self.command == "HEAD":
            self._send(200, headers | {"Content-Length": str(len(content))}, b"")
            return
        held = repository.faults.get(name) is Fault.HELD
        body, length = self._spoil(repository, name, content)
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{length - 1}/{length}"
            self._send(206, headers | {"Content-Length": str(length - first)}, body[first:])
        else:
            self._send(200, headers | {"Content-Length": str(length)}, body[: length // 2] if held else body)
        if held:
            self._wait_with(body[length // 2 :])

    def _spoil(self, repository: Repository, name: str, content: bytes) -> tuple[bytes, int]:
        """Return the bytes to send and the length to promise."""
        match repository.faults.get(name):
            case Fault.CORRUPT:
                return content[:-1] + bytes([content[-1] ^ 1]), len(content)
            case Fault.SHORT:
                return content[: len(content) // 2], len(content) // 2
            case Fault.CUT:
                del repository.faults[name]
                return content[: len(content) // 2], len(content)
        return content, len(content)

    def _wait_with(self, rest: bytes) -> None:
        self.wfile.flush()
        self.hub.gate.wait(PATIENCE_SECONDS)
        with suppress(OSError):  # whoever asked may be gone
            self.wfile.write(rest)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
