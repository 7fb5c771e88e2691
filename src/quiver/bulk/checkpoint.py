"""What a later run must know to go on: how much of which file is good, and of which lines it came."""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from quiver.bulk.chunks import Place
from quiver.bulk.files import AppendFile, replace_file, sync_file
from quiver.errors import Refused


@dataclass(frozen=True, slots=True)
class Job:
    """All that the bytes of an output depend on, beside the lines."""

    output_form: str
    model: str
    vector: str
    """A digest of the vector of a text that is the same in each run: other weights have another. Of a server, its size."""
    dimensions: int
    prompt_name: str | None
    normalize: bool | None
    truncate: bool
    has_ids: bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A moment at which all that is counted here was on the disk."""

    job: Job
    place: Place = field(default_factory=Place)
    num_rows: int = 0
    num_bad: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file."""
    finished: bool = False
    """All lines are done; only names are left to be changed."""


@dataclass(frozen=True, slots=True)
class Paths:
    """The files of a run, all beside the output."""

    output: Path

    def _beside(self, ending: str) -> Path:
        return self.output.with_name(self.output.name + ending)

    @property
    def part(self) -> Path:
        """What is written so far."""
        return self._beside(".part")

    @property
    def whole(self) -> Path:
        """The output of a format that cannot grow, before it has its name."""
        return self._beside(".whole")

    @property
    def errors(self) -> Path:
        """Bad lines that were left out."""
        return self._beside(".errors.jsonl")

    @property
    def checkpoint(self) -> Path:
        """How far it is."""
        return self._beside(".checkpoint")


def read(paths: Paths) -> Checkpoint | None:
    """Return the checkpoint beside an output, if there is one. Raises `Refused` where it is none of ours."""
    try:
        data = paths.checkpoint.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(data, type=Checkpoint)
    except msgspec.DecodeError as error:
        raise Refused(f"{paths.checkpoint} is no checkpoint of this version: --overwrite starts anew") from error


def write(paths: Paths, checkpoint: Checkpoint) -> None:
    """Put a checkpoint in the place of the one before. Raises `OutputFailed`."""
    replace_file(paths.checkpoint, msgspec.json.encode(checkpoint))


def check(paths: Paths, begun: Job, job: Job) -> None:
    """Raise `Refused` where an output was begun with something else than what is asked for now."""
    for name in Job.__slots__:
        old, new = getattr(begun, name), getattr(job, name)
        if old != new:
            what = "the model gives other vectors now" if name == "vector" else f"{name} was {old!r} and is {new!r}"
            raise Refused(f"{paths.part} was begun differently: {what}; --overwrite starts anew")


def finish(paths: Paths, *, grows: bool) -> None:
    """Give the output its name and remove what is left, once a finished checkpoint is written; again, if need be.

    The output is the part itself where its format grows, else what was made of it.
    """
    ready = paths.part if grows else paths.whole
    if ready.exists():
        ready.replace(paths.output)
        sync_file(paths.output.parent)
    paths.part.unlink(missing_ok=True)
    paths.checkpoint.unlink(missing_ok=True)
    sync_file(paths.output.parent)


def discard(paths: Paths) -> None:
    """Remove what an interrupted run left; the output of one that ended stays until there is another.

    Raises `OutputFailed` where a run is still at it.
    """
    if paths.part.exists():
        AppendFile(paths.part, 0).close()
    for path in (paths.checkpoint, paths.part, paths.whole, paths.errors):
        path.unlink(missing_ok=True)
