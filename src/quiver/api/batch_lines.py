"""The lines of a batch's file, one call each: read as they come, and checked all before the first is done."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import Raw

from quiver.job import Fault, NewLine, UnreadableLines

MAX_LINE_BYTES = 16 << 20
MAX_FAULTS = 100
"""Most faults that are told of one file."""
LINES_AT_ONCE, BYTES_AT_ONCE = 1000, 4 << 20
"""How much is handed on at a time."""
MAX_ID = 512
_BOM = b"\xef\xbb\xbf"


class Request(msgspec.Struct):
    """One line of the file."""

    custom_id: str
    method: str
    url: str
    body: Raw


class Named(msgspec.Struct):
    """What a body says of its model."""

    model: str | None = None


@dataclass(slots=True)
class Reader:
    """Reads one file."""

    endpoint: str
    max_lines: int
    model: str | None = None
    """What the first line that can be read names."""
    faults: list[Fault] = field(default_factory=list)
    num_lines: int = 0
    _seen: set[bytes] = field(default_factory=set)

    async def lines(self, parts: AsyncIterator[bytes]) -> AsyncIterator[Sequence[NewLine]]:
        """Yield lines, some at a time. Raises `UnreadableLines` at the end, or once there are very many faults."""
        group: list[NewLine] = []
        size = number = 0
        async for raw in _split(parts):
            number += 1
            if (line := self._read(raw, number)) is None:
                continue
            group.append(line)
            size += len(raw)
            if len(group) >= LINES_AT_ONCE or size >= BYTES_AT_ONCE:
                yield group
                group, size = [], 0
        if not self.num_lines:
            self.faults.append(Fault("empty_file", "the file has no lines: write one request a line"))
        if self.faults:
            raise UnreadableLines(self.faults)
        yield group

    def _read(self, raw: bytes, number: int) -> NewLine | None:
        """Read a line; None is an empty one, or one that nobody will do because of the file's faults."""
        if not raw.strip():
            return None
        self.num_lines += 1
        if len(self.faults) >= MAX_FAULTS:
            raise UnreadableLines(self.faults)
        if self.num_lines > self.max_lines:
            message = f"the file has more than {self.max_lines} lines: split it into several batches"
            self.faults += [Fault("too_many_requests", message, number)]
            raise UnreadableLines(self.faults)
        try:
            request = msgspec.json.decode(raw, type=Request)
            named = msgspec.json.decode(request.body, type=Named)
        except msgspec.ValidationError as error:
            text, _, path = str(error).partition(" - at `$")
            self._note("invalid_request", text, number, path.rstrip("`").lstrip(".") or None)
            return None
        except UnicodeDecodeError as error:
            self._note("invalid_json_line", f"the line is not UTF-8 (byte {error.start})", number)
            return None
        except (msgspec.DecodeError, RecursionError) as error:
            self._note("invalid_json_line", f"the line is not JSON: {error}", number)
            return None
        self._check(request, named, number)
        return None if self.faults else NewLine(self.num_lines, request.custom_id, bytes(request.body))

    def _check(self, request: Request, named: Named, number: int) -> None:
        if not 0 < len(request.custom_id) <= MAX_ID:
            self._note("invalid_custom_id", f"custom_id has 1 to {MAX_ID} characters", number, "custom_id")
        digest = hashlib.blake2b(request.custom_id.encode("utf-8", "replace"), digest_size=16).digest()
        if digest in self._seen:
            message = f"the custom_id {request.custom_id[:64]!r} was there before: each line has its own"
            self._note("duplicate_custom_id", message, number, "custom_id")
        self._seen.add(digest)
        if request.method != "POST":
            self._note("invalid_method", f"the method is {request.method[:16]!r}: it is POST", number, "method")
        if request.url != self.endpoint:
            message = f"the url is {request.url[:64]!r}, but the batch is for {self.endpoint}"
            self._note("mismatched_url", message, number, "url")
        if len(self._seen) == 1:
            self.model = named.model
        if named.model != self.model:
            message = (
                f"the model is {str(named.model)[:64]!r}, but the one before names {self.model!r}: one in each batch"
            )
            self._note("mismatched_model", message, number, "body.model")

    def _note(self, code: str, message: str, line: int, param: str | None = None) -> None:
        self.faults.append(Fault(code, message, line, param))


async def _split(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Cut a file into its lines. Raises `UnreadableLines` for one that is far too long."""
    rest, number = b"", 0
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            number += 1
            yield line.removeprefix(_BOM) if number == 1 else line
        if len(rest) > MAX_LINE_BYTES:
            message = f"the line is longer than {MAX_LINE_BYTES} bytes: is this a JSONL file?"
            raise UnreadableLines([Fault("invalid_json_line", message, number + 1)])
    if rest:
        yield rest.removeprefix(_BOM) if number == 0 else rest
