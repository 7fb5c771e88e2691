"""Bulk runs around the hash model, in a process that may be killed.

python bulk_process.py run REQUEST      one run; prints its largest memory in bytes and how long it took
python bulk_process.py crash REQUEST    kills runs at every call that changes the disk, and each time has another finish

A request is JSON: files, output and other fields of `Asked`.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conftest import assembled
from fakes import hash_model
from quiver.bulk import BulkOptions, Columns, Wanted, run_bulk
from quiver.bulk.checkpoint import Checkpoint
from quiver.bulk.embedders import Embedder, on_engine
from quiver.bulk.lines import Vectors
from quiver.config import Config
from quiver.types import PackedBatch

CALLS = ("write", "pwrite", "fsync", "replace", "unlink", "ftruncate", "open")
"""Of `os`: all by which a run changes the disk, but for what pyarrow writes."""


@dataclass(frozen=True)
class Asked:
    """What a process is to do."""

    files: list[str]
    output: str
    id_column: str | None = None
    skip_bad: bool = False
    sync_seconds: float = 0.0
    pause_seconds: float = 0.0
    """Between two batches of a lane."""
    dimensions: int = 0
    """Of vectors that cost nothing; 0: those of the hash model."""
    hoards: bool = False
    """Keep all of those vectors."""
    every: int = 1
    """A crash at each so-manieth call."""
    keeps_words: bool = True
    """False is a disk that forgets what it was told to keep."""
    options: dict[str, Any] = field(default_factory=dict)

    def as_options(self, output: str | None = None) -> BulkOptions:
        """Return the options of the run."""
        return BulkOptions(
            files=tuple(map(Path, self.files)),
            output=Path(output or self.output),
            columns=Columns(id=self.id_column),
            skip_bad=self.skip_bad,
            sync_seconds=self.sync_seconds,
            **self.options,
        )


@contextlib.asynccontextmanager
async def hash_embedder(
    wanted: Wanted | None = None, before: Callable[[PackedBatch], None] = lambda _: None
) -> AsyncIterator[Embedder]:
    """Compute with the hash model in this process."""
    async with assembled(hash_model(before=before)) as parts:
        yield on_engine(parts.engine, "test/hash", wanted or Wanted())


@contextlib.asynccontextmanager
async def free_embedder(dimensions: int, hoard: list[Vectors] | None) -> AsyncIterator[Embedder]:
    """Compute nothing: each text gets its length. Keep all in `hoard`, if there is one."""

    async def embed(texts: Sequence[str]) -> Vectors:
        lengths = np.float32([[len(text)] for text in texts])
        vectors = Vectors(np.repeat(lengths, dimensions, axis=1), len(texts))
        if hoard is not None:
            hoard.append(vectors)
        return vectors

    yield Embedder("free", embed, 4, is_exact=True)


async def run(asked: Asked, output: str | None = None) -> Checkpoint:
    """Do one run."""
    if asked.dimensions:
        opening = free_embedder(asked.dimensions, [] if asked.hoards else None)
    else:
        opening = hash_embedder(before=lambda _: time.sleep(asked.pause_seconds))
    return await run_bulk(asked.as_options(output), Config(), opening)


class Disk:
    """Stands before the calls that change the disk: kills its own process at one of them, as if the power went."""

    def __init__(self, fatal: int, *, keeps_words: bool) -> None:
        self._fatal = fatal
        self._keeps_words = keeps_words
        self._numbers = itertools.count()
        self._safe: dict[int, int] = {}
        """Bytes of each file that are safe, by its inode."""

    def stand_before(self) -> None:
        """Have every call go through here."""
        for name in CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **more: Any) -> Any:
            if next(self._numbers) == self._fatal:
                self._die()
            result = call(*arguments, **more)
            if name == "fsync" and self._keeps_words:
                about = os.fstat(arguments[0])
                self._safe[about.st_ino] = about.st_size
            return result

        return watched

    def _die(self) -> None:
        """Lose what is not safe, and end."""
        for path in Path.cwd().iterdir():
            about = path.stat()
            os.truncate(path, min(about.st_size, self._safe.get(about.st_ino, 0)))
        os.kill(os.getpid(), signal.SIGKILL)


def crash(asked: Asked) -> Iterator[bool]:
    """Kill a run at its first call, another at its second, … until one ends; yields for each whether all was right then."""
    os.chdir(Path(asked.output).parent)
    _in_child(lambda: asyncio.run(run(asked, "right" + Path(asked.output).suffix)))
    right = _outputs("right")
    for fatal in itertools.count(0, asked.every):
        status = _in_child(lambda at=fatal: _doomed(asked, at))
        if status:
            _in_child(lambda: asyncio.run(run(asked)))
        yield _outputs("out") == right
        for path in Path.cwd().glob("out*"):
            path.unlink()
        if not status:
            return


def _doomed(asked: Asked, fatal: int) -> None:
    Disk(fatal, keeps_words=asked.keeps_words).stand_before()
    asyncio.run(run(asked))


def _outputs(stem: str) -> dict[str, bytes]:
    return {path.name.removeprefix(stem): path.read_bytes() for path in Path.cwd().glob(f"{stem}*")}


def _in_child(work: Callable[[], Any]) -> int:
    """Do something in a process of its own; returns how it ended."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
    except BaseException as error:  # noqa: BLE001  a child must not go on as if it were its parent
        sys.stderr.write(f"{error!r}\n")
        os._exit(1)
    os._exit(0)


def _peak_bytes() -> int:
    """Return the most that this process ever held; rusage's figure is its parent's, too, where that forked."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def main(mode: str, request: str) -> None:
    """Do what is asked and print what came of it."""
    asked = Asked(**json.loads(request))
    start = time.perf_counter()
    if mode == "crash":
        found: dict[str, Any] = {"right": list(crash(asked))}
    else:
        state = asyncio.run(run(asked))
        found = {"rows": state.num_rows, "bytes": _peak_bytes()}
    sys.stdout.write(json.dumps({**found, "seconds": time.perf_counter() - start}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
