"""What the peers serve: one model in every format that someone needs, each made once, and a reranker of a few kilobytes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from safetensors.numpy import load_file, save_file

import checkpoints
from peers.child import PeerFailed, last_line
from peers.exact import Reference
from peers.inside import padding
from peers.peer import Peer
from quiver import config
from quiver.models.catalogue import Catalogue
from quiver.models.hub import resolve

ROOT = Path(__file__).resolve().parents[2]
EXPORTERS = {"onnx": "infinity", "ct2": "torch"}
"""Formats, and the environments that have their tools."""
TOLERANCE = 1e-5
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "TMPDIR")
SILENCE = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
INSTALL_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Places:
    """Where everything is, and how to fill it into a peer's command."""

    model: Path
    cache: Path
    binaries: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_default_model(cls, cache: Path, binaries: Mapping[str, str]) -> "Places":
        """Find the default model as Quiver itself does."""
        name = config.DEFAULT_MODEL
        found = resolve(name, Catalogue.load().find(name), config.load(env={}, flags={}).models, lambda *_: None)
        return cls(found.files.root, cache.resolve(), binaries)

    def python(self, peer: Peer) -> str:
        """Return the interpreter of a peer's environment."""
        return str(ROOT / f".venv-peers-{peer.environment}/bin/python") if peer.environment else sys.executable

    def filled(self, peer: Peer, words: tuple[str, ...], port: int) -> list[str]:
        """Return a command with everything in its place."""
        return [word.format(**self._names(peer, port)) for word in words]

    def variables(self, peer: Peer, port: int) -> dict[str, str]:
        """Return the whole environment of a peer's process: nothing of ours that could mislead it."""
        ours = [] if peer.environment else [str(Path(path).absolute()) for path in sys.path if path]
        paths = [str(ROOT / "benchmarks"), *ours]
        own = {name: value.format(**self._names(peer, port)) for name, value in peer.variables.items()}
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        homes = {"HF_HOME": str(self.cache / "hub"), "QUIVER_DATA_DIR": str(self.cache / "quiver")}
        return {**kept, **SILENCE, **homes, "PYTHONPATH": os.pathsep.join(paths), **own}

    def _names(self, peer: Peer, port: int) -> dict[str, str]:
        folders = {name: str(self.cache / name) for name in ("onnx", "ct2", "reranker")}
        binary = self.binaries.get(peer.binary, "")
        return {
            "python": self.python(peer), "bin": str(Path(self.python(peer)).parent), "port": str(port),
            "model": str(self.model), "binary": binary,
            "cache": str(self.cache), **folders,
        }  # fmt: skip

    def provide(self, peer: Peer, reference: Reference) -> None:
        """Make what a peer needs and is not there yet; raises `PeerFailed`."""
        install(peer.environment)
        for name, environment in EXPORTERS.items():
            if any(f"{{{name}}}" in word for word in peer.command):
                self._export(name, environment, reference)
        if peer.rerank and not (self.cache / "reranker").exists():
            make_reranker(self.cache / "reranker")
        if peer.binary == "ollama":
            self.cache.mkdir(parents=True, exist_ok=True)
            (self.cache / "Modelfile").write_text(f"FROM {self.model}\n", encoding="utf-8")

    def _export(self, name: str, environment: str, reference: Reference) -> None:
        folder, part = self.cache / name, self.cache / f"{name}.part"
        if folder.exists():
            return
        install(environment)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        tool = Peer(name=name, title="", about="", command=(), environment=environment)
        command = [self.python(tool), "-m", "peers.inside.export", name, str(self.model), str(part)]
        run(command, f"the {name} files could not be made", variables=self.variables(tool, 0))
        if name == "onnx":
            verify_onnx(part, reference)
        part.rename(folder)


def install(environment: str) -> None:
    """Make an environment, as `make` knows how; raises `PeerFailed`."""
    if environment:
        command = ["make", "-s", "-C", str(ROOT), f".venv-peers-{environment}/.ready"]
        run(command, f"its environment {environment!r} could not be installed")


def run(command: list[str], complaint: str, *, variables: Mapping[str, str] | None = None) -> None:
    """Run a command to its end; raises `PeerFailed` with the last of what it said."""
    try:
        done = subprocess.run(  # noqa: S603  our own commands
            command, capture_output=True, text=True, env=variables, timeout=INSTALL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerFailed(f"{complaint}: {error}") from error
    if done.returncode:
        raise PeerFailed(f"{complaint}: {last_line(done.stderr or done.stdout)}")


def verify_onnx(folder: Path, reference: Reference) -> None:
    """Hold the exported graph against the float64 reference; raises `PeerFailed`."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = padding.padded_tokenizer(folder / "tokenizer.json")
    given = padding.inputs_of(tokenizer, reference.texts)
    vectors = padding.mean_of(session.run(None, given)[0], given["attention_mask"])  # (N, D)
    if (error := float(np.abs(vectors - reference.vectors).max())) > TOLERANCE:
        raise PeerFailed(f"the exported ONNX file is {error:.2g} away from the reference, more than {TOLERANCE}")


def make_reranker(folder: Path) -> None:
    """Write a tiny cross-encoder with random weights: what is measured with it is all but the model."""
    checkpoints.make(folder, "bert", pooling=None, prefix="bert.", positions=512)
    hidden = checkpoints.Checkpoint(kind="bert").hidden
    draw = np.random.default_rng(1).standard_normal
    head: dict[str, Any] = {
        "bert.pooler.dense.weight": draw((hidden, hidden)), "bert.pooler.dense.bias": draw(hidden),
        "classifier.weight": draw((1, hidden)), "classifier.bias": draw(1),
    }  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    weights |= {name: array.astype(np.float32) for name, array in head.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    checkpoints.write_json(folder / "config.json", described | {"label2id": {"LABEL_0": 0}})
