"""The values of a bulk run: a line, why one is bad, what is wanted of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quiver.errors import Refused, SetupError
from quiver.types import EmbedRequest, Floats, Priority

Id = str | int
MAX_INT = 2**63


class Line(NamedTuple):
    """One text, and where it stands."""

    file: str
    number: int
    """From 1; of Parquet, the row."""
    text: str
    id: Id | None = None


class Bad(NamedTuple):
    """A line that has no text to embed, or none that the model takes."""

    file: str
    number: int
    why: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.why}"


class BadLine(Refused):
    """A line is bad, and bad lines were not to be left out."""


class OutputFailed(SetupError):
    """The output cannot be written: names the file and says why."""


class Fault(Exception):
    """Why a line is bad; whoever knows its place makes it a `Bad`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Where in a line its text stands, and what a text may be."""

    text: str = "text"
    id: str | None = None
    allow_empty: bool = False

    def line(self, file: str, number: int, text: object, line_id: object = None) -> Line | Bad:
        """Make a line of what was read, or say why there is none."""
        if not isinstance(text, str):
            return Bad(file, number, f"{self.text!r} is {_kind(text)}, not a text")
        if not self.allow_empty and (not text or text.isspace()):
            return Bad(file, number, "the text is empty; --allow-empty embeds such texts")
        if not (text.isascii() or _is_unicode(text)) or (isinstance(line_id, str) and not _is_unicode(line_id)):
            return Bad(file, number, "not UTF-8")
        if self.id is None:
            return Line(file, number, text)
        if isinstance(line_id, str) or (type(line_id) is int and -MAX_INT <= line_id < MAX_INT):
            return Line(file, number, text, line_id)
        return Bad(file, number, f"{self.id!r} is {_kind(line_id)}, not a text or a whole number of 64 bits")


def _is_unicode(text: str) -> bool:
    """Whether it has no byte that was no UTF-8 (those are read as lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    """Name a value as JSON does."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a text"}
    return names.get(type(value), f"a {type(value).__name__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is wanted of each text's vector; None leaves it to the model."""

    dimensions: int | None = None
    prompt_name: str | None = None
    normalize: bool | None = None

    def request(self, texts: Sequence[str], priority: Priority = Priority.INTERACTIVE) -> EmbedRequest:
        """Ask for it."""
        return EmbedRequest(
            inputs=texts,
            dimensions=self.dimensions,
            prompt_name=self.prompt_name,
            normalize=self.normalize,
            priority=priority,
        )


class Vectors(NamedTuple):
    """What an embedder gives for texts."""

    rows: Floats  # (B, D)
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Lines that go to the output, and their vectors."""

    lines: Sequence[Line]
    vectors: Floats  # (B, D)
