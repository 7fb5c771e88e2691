"""A server's machine beside a hub of models: what is found there is what the server would load."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import huggingface_hub
import pytest

from hub_server import Hub, Repository, tiny
from quiver.config import ModelsConfig, Secret
from quiver.models.catalogue import ModelSpec
from quiver.models.hub import Found, resolve

NAME = "acme/tiny"
MEMBER, STRANGER = "hf_member", "hf_stranger"


@dataclass
class Machine:
    """A hub and a server's machine: `find` is what the server does when it starts."""

    hub: Hub
    config: ModelsConfig
    steps: list[tuple[str, int, int]] = field(default_factory=list)
    """What was told of the download's progress."""

    def find(
        self, name: str = NAME, spec: ModelSpec | None = None, onnx_file: str | None = None, **changes: object
    ) -> Found:
        """Resolve a model."""
        config = replace(self.config, **changes)
        return resolve(name, spec, config, lambda *step: self.steps.append(step), onnx_file)

    @property
    def repository(self) -> Repository:
        """The model on the hub."""
        return self.hub.repositories[NAME]

    def publish(self, files: dict[str, bytes], name: str = NAME) -> None:
        """Put a model on the hub."""
        self.hub.repositories[name] = Repository(files)

    def steps_of(self, file: str) -> list[tuple[int, int]]:
        """Return what was told of one file: bytes so far, and in all."""
        return [(done, total) for name, done, total in self.steps if name == file]

    @property
    def snapshot(self) -> Path:
        """The model's directory in the cache."""
        return next(self.config.hub_cache.glob("models--acme--tiny/snapshots/*"))


@contextmanager
def beside_a_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Make a machine without proxies, beside a hub that has one model."""
    monkeypatch.setenv("NO_PROXY", "*")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    huggingface_hub.close_session()
    with Hub({NAME: Repository(tiny())}) as hub:
        config = ModelsConfig(
            data_dir=folder / "data", hub_cache=folder / "cache", hub_endpoint=hub.url, hub_token=Secret(STRANGER)
        )
        yield Machine(hub, config)
    huggingface_hub.close_session()


def spec(**facts: object) -> ModelSpec:
    """Describe the model as a catalogue would."""
    return ModelSpec(**{"id": NAME, "weights": NAME, "pooling": "mean", "dimensions": 64, "max_tokens": 32} | facts)
