"""A request and its reply without a transport, and what a dialect is made of: routes, and the shape of its errors."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec

from quiver import errors
from quiver.capacity import Load, Places
from quiver.errors import InvalidInput, InvalidJson, QuiverError, Unavailable, WrongMediaType, WrongMethod
from quiver.service import Service
from quiver.types import Caller, Embeddings, Timings

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
LOCAL = Caller("local")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One request; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    query: Mapping[str, str] = field(default_factory=dict)
    """What stands behind the path's `?`; of a name that comes twice, the last."""
    peer: str = "local"
    """Address of the other side; without keys, callers take turns by it."""
    params: Mapping[str, str] = field(default_factory=dict)
    """What the route's `{name}`s matched."""
    caller: Caller = LOCAL
    places: Places | None = None
    """Those that it has one of; None where there is no bound."""
    parts: AsyncIterator[bytes] | None = None
    """The body as it comes, where the route takes it so; `body` is empty then."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a reply counts as whose results were all known before."""

    model: str
    inputs: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One response; its body is complete, unless parts follow."""

    status: int
    body: bytes
    media_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    timings: Timings | None = None
    """Where its time went; sent as `server-timing`."""
    parts: AsyncIterator[bytes] | None = None
    """What follows the body, part by part; its headers say how long both are."""
    known: Known | None = None
    """What it is made of, where each result was known before: the same request may get the same reply again."""
    timed: str = ""
    """The field at the end of its body that tells the milliseconds that it took, if there is one."""


Handler = Callable[[Service, Call], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Route:
    """A method and a path template (`{id:path}` takes slashes too), and the handler behind them."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: Any = None
    """The struct of the request's body, for OpenAPI."""
    reply: Any = None
    """The struct of the reply's body, for OpenAPI."""
    media_type: str = JSON
    """Of the reply; what is not JSON is described as text."""
    error: Any = None
    """The struct of its own errors, for OpenAPI, where they are not the dialect's."""
    public: bool = False
    """Needs no key."""
    is_queued: bool = False
    """Its work waits in a queue of its own, or it waits for such work: it has no deadline, and no long line keeps it
    out."""
    is_upload: bool = False
    """Reads its body as it comes, however large: the transport hands it over in parts."""
    may_be_empty: bool = False
    """Has nothing to say to some calls, and answers them 204."""
    is_repeatable: bool = False
    """The same request may get the same reply again: there is nothing of the moment in it."""
    at_root: bool = True
    """Stands at its own path too, and not under the dialect's prefix alone."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """One API: its routes, and how it says that something went wrong."""

    name: str
    routes: Sequence[Route]
    """At the paths that the API has by nature."""
    render_error: Callable[[int, QuiverError], bytes]
    statuses: Mapping[type[QuiverError], int] = field(default_factory=dict)
    """Where this API's statuses differ from `STATUSES`."""
    error: Any = None
    """The struct of an error's body, for OpenAPI."""
    has_prefix: bool = True
    """Its routes stand under `/NAME` too, where no other API is."""
    refusal_headers: Callable[[QuiverError, Load], Mapping[str, str]] | None = None
    """What this API's refusals say of the load, where they do."""


STATUSES: dict[type[QuiverError], int] = {
    errors.Refused: 400,
    errors.UnknownModel: 404,
    errors.UnknownJob: 404,
    errors.UnknownFile: 404,
    errors.UnknownRoute: 404,
    errors.WrongMethod: 405,
    errors.UnknownAccount: 404,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.TooSlow: 408,
    errors.KeyReused: 422,
    errors.BodyTooLarge: 413,
    errors.HeadersTooLarge: 431,
    errors.WrongMediaType: 415,
    errors.Overloaded: 429,
    errors.RateLimited: 429,
    errors.InsufficientQuota: 429,
    errors.StillRunning: 409,
    errors.DeadlineExceeded: 504,
    errors.Unavailable: 503,
    errors.LaneDied: 503,
    errors.Stalled: 503,
    errors.EngineError: 500,
}
"""The nearest ancestor counts; anything else is 500."""


def status_of(error: QuiverError, own: Mapping[type[QuiverError], int] | None = None) -> int:
    """Return the HTTP status of a domain error, by a dialect's own table first."""
    statuses = {**STATUSES, **(own or {})}
    return next((statuses[cls] for cls in type(error).__mro__ if cls in statuses), 500)


def known_of(embeddings: Embeddings) -> Known | None:
    """Say what a reply counts as that is made of these, where all of them were known before."""
    inputs = len(embeddings.vectors)
    is_known = len(embeddings.usage.cached) == inputs
    return Known(embeddings.model, inputs, embeddings.usage.num_tokens) if is_known else None


def decode_json(call: Call, kind: type[T], *, any_media_type: bool = False) -> T:
    """Decode and validate a JSON body; raises `InvalidInput` with the path of the field, or `WrongMediaType`.

    `any_media_type` is for APIs whose own servers do not look at the content type.
    """
    media_type = call.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if media_type != JSON and not media_type.endswith("+json") and not any_media_type:
        raise WrongMediaType(f"the body is {media_type or 'of no type'}: send JSON with 'Content-Type: {JSON}'")
    if not call.body:
        raise InvalidJson("the body is empty: send a JSON object")
    try:
        return msgspec.json.decode(call.body, type=kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        raise InvalidInput(text, param=path.rstrip("`").lstrip(".") or None) from error
    except UnicodeDecodeError as error:
        raise InvalidJson(f"the body is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise InvalidJson("the body is nested too deeply") from error
    except msgspec.DecodeError as error:
        raise InvalidJson(f"the body is not JSON: {error}") from error


PATIENCE: Mapping[str, float] = {
    "x-request-timeout": 1.0,
    "x-stainless-read-timeout": 1.0,
    "x-envoy-expected-rq-timeout-ms": 0.001,
}
"""Headers in which clients say how long they wait, in what part of a second: ours, that of the SDKs which Stainless
makes, and that of a proxy."""


def patience(headers: Mapping[str, str], longest: float) -> float:
    """Return how many seconds the client of a call waits at most; nobody reads an answer that comes later."""
    for name, unit in PATIENCE.items():
        if name in headers:
            with suppress(ValueError):
                if (seconds := float(headers[name]) * unit) > 0:
                    return min(seconds, longest)
    return longest


def explain(error: QuiverError) -> str:
    """Say what is wrong and in which field, for shapes that have no place of its own for the field."""
    field = (error.param or "").partition("[")[0]
    return error.message if field in error.message else f"`{error.param}`: {error.message}"


def load_headers(dialect: Dialect, error: QuiverError, load: Load | None) -> dict[str, str]:
    """Say how full the server is, where an API's refusals do; true at this moment only."""
    return dict(dialect.refusal_headers(error, load)) if dialect.refusal_headers and load else {}


def refuse(dialect: Dialect, error: QuiverError, load: Load | None = None) -> Reply:
    """Write an error in a dialect's shape, with the headers that tell a client when to come back.

    Headers of the API's own are there where the `load` is known.
    """
    status, headers = status_of(error, dialect.statuses), load_headers(dialect, error, load)
    headers["x-error-code"] = error.code  # few APIs have a place for it in the body
    if isinstance(error, Unavailable):
        headers["retry-after"] = str(max(1, round(error.retry_after_seconds + 0.5)))
        headers["retry-after-ms"] = str(round(error.retry_after_seconds * 1000))
    if isinstance(error, WrongMethod):
        headers["allow"] = ", ".join(error.allowed)
    if status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return Reply(status, dialect.render_error(status, error), headers=headers)
