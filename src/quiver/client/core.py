"""All that both clients share and that is not I/O: settings, one exchange with its retries, and large inputs in parts."""

import binascii
import contextlib
import functools
import inspect
import itertools
import json
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar, get_args
from urllib.parse import urlsplit

from quiver import __version__
from quiver.client.errors import (
    BadReply,
    ConfigError,
    QuiverError,
    StatusError,
    TimedOut,
    Unreachable,
    error_of,
)
from quiver.client.results import Used
from quiver.client.steps import Fault, Pause, Plan, Request, Response, Send, Together

DEFAULT_URL = "http://localhost:8000"
Verify = ssl.SSLContext | bool
T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where a server is, and how it is called."""

    url: str
    """`http://HOST:PORT`, with a path where the server's routes stand below one."""
    socket: str | None = None
    """Path of a unix socket, instead of host and port."""
    api_key: str = field(default="", repr=False)
    model: str | None = None
    """Asked for where a call names none; None is the server's first."""
    timeout: float = 120.0
    """Seconds that a call may take, with all its requests and pauses."""
    max_retries: int = 4
    max_inputs: int = 256
    """Texts in one request; more are sent in several."""
    max_concurrency: int = 4
    """Requests of one client that are at work at once."""


MAX_PART_BYTES = 1 << 20
"""Of texts in one request; a text that is longer goes alone."""


def settings(url: str | None, api_key: str | None, **others: Any) -> Settings:
    """Complete settings from the environment (QUIVER_URL, QUIVER_API_KEY). Raises `ConfigError`."""
    url = url or os.environ.get("QUIVER_URL") or DEFAULT_URL
    api_key = os.environ.get("QUIVER_API_KEY", "") if api_key is None else api_key
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path and not parts.netloc:
        return _checked(Settings(url="http://localhost", socket=parts.path, api_key=api_key, **others))
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{url!r} is no URL of a server: give http://HOST:PORT or unix:///PATH/rest.sock")
    base = re.sub(r"/v1$", "", url.rstrip("/"))  # other clients want it there; the routes here have it
    return _checked(Settings(url=base, api_key=api_key, **others))


def _checked(made: Settings) -> Settings:
    for name in ("timeout", "max_inputs", "max_concurrency"):
        if not getattr(made, name) > 0:
            raise ConfigError(f"{name} is {getattr(made, name)!r}: it must be more than 0")
    if made.max_retries < 0:
        raise ConfigError(f"max_retries is {made.max_retries!r}: 0 is the least")
    return made


@dataclass(frozen=True, slots=True)
class Retries:
    """When to send a request again."""

    most: int
    first_seconds: float = 0.25
    longest_seconds: float = 8.0

    def pause(self, attempt: int, told_seconds: float | None, chance: float) -> float | None:
        """Return how long to wait after a failed attempt (0 is the first); None means that it was the last.

        What the server asks for is kept, and up to a quarter more: who was refused at once does not come back at once.
        """
        if attempt >= self.most:
            return None
        if told_seconds is not None:
            return told_seconds * (1 + chance / 4)
        longest = min(self.longest_seconds, self.first_seconds * 2.0**attempt)
        return longest * (0.5 + chance / 2)


class Core:
    """One server as a client sees it; makes plans, and does nothing itself."""

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.settings = settings
        self._retries = Retries(settings.max_retries)
        self._clock = clock
        self._chance = chance
        self._used = Used()
        self._lock = threading.Lock()

    @property
    def used(self) -> Used:
        """What was used so far."""
        return self._used

    def count(self, num_tokens: int) -> None:
        """Add one answered request; calls may come from several threads."""
        with self._lock:
            self._used += Used(1, num_tokens)

    def deadline(self, timeout: float | None) -> float:
        """Return when a call that begins now must be over."""
        return self._clock() + (self.settings.timeout if timeout is None else timeout)

    def seconds_left(self, deadline: float) -> float:
        """Return how long a call may still take."""
        return deadline - self._clock()

    def chance(self) -> float:
        """Return a number from 0 to 1, so that many clients do not act as one."""
        return self._chance()

    def exchange(self, request: Request, deadline: float) -> Plan[Response]:
        """Send a request, again where that may help, and return its answer. Raises `QuiverError`."""
        error: QuiverError = TimedOut("the time was over before the request was sent: give it a longer timeout")
        for attempt in itertools.count():
            if (left := self.seconds_left(deadline)) <= 0:
                raise error
            came: Response | Fault = yield Send(request, self._headers(request, left), left)
            if isinstance(came, Response) and came.status in request.accepts:
                return came
            error = error_of(came) if isinstance(came, Response) else _unanswered(came, self.settings)
            pause = self._retries.pause(attempt, _told(error), self._chance()) if _may_help(request, came) else None
            if pause is None or pause >= self.seconds_left(deadline):
                raise error
            yield Pause(pause)
        raise AssertionError("count() has ended. This is a bug.")

    def _headers(self, request: Request, seconds: float) -> dict[str, str]:
        headers = {
            "accept": "application/json",
            "user-agent": f"quiver-python/{__version__}",
            "x-request-timeout": f"{seconds:.3f}",
        }
        if request.body:
            headers["content-type"] = request.content_type
        if self.settings.api_key:
            headers["authorization"] = f"Bearer {self.settings.api_key}"
        return headers

    def parts(self, texts: Sequence[Item], size: Callable[[Item], int]) -> list[slice]:
        """Cut many texts into as many as go into one request each, by their number and their bytes."""
        cuts, start, num_bytes = [], 0, 0
        for i, text in enumerate(texts):
            num_bytes += size(text)
            if i > start and (i - start == self.settings.max_inputs or num_bytes > MAX_PART_BYTES):
                cuts.append(slice(start, i))
                start, num_bytes = i, size(text)
        return [*cuts, slice(start, len(texts))] if texts else []


def _unanswered(fault: Fault, settings: Settings) -> QuiverError:
    if fault.is_late:
        return TimedOut(f"no answer in time: {fault.reason}")
    return Unreachable(f"{settings.socket or settings.url} does not answer: {fault.reason}")


def _told(error: QuiverError) -> float | None:
    return error.retry_after_seconds if isinstance(error, StatusError) else None


def _may_help(request: Request, came: Response | Fault) -> bool:
    """Tell whether sending it again might succeed, and cannot do harm."""
    if isinstance(came, Response):
        return came.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
    return came.is_unsent or (request.is_repeatable and not came.is_late)


def together(plans: Sequence[Plan[T]]) -> Plan[list[T]]:
    """Run plans at once and return their results in order; a single one needs nobody's help."""
    if len(plans) == 1:
        return [(yield from plans[0])]
    results: list[T] = yield Together(plans)
    return results


def post(path: str, **fields: Any) -> Request:
    """Make a request with a JSON body; what is None is left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return Request("POST", path, json.dumps(given, ensure_ascii=False, allow_nan=False).encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"a text holds half of a character (a lone surrogate): {error.reason}") from error


@contextlib.contextmanager
def understanding(response: Response) -> Iterator[None]:
    """Say of whatever goes wrong in reading a reply that the reply was wrong."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError, binascii.Error) as error:
        shown = response.body[:200].decode("utf-8", "replace")
        raise BadReply(
            f"the reply is not a Quiver server's ({type(error).__name__}: {error}): {shown!r}",
            status=response.status,
            request_id=response.headers.get("x-request-id", ""),
        ) from error


def body_of(response: Response) -> Any:
    """Decode a JSON reply. Raises `ValueError`."""
    return json.loads(response.body)


def object_of(response: Response) -> Mapping[str, Any]:
    """Decode a reply that is a JSON object. Raises `TypeError` or `ValueError`."""
    told = body_of(response)
    if not isinstance(told, dict):
        raise TypeError("it is no object")
    return told


def shown_as(method: Callable[..., Any], plan: Callable[..., Any]) -> None:
    """Give a client's method the name, the description and the parameters of the plan that it runs."""
    functools.update_wrapper(method, plan)
    signature = inspect.signature(plan)
    first, *others = signature.parameters.values()
    result = get_args(signature.return_annotation)[2]
    parameters = [first.replace(name="self", annotation=inspect.Parameter.empty), *others]
    method.__signature__ = signature.replace(parameters=parameters, return_annotation=result)  # type: ignore[attr-defined]
