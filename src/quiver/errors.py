"""Everything that can go wrong, as bare facts: no HTTP status and no wire shape in here.

    QuiverError
    ├── Refused                    the caller can mend it
    │   ├── InvalidInput           a field has a wrong type or value
    │   │   ├── InvalidJson        the body is not JSON at all
    │   │   ├── TooManyInputs
    │   │   ├── TooLong            more tokens than the model reads
    │   │   └── WrongKind          the model is for something else
    │   ├── UnknownModel
    │   ├── UnknownJob
    │   ├── UnknownFile
    │   ├── UnknownRoute
    │   ├── WrongMethod
    │   ├── UnknownAccount         no user, tier or key of that name
    │   ├── Unauthorized
    │   ├── Forbidden              the key is good, but not for this
    │   ├── KeyReused              an idempotency key came back with another request
    │   ├── BodyTooLarge
    │   ├── HeadersTooLarge
    │   ├── TooSlow                the client did not send its request in time
    │   ├── InvalidHttp            not even HTTP
    │   └── WrongMediaType
    ├── Unavailable                the caller may try again
    │   ├── NotReady               models are still loading
    │   ├── LoadFailed             a model that is loaded on first use could not be
    │   ├── Overloaded             admission said no
    │   ├── RateLimited            this caller asks too often
    │   ├── InsufficientQuota      this caller's month is used up
    │   ├── StillRunning           the same request is being answered already
    │   ├── DatabaseDown           the database does not answer
    │   │   └── StorageFull        there is no room on its disk
    │   ├── AuthUnavailable        whether a key is good cannot be found out now
    │   ├── DeadlineExceeded       the answer would come too late
    │   ├── OutOfMemory            not even this input alone fits now
    │   └── Closed                 the server is stopping
    ├── EngineError                the server's own fault
    │   ├── InferenceFailed        this input breaks the model
    │   │   └── NotFinite          the model made NaN or infinity of it
    │   ├── LaneDied               a lane's thread ended; who waited for its batch is told
    │   └── Stalled                a thread does not come back; everyone waiting is told, and the process ends
    └── SetupError                 the operator can mend it; the server does not start
        ├── ConfigError
        ├── MissingExtra
        ├── DatabaseError          the database is out of reach, or of a newer version
        └── LoadError              a model's file is missing, corrupt, or not understood

`code` is a stable word for programs, the text is for people.
The table from type to HTTP status is in `api/call.py`; the wire shape is each dialect's own.
"""


def _revived(kind: type["QuiverError"], args: tuple[object, ...]) -> "QuiverError":
    """Make an error of what came from another process: its own constructor may want more than its text."""
    return kind.__new__(kind, *args)


class QuiverError(Exception):
    """Any fact that stops a request or the server."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """Which field of the request it is about, as a path (`input[3]`)."""

    def __reduce__(self) -> tuple[object, ...]:
        return _revived, (type(self), self.args), self.__dict__


class Refused(QuiverError):
    """The request cannot be answered as it stands; sending it again changes nothing."""

    code = "invalid_request"


class InvalidInput(Refused):
    """A field has a wrong type or value."""

    code = "invalid_value"


class InvalidJson(InvalidInput):
    """The body is not JSON."""

    code = "invalid_json"


class TooManyInputs(InvalidInput):
    """More inputs than one request may bring."""

    code = "too_many_inputs"


class TooLong(InvalidInput):
    """An input has more tokens than the model reads."""

    code = "context_length_exceeded"


class WrongKind(InvalidInput):
    """The model is for something else."""


class UnknownModel(Refused):
    """No loaded model answers to this name."""

    code = "model_not_found"


class UnknownJob(Refused):
    """No job has this id, or none any more."""

    code = "job_not_found"


class UnknownFile(Refused):
    """No file has this id, or none any more."""

    code = "file_not_found"


class UnknownRoute(Refused):
    """Nothing lives at this path."""

    code = "not_found"


class WrongMethod(Refused):
    """The path exists, but not for this method."""

    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allowed = allowed


class Unauthorized(Refused):
    """The key is missing or wrong."""

    code = "invalid_api_key"


class UnknownAccount(Refused):
    """There is no user, tier or key of that name."""

    code = "account_not_found"


class Forbidden(Refused):
    """The key is good, but not for this."""

    code = "insufficient_permissions"


class KeyReused(Refused):
    """An idempotency key came back with another request."""

    code = "idempotency_key_reused"


class BodyTooLarge(Refused):
    """The body has more bytes than the server takes."""

    code = "body_too_large"


class HeadersTooLarge(Refused):
    """The head of the request has more bytes, or more headers, than the server takes."""

    code = "headers_too_large"


class TooSlow(Refused):
    """The client did not send its request in time."""

    code = "request_timeout"


class InvalidHttp(Refused):
    """What came is not HTTP."""

    code = "invalid_http"


class WrongMediaType(Refused):
    """The body is not of a type that this path reads."""

    code = "unsupported_media_type"


class Unavailable(QuiverError):
    """The request is fine, the moment is not."""

    code = "unavailable"
    retry_after_seconds: float = 1.0
    model: str | None = None
    """Whose queue it is about, where that is known."""


class NotReady(Unavailable):
    """The model is still loading."""

    code = "not_ready"


class LoadFailed(Unavailable):
    """A model that is loaded on first use could not be loaded; another attempt is made later."""

    code = "model_load_failed"
    retry_after_seconds = 30.0


class Overloaded(Unavailable):
    """More is waiting than can be answered in time."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_seconds: float, model: str | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.model = model


class RateLimited(Unavailable):
    """This caller asks more often than it may."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class InsufficientQuota(Unavailable):
    """What this caller may have in a month is used up."""

    code = "insufficient_quota"

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class StillRunning(Unavailable):
    """A request with the same idempotency key is being answered already."""

    code = "idempotency_key_in_use"


class DatabaseDown(Unavailable):
    """The database does not answer, or not in time."""

    code = "database_unavailable"


class StorageFull(DatabaseDown):
    """There is no room on the disk of the database."""

    code = "storage_full"
    retry_after_seconds = 30.0


class AuthUnavailable(Unavailable):
    """Whether a key is good cannot be found out now: it is not refused for that."""

    code = "auth_unavailable"


class DeadlineExceeded(Unavailable):
    """The time for this request has run out."""

    code = "deadline_exceeded"


class OutOfMemory(Unavailable):
    """There is not enough memory for this input now, not even alone."""

    code = "out_of_memory"
    retry_after_seconds = 5.0


class Closed(Unavailable):
    """The server is stopping."""

    code = "stopping"


class EngineError(QuiverError):
    """The engine failed; the request was fine."""

    code = "engine_failure"


class InferenceFailed(EngineError):
    """The model cannot compute this input."""

    code = "inference_error"


class NotFinite(InferenceFailed):
    """The model made NaN or infinity of this input."""

    code = "non_finite_output"


class LaneDied(EngineError):
    """A lane's thread ended."""


class Stalled(EngineError):
    """A thread does not come back from its work; the process ends, and whoever runs it starts it anew."""

    code = "engine_stalled"


class SetupError(QuiverError):
    """The server cannot start like this; the text says what to do."""

    code = "setup_error"


class ConfigError(SetupError):
    """A setting is unknown or has a wrong value."""


class MissingExtra(SetupError):
    """An optional package is used but not installed."""

    def __init__(self, extra: str, used_for: str) -> None:
        super().__init__(f"{used_for} needs an optional package: pip install 'quiver[{extra}]'")


class DatabaseError(SetupError):
    """The database cannot be used: names it, without its password, and says why."""


class LoadError(SetupError):
    """A model cannot be loaded: names the file and says why."""
