"""Files that grow by appending, so that a run that was killed goes on at the last size that is known to be good."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quiver.bulk.lines import OutputFailed

_BUFFER_BYTES = 1 << 20


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what the disk complains of into an error that names the file. Raises `OutputFailed`."""
    try:
        yield
    except OSError as error:
        raise OutputFailed(f"cannot write {path}: {error.strerror or error}") from error


class AppendFile:
    """A file that one process appends to; whatever stands behind `size` when it is opened is cut off."""

    def __init__(self, path: Path, size: int) -> None:
        """Raises `OutputFailed` where the file is shorter, or another process writes it."""
        self.size = size
        """Bytes, those included that are still on their way to the disk."""
        self._path = path
        self._held = bytearray()
        with naming(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._take(size)
        except BaseException:
            self.close()
            raise

    def _take(self, size: int) -> None:
        with naming(self._path):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputFailed(f"another process is writing {self._path}: wait for it, or end it") from error
            if (there := os.fstat(self._descriptor).st_size) < size:
                raise OutputFailed(f"{self._path} has {there} bytes, but {size} were written: --overwrite starts anew")
            os.ftruncate(self._descriptor, size)
            os.lseek(self._descriptor, size, os.SEEK_SET)

    def write(self, data: bytes) -> None:
        """Append."""
        self._held += data
        self.size += len(data)
        if len(self._held) >= _BUFFER_BYTES:
            self._flush()

    def put(self, data: bytes) -> None:
        """Write over the beginning."""
        with naming(self._path):
            os.pwrite(self._descriptor, data, 0)

    def sync(self) -> int:
        """Return the size, once all of it is on the disk."""
        self._flush()
        with naming(self._path):
            os.fsync(self._descriptor)
        return self.size

    def close(self) -> None:
        """Let go of it; what was not synchronised was not promised to be there."""
        os.close(self._descriptor)

    def _flush(self) -> None:
        with naming(self._path):
            while self._held:
                del self._held[: os.write(self._descriptor, self._held)]


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file anew: whoever reads it, whenever, sees the old one or the new one."""
    new = path.with_name(path.name + ".new")
    with naming(new):
        new.write_bytes(data)
        sync_file(new)
        new.replace(path)
        sync_file(path.parent)


def sync_file(path: Path) -> None:
    """Wait until a file, or what a directory lists, is on the disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
