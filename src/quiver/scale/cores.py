"""Cores that one replica has for itself: several on one machine would each start threads for all of them."""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO


class Cores:
    """Some cores of this machine, held until the process ends, whatever ends it."""

    def __init__(self, count: int, folder: Path | None = None) -> None:
        """Take so many that nobody else holds; where there are too few, others share theirs."""
        self.folder = folder or Path(tempfile.gettempdir()) / f"quiver-cores-{os.getuid()}"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self._held: list[IO[bytes]] = []
        allowed = sorted(os.sched_getaffinity(0))
        count = min(count, len(allowed))
        free = [core for core in allowed if len(self._held) < count and self._take(core)]
        rest = [core for core in allowed if core not in free]
        start = os.getpid() % len(rest) if rest else 0
        self.numbers = frozenset((free + rest[start:] + rest[:start])[:count])

    def pin(self) -> None:
        """Keep the calling thread, and those that it starts, on these cores."""
        os.sched_setaffinity(0, self.numbers)

    def close(self) -> None:
        """Let others have them."""
        for file in self._held:
            file.close()
        self._held.clear()

    def _take(self, core: int) -> bool:
        file = (self.folder / str(core)).open("wb")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._held.append(file)
            return True
        file.close()
        return False
