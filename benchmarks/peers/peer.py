"""What a peer is: values alone, so that its file can be read in its own environment as well as in ours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Embed = Callable[[Sequence[str]], Any]
"""Texts to their vectors (N, D), an array of NumPy; what `load` of a peer's file returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to serve the model: a server, or a library called in its own process.

    In commands, {python} is the environment's interpreter and {bin} its folder, {port} a free port, {binary} what the operator gave, and
    {model}, {onnx}, {ct2} and {reranker} are the directories of `places`.
    """

    name: str
    title: str
    about: str
    """How it is set up, in a sentence for the page."""
    command: tuple[str, ...]
    environment: str = ""
    """Which .venv-peers-NAME it runs in; none: Quiver's own."""
    packages: tuple[str, ...] = ()
    """Whose versions are reported."""
    variables: Mapping[str, str] = field(default_factory=dict)
    is_server: bool = True
    prefix: str = "/v1"
    """What its routes begin with."""
    ready: str = "/health"
    """Path that answers 200 once it can embed."""
    model: str = "all-MiniLM-L6-v2"
    """Name of the model in requests."""
    base64: bool = False
    """Whether it can send vectors in base64."""
    prepare: tuple[str, ...] = ()
    """Command that is run once it is ready."""
    rerank: tuple[str, ...] = ()
    """Command that serves the reranker; none: it has none."""
    rerank_path: str = "/rerank"
    rerank_key: str = "documents"
    """What requests to it call the texts."""
    binary: str = ""
    """Option that gives the path of its program; it is left out where that is not given."""
    baseline: str = "quiver"
    """Whom its ratios are to."""


WORKER = ("{python}", "-m", "peers.inside.worker")
SERVE = ("{python}", "-m", "peers.inside.serve", "--port", "{port}")


def in_process(module: str, folder: str, variant: str = "") -> tuple[str, ...]:
    """Return the command that calls a peer's `load` in a process of its own."""
    return (*WORKER, module, folder, *((variant,) if variant else ()))


def minimal_server(module: str, folder: str, variant: str = "") -> tuple[str, ...]:
    """Return the command that puts the smallest server before a peer's `load`."""
    return (*SERVE, module, folder, *((variant,) if variant else ()))
