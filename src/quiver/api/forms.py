"""Forms with a file in them (RFC 7578), read as they come: no more than a part of the file is ever in memory."""

from collections.abc import AsyncIterator

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from quiver.api.call import Call
from quiver.errors import BodyTooLarge, InvalidInput, WrongMediaType

PART_BYTES = 1 << 20
"""How much of a file is handed on at a time."""
MAX_FIELDS = 32
MAX_FIELD_BYTES = 64 << 10
MAX_HEADER_BYTES = 8 << 10


class Form:
    """A form that has one file in a field of a name; the other fields are known once the file has been read."""

    def __init__(self, call: Call, *, file_field: str, max_bytes: int) -> None:
        kind, options = parse_options_header(call.headers.get("content-type", "").encode("latin-1"))
        if kind != b"multipart/form-data" or not options.get(b"boundary") or call.parts is None:
            raise WrongMediaType("the body is no form: send multipart/form-data with the file in a field of its own")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """None: no file has come."""
        self._body = call.parts
        self._file_field = file_field
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._waiting = bytearray()
        """Of the file, not handed on yet."""
        self._name: str | None = None
        """Of the field that is being read."""
        self._value = bytearray()
        self._header, self._header_value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._is_whole = False
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._on_part_begin,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_end": self._on_end,
            },
        )

    async def file(self) -> AsyncIterator[bytes]:
        """Yield the file in parts. Raises `InvalidInput` where the form is broken or ends early, or `BodyTooLarge`."""
        try:
            async for data in self._body:
                self._parser.write(data)
                while len(self._waiting) >= PART_BYTES:
                    yield bytes(self._waiting[:PART_BYTES])
                    del self._waiting[:PART_BYTES]
        except MultipartParseError as error:
            raise InvalidInput(f"the form is broken: {error}") from error
        if not self._is_whole:
            raise InvalidInput("the form ends before its last boundary: send it again, whole")
        if self.filename is None:
            raise InvalidInput(
                f"the form has no file: send it as the field {self._file_field!r}", param=self._file_field
            )
        if self._waiting:
            yield bytes(self._waiting)

    # What the parser finds

    def _on_part_begin(self) -> None:
        self._headers, self._name = {}, None

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_header()

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header) + len(self._header_value) > MAX_HEADER_BYTES:
            raise InvalidInput("a header in the form is too long")

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._header_value
        self._header = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._value = bytearray()
        if len(self.fields) >= MAX_FIELDS:
            raise InvalidInput("the form has too many fields")
        if self._name == self._file_field:
            if self.filename is not None:
                raise InvalidInput("the form has more than one file", param=self._file_field)
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace") or "file"

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name != self._file_field:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise InvalidInput("a field of the form is too long", param=self._name)
            return
        self._num_bytes += end - start
        if self._num_bytes > self._max_bytes:
            raise BodyTooLarge(f"the file is larger than {self._max_bytes} bytes: send it in several")
        self._waiting += data[start:end]

    def _on_part_end(self) -> None:
        if self._name and self._name != self._file_field:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self._is_whole = True
