"""What an ingress and a model say to each other: values that travel whole, their arrays without a copy."""

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from quiver.capacity import Queue
from quiver.errors import QuiverError
from quiver.types import Caller, ModelRequest, ModelStatus

Verb = Literal["embed", "embed_tokens", "embed_sparse", "classify", "rerank", "compare", "tokenize", "decode", "ping"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to one model. Its deadline is a time that is left: two machines' clocks have nothing in common."""

    verb: Verb
    request: ModelRequest
    caller: Caller
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says to a request, and how busy it is: so nobody need ask for that."""

    found: Any
    """The result, or the error in its place: raised, it would be wrapped and logged as a fault of the cluster's."""
    queue: Queue


@dataclass(frozen=True, slots=True)
class Described:
    """A model that is ready, and how busy it is."""

    status: ModelStatus
    queue: Queue


@dataclass(frozen=True, slots=True)
class LoadStats:
    """How busy one replica of a model is."""

    waiting_tokens: float
    """Those that no lane has taken yet."""
    busy: float
    """Part of the time since it was last asked that its work takes at the speed measured so far."""
    tokens_per_second: float
    """What it can do."""


def asked(verb: Verb, request: ModelRequest, caller: Caller) -> Asked:
    """Make a request ready to travel: what only the ingress needs, such as its tab, stays behind."""
    key = replace(caller.key, hash="") if caller.key else None
    # A model's deployment serves one model: by which of its names it was called matters no more.
    return Asked(verb, replace(request, model=None), replace(caller, key=key, tab=None), caller.seconds_left())


def arrived(asked: Asked) -> Caller:
    """Return the caller of a request that has come, with its deadline by this machine's clock."""
    return replace(asked.caller, deadline=time.monotonic() + asked.seconds_left)


def unwrapped(answer: Answer) -> Any:
    """Return what was found. Raises the error that stands in its place."""
    if isinstance(answer.found, QuiverError):
        raise answer.found
    return answer.found
