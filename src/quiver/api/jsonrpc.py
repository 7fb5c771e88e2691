"""JSON-RPC 2.0 over HTTP, whatever the methods are: requests out of a body, answers into one.

https://www.jsonrpc.org/specification

A call that could be read is answered with 200, errors of its methods included. What is wrong with the HTTP request itself
(no key, too large, too late) has its usual status, and an error without an id as its body.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from quiver import errors
from quiver.api.call import Call, Reply, decode_json
from quiver.errors import InvalidInput, InvalidJson, QuiverError, Unavailable
from quiver.service import Service
from quiver.types import Caller

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603

CODES: Mapping[type[QuiverError], int] = {
    errors.QuiverError: INTERNAL_ERROR,
    errors.InvalidInput: INVALID_PARAMS,
    errors.InvalidJson: PARSE_ERROR,
    errors.Refused: -32000,
    errors.UnknownModel: -32001,
    errors.TooLong: -32002,
    errors.TooManyInputs: -32003,
    errors.WrongKind: -32004,
    errors.Unauthorized: -32010,
    errors.Forbidden: -32011,
    errors.Unavailable: -32020,
    errors.NotReady: -32021,
    errors.Overloaded: -32022,
    errors.RateLimited: -32023,
    errors.InsufficientQuota: -32024,
    errors.DeadlineExceeded: -32025,
    errors.EngineError: -32030,
}
"""The nearest ancestor counts; `data.code` of an error has our own word, which tells more."""

MESSAGES: Mapping[int, str] = {
    PARSE_ERROR: "Parse error",
    INVALID_REQUEST: "Invalid Request",
    METHOD_NOT_FOUND: "Method not found",
    INVALID_PARAMS: "Invalid params",
    INTERNAL_ERROR: "Internal error",
}
"""The specification's own."""

NO_ID = b"null"
Run = Callable[[Service, Caller, Any], Awaitable[bytes]]
"""(service, caller, params) -> the result as JSON."""


@dataclass(frozen=True, slots=True)
class Method:
    """What may be called: by name or by position, in the order of the fields of `params`."""

    name: str
    summary: str
    params: type[msgspec.Struct]
    result: Any
    """The type of its result, for the description."""
    run: Run
    errors: tuple[type[QuiverError], ...] = ()
    """What it can fail with beside what every method can, for the description."""


Methods = Mapping[str, Method]


class _Invalid(Exception):
    """An entry that cannot be done; it never leaves this file."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class _Request:
    """One entry of a body, its parts still as bytes."""

    method: str
    params: bytes
    id: bytes | None
    """None makes it a notification: it is never answered."""


async def answer(methods: Methods, service: Service, call: Call) -> Reply:
    """Do what a body asks for and write the answers; where there is nothing to answer, 204 and nothing."""
    try:
        body = bytes(decode_json(call, msgspec.Raw)).strip()
        body.decode()  # an id is echoed as it came: it must not make the answer another thing than JSON
        entries = msgspec.json.decode(body, type=list[msgspec.Raw]) if body.startswith(b"[") else None
    except (InvalidJson, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Reply(200, _failure(PARSE_ERROR))
    if entries is None:
        written = await _answer_one(methods, service, call.caller, body)
    elif not 0 < len(entries) <= service.limits().client_batch_size:
        written = _failure(INVALID_REQUEST)
    else:
        written = await _answer_all(methods, service, call.caller, [bytes(entry) for entry in entries])
    return Reply(204, b"") if written is None else Reply(200, written)


async def _answer_all(methods: Methods, service: Service, caller: Caller, entries: list[bytes]) -> bytes | None:
    """Answer a batch in its order; its entries are done at once."""
    tasks = [
        asyncio.ensure_future(_answer_one(methods, service, _numbered(caller, i), entry))
        for i, entry in enumerate(entries)
    ]
    try:
        answers = [each for each in await asyncio.gather(*tasks) if each is not None]
    finally:
        for task in tasks:
            task.cancel()  # does nothing to one that is done
    return b"[%b]" % b",".join(answers) if answers else None


def _numbered(caller: Caller, number: int) -> Caller:
    """Let each entry of a batch that is repeated be its own request: it counts once, whatever becomes of the others."""
    request = caller.request
    return replace(caller, request=replace(request, id=f"{request.id}.{number}")) if request else caller


async def _answer_one(methods: Methods, service: Service, caller: Caller, entry: bytes) -> bytes | None:
    try:
        request = _read(entry)
    except _Invalid as invalid:
        return _failure(invalid.code, _id_of(entry) or NO_ID)
    try:
        method = _method(methods, request.method)
        result = await method.run(service, caller, _params(method, request.params))
        written = b'{"jsonrpc":"2.0","result":%b,"id":%b}' % (result, request.id or NO_ID)
    except _Invalid as invalid:
        written = _failure(invalid.code, request.id or NO_ID)
    except QuiverError as error:
        written = _told(error, request.id or NO_ID)
    return None if request.id is None else written


def _members(entry: bytes) -> Mapping[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(entry, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def _read(entry: bytes) -> _Request:
    """Read one entry. Raises `_Invalid`."""
    members = _members(entry)
    params = bytes(members.get("params", b"[]")).strip()
    is_read = (
        _text(members.get("jsonrpc")) == "2.0"
        and _text(members.get("method")) is not None
        and params[:1] in (b"[", b"{")
        and ("id" not in members or _id_of(entry) is not None)
    )
    if not is_read:
        raise _Invalid(INVALID_REQUEST)
    return _Request(_text(members["method"]) or "", params, _id_of(entry))


def _text(raw: msgspec.Raw | None) -> str | None:
    """Decode a string; None for anything else."""
    try:
        return None if raw is None else msgspec.json.decode(raw, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _id_of(entry: bytes) -> bytes | None:
    """Return an entry's id as it was written: a string, a number or null; None if it has none, or another thing."""
    raw = bytes(_members(entry).get("id", b"")).strip()
    return None if raw[:1] in (b"", b"[", b"{", b"t", b"f") else raw


def _method(methods: Methods, name: str) -> Method:
    if name not in methods:
        raise _Invalid(METHOD_NOT_FOUND)
    return methods[name]


def _params(method: Method, raw: bytes) -> Any:
    """Decode parameters, by name or by position. Raises `InvalidInput` with the parameter and what is wrong."""
    names = method.params.__struct_fields__
    try:
        if raw.startswith(b"["):
            values = msgspec.json.decode(raw, type=list[msgspec.Raw])
            if len(values) > len(names):
                raise InvalidInput(
                    f"{len(values)} parameters are too many: {method.name} takes {', '.join(names) or 'none'}"
                )
            raw = msgspec.json.encode(dict(zip(names, values, strict=False)))
        return msgspec.json.decode(raw, type=method.params)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        raise InvalidInput(text, param=path.rstrip("`").lstrip(".") or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"the parameters cannot be read: {error}") from error


def code_of(error: QuiverError | type[QuiverError]) -> int:
    """Return the number of an error, or of a kind of errors."""
    kind = error if isinstance(error, type) else type(error)
    return next(CODES[cls] for cls in kind.__mro__ if cls in CODES)


def render_error(status: int, error: QuiverError) -> bytes:
    """Write what is wrong with the HTTP request itself: nobody knows for which id."""
    del status
    return _told(error, NO_ID)


def _told(error: QuiverError, request_id: bytes) -> bytes:
    """Write an error of a method: our own word for it, the parameter, and when to come back are its data."""
    data: dict[str, Any] = {"code": error.code}
    if error.param:
        data["param"] = error.param
    if isinstance(error, Unavailable):
        data["retry_after_ms"] = round(error.retry_after_seconds * 1000)
    return _failure(code_of(error), request_id, error.message, data)


def _failure(
    code: int, request_id: bytes = NO_ID, message: str | None = None, data: Mapping[str, Any] | None = None
) -> bytes:
    error: dict[str, Any] = {"code": code, "message": message or MESSAGES[code]}
    if data:
        error["data"] = data
    return b'{"jsonrpc":"2.0","error":%b,"id":%b}' % (msgspec.json.encode(error), request_id)
