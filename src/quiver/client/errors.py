"""What a call to a server can end with instead of a result.

    QuiverError
    ├── ConfigError          the client cannot be made like this
    ├── MissingExtra         httpx is not installed
    ├── Unreachable          no connection, or it was cut
    ├── TimedOut             no answer in time
    ├── BadReply             what came is not what a Quiver server answers
    ├── BatchFailed          a batch ended without all of its vectors
    └── StatusError          the server said no
        ├── Refused          4xx: sent again as it is, it would be refused again
        │   ├── Unauthorized
        │   ├── Forbidden
        │   └── NotFound     no such model, batch, file or path
        ├── Unavailable      503: not now
        │   └── RateLimited  429: not so much, or not so often
        └── ServerFailed     any other 5xx

Every error has `status`, `code` (a stable word for programs), `message` and `request_id`, as far as they are known.
"""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from quiver.client.steps import Response

SHOWN_CHARACTERS = 200
"""How much of a body that is no JSON is shown."""


class QuiverError(Exception):
    """A call that has no result."""

    def __init__(
        self, message: str, *, status: int | None = None, code: str = "", param: str | None = None, request_id: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        """Of the reply, if there was one."""
        self.code = code
        """A stable word for programs, as docs/errors.md lists them; empty where the server gave none."""
        self.param = param
        """Which field of the request it is about, where that was said."""
        self.request_id = request_id
        """What the server's log knows the request by."""

    def __str__(self) -> str:
        facts = [str(self.status) if self.status else "", self.code, self.request_id]
        known = ", ".join(fact for fact in facts if fact)
        return f"{self.message} ({known})" if known else self.message


class ConfigError(QuiverError):
    """The client cannot be made like this."""


class MissingExtra(QuiverError, ImportError):
    """The client's one dependency is not installed."""


class Unreachable(QuiverError):
    """There is no connection, or it was cut."""


class TimedOut(QuiverError):
    """No answer came in time, or the server saw that none would."""


class BadReply(QuiverError):
    """What came is not what a Quiver server answers."""


class BatchFailed(QuiverError):
    """A batch ended without all of its vectors; `batch` is it as it stands."""

    def __init__(self, message: str, batch: Any) -> None:
        super().__init__(message)
        self.batch = batch


class StatusError(QuiverError):
    """The server said no; `retry_after_seconds` is what it asks to wait, if it does."""

    retry_after_seconds: float | None = None


class Refused(StatusError):
    """The request cannot be answered as it stands."""


class Unauthorized(Refused):
    """The key is missing or wrong."""


class Forbidden(Refused):
    """The key is good, but not for this."""


class NotFound(Refused):
    """There is no such model, batch, file or path."""


class Unavailable(StatusError):
    """The request is fine, the moment is not."""


class RateLimited(Unavailable):
    """More has come, or comes more often, than the server takes."""


class ServerFailed(StatusError):
    """The server failed, or what stands before it."""


KINDS: Mapping[int, type[QuiverError]] = {
    HTTPStatus.UNAUTHORIZED: Unauthorized,
    HTTPStatus.FORBIDDEN: Forbidden,
    HTTPStatus.NOT_FOUND: NotFound,
    HTTPStatus.TOO_MANY_REQUESTS: RateLimited,
    HTTPStatus.SERVICE_UNAVAILABLE: Unavailable,
    HTTPStatus.GATEWAY_TIMEOUT: TimedOut,
}
KINDS_OF_CODES: Mapping[str, type[QuiverError]] = {
    "model_not_found": NotFound,
    "engine_failure": ServerFailed,
    "inference_error": ServerFailed,
    "non_finite_output": ServerFailed,
}
"""Where the APIs that the client speaks have different statuses for one thing."""


def error_of(response: Response) -> QuiverError:
    """Make the error that a response stands for, whichever API's shape it has."""
    status, headers = response.status, response.headers
    message, code, param = _told(response.body)
    code = headers.get("x-error-code") or code
    error = (KINDS_OF_CODES.get(code) or _kind(status))(
        message or f"the server answered {status}",
        status=status,
        code=code,
        param=param,
        request_id=headers.get("x-request-id", ""),
    )
    if isinstance(error, StatusError):
        error.retry_after_seconds = response.retry_after_seconds()
    return error


def _kind(status: int) -> type[QuiverError]:
    if status in KINDS:
        return KINDS[status]
    if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return Refused
    return ServerFailed if status >= HTTPStatus.INTERNAL_SERVER_ERROR else BadReply


def _told(body: bytes) -> tuple[str, str, str | None]:
    """Find sentence, word and field in the body of an error: of OpenAI's shape, or a flat one."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")[:SHOWN_CHARACTERS].strip(), "", None
    if not isinstance(told, dict):
        return str(told)[:SHOWN_CHARACTERS], "", None
    inner = told.get("error")
    if isinstance(inner, dict):
        told = inner
    words = (told.get("message"), inner, told.get("detail"))
    message = next((word for word in words if isinstance(word, str) and word), _details(told.get("detail")))
    code, param = told.get("code"), told.get("param")
    return message, code if isinstance(code, str) else "", param if isinstance(param, str) else None


def _details(detail: Any) -> str:
    """Join the sentences of a list of faults."""
    faults = detail if isinstance(detail, list) else []
    return "; ".join(str(fault["msg"]) for fault in faults if isinstance(fault, dict) and "msg" in fault)
