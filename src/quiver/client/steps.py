"""What a call is made of, without any input or output: a plan yields steps, and whoever runs it sends back what came.

The blocking client and the asynchronous one run the same plans; neither knows what a plan is about.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, TypeAlias, TypeVar

JSON = "application/json"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """One request; its path is relative to the server's URL."""

    method: str
    path: str
    body: bytes = b""
    content_type: str = JSON
    accepts: tuple[int, ...] = (HTTPStatus.OK,)
    """Statuses that are an answer; any other is an error."""
    is_repeatable: bool = True
    """May be sent again if it is unknown whether it arrived: nothing is made twice by it."""


@dataclass(frozen=True, slots=True)
class Response:
    """One response, whole; header names are in lower case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def retry_after_seconds(self) -> float | None:
        """Return how long the server asks to wait; None if it does not, or not in a way that can be read."""
        try:
            if "retry-after-ms" in self.headers:
                return max(0.0, float(self.headers["retry-after-ms"]) / 1000)
            return _seconds(self.headers["retry-after"])
        except (KeyError, ValueError):
            return None


def _seconds(told: str) -> float:
    """Read seconds, or a date. Raises `ValueError`."""
    try:
        return max(0.0, float(told))
    except ValueError:
        date = parsedate_to_datetime(told)
        return max(0.0, (date.astimezone(UTC) - datetime.now(UTC)).total_seconds())


@dataclass(frozen=True, slots=True)
class Fault:
    """Why there is no response."""

    reason: str
    is_late: bool = False
    """The time was over."""
    is_unsent: bool = False
    """The server has certainly not seen the request."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request; what comes back is a `Response` or a `Fault`."""

    request: Request
    headers: Mapping[str, str]
    seconds: float
    """The time until its whole response must be there."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait; nothing comes back."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Together:
    """Run plans at once, as many as the client may; their results come back in order.

    If one fails, its error is raised, and the others are given up. None of them may hold a `Together` of its own.
    """

    plans: Sequence["Plan[Any]"]


Step = Send | Pause | Together
Plan: TypeAlias = Generator[Step, Any, T]
