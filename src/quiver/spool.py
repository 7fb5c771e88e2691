"""Usage on its way to the ledger: on this machine's disk within a moment, whatever becomes of the process or the database.

    add ──> unsaved ──> segment (appended and synced, all that came meanwhile together) ──> apply ──> segment removed

A segment belongs to the process that holds its lock. One that nobody holds was left by a process that died, and is
applied by whoever finds it. An entry may so be applied twice, and whoever applies it counts it once.
"""

import asyncio
import fcntl
import os
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from quiver.accounts import UsageEntry

Apply = Callable[[Sequence[UsageEntry]], Awaitable[None]]
"""Makes entries count; raises where they do not, and is then given them again."""

MAX_BYTES = 64 << 20
APPLY_TOGETHER = 500
_SUFFIX = ".usage"


@dataclass(slots=True, eq=False)
class _Unsaved:
    entry: UsageEntry
    line: bytes
    saved: asyncio.Future[bool]


@dataclass(slots=True, eq=False)
class _Segment:
    """A file that this process has locked."""

    path: Path
    descriptor: int
    num_bytes: int = 0


@dataclass(slots=True)
class SpoolCounts:
    """What became of entries that are not in the ledger as they should be."""

    dropped: int = 0
    """There was no room for them."""
    damaged: int = 0
    """Lines that could not be read: the last one of a process that was killed while it wrote."""
    replayed: int = 0
    """Entries that another process had left."""


@dataclass(slots=True, eq=False)
class Spool:
    """Entries that are not in the ledger yet; used on one event loop."""

    folder: Path
    max_bytes: int = MAX_BYTES
    counts: SpoolCounts = field(default_factory=SpoolCounts)
    _unsaved: deque[_Unsaved] = field(default_factory=deque)
    _open: _Segment | None = None
    _full: deque[_Segment] = field(default_factory=deque)
    _num_bytes: int = 0
    _disk: asyncio.Lock = field(default_factory=asyncio.Lock)
    _draining: asyncio.Lock = field(default_factory=asyncio.Lock)
    _committer: asyncio.Task[None] | None = None

    @property
    def has_room(self) -> bool:
        """Whether another entry can be taken."""
        return self._num_bytes < self.max_bytes

    def add(self, entry: UsageEntry) -> asyncio.Future[bool]:
        """Take an entry; the future tells, within a moment, whether it is on disk."""
        saved: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        line = _written(entry)
        if not self.has_room:
            self.counts.dropped += 1
            saved.set_result(False)
            return saved
        self._num_bytes += len(line)
        self._unsaved.append(_Unsaved(entry, line, saved))
        if self._committer is None or self._committer.done():
            self._committer = asyncio.create_task(self._commit())
        return saved

    async def drain(self, apply: Apply) -> None:
        """Apply all that was added before, and what dead processes left. Raises what `apply` raises."""
        await self._commit()
        async with self._draining:  # and not the disk: what is added meanwhile is saved meanwhile
            async with self._disk:
                if self._open:
                    self._full.append(self._open)
                    self._open = None
                self._full.extend(await asyncio.to_thread(self._orphans))
            while self._full:
                await self._apply_segment(self._full[0], apply)
                await asyncio.to_thread(_remove, self._full.popleft())
            await self._apply_unsaved(apply)

    async def close(self) -> None:
        """Save what is left, and leave it to the next process."""
        await self._commit()
        for segment in (*self._full, *([self._open] if self._open else ())):
            os.close(segment.descriptor)
        self._full.clear()
        self._open = None

    async def _commit(self) -> None:
        """Append all that is unsaved, again while more came meanwhile; what cannot be written stays in memory."""
        async with self._disk:
            while waiting := [one for one in self._unsaved if not one.saved.done()]:
                data = b"".join(one.line for one in self._unsaved)
                is_saved = await asyncio.to_thread(self._append, data, len(self._unsaved))
                for one in waiting:
                    if not one.saved.done():
                        one.saved.set_result(is_saved)

    def _append(self, data: bytes, count: int) -> bool:
        try:
            segment = self._open = self._open or _create(self.folder)
            try:
                _write(segment, data)
            except OSError:
                os.ftruncate(segment.descriptor, segment.num_bytes)
                raise
        except OSError:
            return False
        for _ in range(count):
            self._unsaved.popleft()
        return True

    def _orphans(self) -> list[_Segment]:
        """Lock what nobody holds."""
        mine = {segment.path for segment in (*self._full, *([self._open] if self._open else ()))}
        paths = [path for path in sorted(self.folder.glob(f"*{_SUFFIX}")) if path not in mine]
        return [segment for path in paths if (segment := _lock(path))]

    async def _apply_segment(self, segment: _Segment, apply: Apply) -> None:
        data = await asyncio.to_thread(segment.path.read_bytes)
        entries = list(self._read(data))
        for i in range(0, len(entries), APPLY_TOGETHER):
            await apply(entries[i : i + APPLY_TOGETHER])
        if segment.num_bytes:
            self._num_bytes -= segment.num_bytes
        else:
            self.counts.replayed += len(entries)

    async def _apply_unsaved(self, apply: Apply) -> None:
        """Do without a disk that would not take them."""
        async with self._disk:
            stuck = [one for one in self._unsaved if one.saved.done()]
            for _ in stuck:
                self._unsaved.popleft()
        try:
            while stuck:
                await apply([one.entry for one in stuck[:APPLY_TOGETHER]])
                self._num_bytes -= sum(len(one.line) for one in stuck[:APPLY_TOGETHER])
                del stuck[:APPLY_TOGETHER]
        finally:
            self._unsaved.extendleft(reversed(stuck))

    def _read(self, data: bytes) -> Iterator[UsageEntry]:
        for line in data.splitlines():
            checksum, _, text = line.partition(b" ")
            with suppress(msgspec.MsgspecError):
                if checksum == _checksum(text):
                    yield msgspec.json.decode(text, type=UsageEntry)
                    continue
            self.counts.damaged += 1


def _written(entry: UsageEntry) -> bytes:
    text = msgspec.json.encode(entry)
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


def _create(folder: Path) -> _Segment:
    folder.mkdir(parents=True, exist_ok=True)
    for _ in _attempts():
        path = folder / f"{time.time_ns():020d}-{os.getpid()}{_SUFFIX}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        if _is_locked(descriptor):
            _sync_folder(folder)
            return _Segment(path, descriptor)
        os.close(descriptor)  # someone took it for an orphan in the moment before
    raise OSError("no segment can be made")


def _attempts() -> Iterable[int]:
    return range(100)


def _lock(path: Path) -> _Segment | None:
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDWR)
        if _is_locked(descriptor):
            return _Segment(path, descriptor)
        os.close(descriptor)
    return None


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(segment: _Segment, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(segment.descriptor, left) :]
    os.fdatasync(segment.descriptor)
    segment.num_bytes += len(data)


def _remove(segment: _Segment) -> None:
    segment.path.unlink(missing_ok=True)
    os.close(segment.descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
