"""What the dashboard looks at and turns, beside the service."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from quiver.admission import Admission
from quiver.api.call import Call, Reply
from quiver.config import Config
from quiver.register import Register
from quiver.service import Service
from quiver.telemetry.observer import Figure


@dataclass(frozen=True, slots=True)
class Office:
    """The parts of one server that are none of its callers' business."""

    config: Config
    register: Register
    admission: Admission
    figures: Sequence[Callable[[], Sequence[Figure]]]
    """What others keep and tell: of the cache, of replies that are given again."""
    work: frozenset[str]
    """Paths of routes that compute: the others would make percentiles look better than they are."""
    started_at: float
    """In Unix seconds."""


Task = Callable[[Office, Service, Call], Awaitable[Reply]]


def written(reply: object, status: int = 200) -> Reply:
    """Write a reply as JSON."""
    return Reply(status, msgspec.json.encode(reply))
