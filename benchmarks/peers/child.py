"""A peer as a process: started, watched, and ended by its own id whatever happens."""

import contextlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

STOP_SECONDS = 20.0
LAST_WORDS = 300
_WORD = re.compile(r"[A-Za-z]{3}")
_FOLDERS = re.compile(r"/(?:[\w.+-]+/)+")


class PeerFailed(Exception):
    """A peer could not be installed, started or asked; its message says why."""


class Child:
    """A process with all that it started."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.process = process
        self.started = time.perf_counter()
        self._psutil = psutil.Process(process.pid)
        self._log = log

    @property
    def is_gone(self) -> bool:
        """Whether it has ended by itself."""
        return self.process.poll() is not None

    def rss(self) -> int:
        """Return the bytes of memory that it and its children hold."""
        return sum(one.memory_info().rss for one in self._alive())

    def cpu_seconds(self) -> float:
        """Return the processor time that it and its children have taken."""
        total = 0.0
        for one in self._alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += times.user + times.system
        return total

    def last_words(self) -> str:
        """Return the last line that it said."""
        self._log.seek(0)
        return last_line(self._log.read())

    def stop(self) -> None:
        """End it and its children, and wait until they are gone."""
        family = self._alive()
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        for one in psutil.wait_procs(family, timeout=1.0)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait(STOP_SECONDS)

    def _alive(self) -> list[psutil.Process]:
        try:
            return [self._psutil, *self._psutil.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@contextlib.contextmanager
def child(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, *, talks: bool = False
) -> Iterator[Child]:
    """Start a command in a folder; it is gone afterwards. One that `talks` has pipes, all others a log."""
    pipe = subprocess.PIPE if talks else subprocess.DEVNULL
    with tempfile.TemporaryFile("w+", errors="replace") as log:  # a pipe that nobody reads would fill up and stop it
        try:
            process = subprocess.Popen(  # noqa: S603  commands of the roster
                command, cwd=folder, env=environment, stdin=pipe, stdout=pipe if talks else log, stderr=log, text=True
            )
        except OSError as error:
            raise PeerFailed(f"it cannot be started: {error.strerror}") from error
        one = Child(process, log)
        try:
            yield one
        finally:
            one.stop()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()


def others_share(before: float, after: float, own: float, seconds: float) -> float:
    """Return the share of all cores that was taken by nobody whose time is in `own`."""
    return max(0.0, after - before - own) / (seconds * (psutil.cpu_count() or 1))


def busy_seconds() -> float:
    """Return the processor time that the whole machine has spent on anything."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def last_line(text: str) -> str:
    """Return the last line with words in it, make's own only if there is no other, without this machine's folders."""
    lines = [line.strip() for line in text.splitlines() if _WORD.search(line)]
    lines = [line for line in lines if not line.startswith("make")] or lines
    return _FOLDERS.sub("…/", lines[-1][:LAST_WORDS]) if lines else "it said nothing"
