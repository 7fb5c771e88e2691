"""The command `quiver` as a process of its own: what it says, how it ends, and nothing left behind."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from quiver.config import FIELDS, RESERVED_ENV

QUIVER = (sys.executable, "-m", "quiver")
SERVE = (*QUIVER, "serve", "--port", "0")
PATIENCE_SECONDS = 20.0
_NOTHING_MORE: dict[str, Any] = {}


def clean_environment(**more: str) -> dict[str, str]:
    """Return this environment without any setting of the server's, and with `more`."""
    settings = {name for field in FIELDS.values() for name in field.env_names} | RESERVED_ENV
    return {name: value for name, value in os.environ.items() if name not in settings} | more


def run(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; unless it is told where, what it keeps is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(  # noqa: S603  our own command
            [*QUIVER, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            env=clean_environment(**{"QUIVER_DATA_DIR": folder, **env}),
            check=False,
        )


class ServerProcess:
    """A server whose words on standard error are read as they come; it finds nothing of this machine's own, such as keys."""

    def __init__(self, *arguments: str, command: Sequence[str] = SERVE, **env: str) -> None:
        self.started = time.perf_counter()
        self._folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(  # noqa: S603  our own command
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(**{"QUIVER_DATA_DIR": self._folder.name, **env}),
        )
        self.lines: list[str] = []
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        with self.process.stderr as words:
            for line in words:
                self.lines.append(line)
                with contextlib.suppress(ValueError):
                    self._events.put(json.loads(line))
        self._events.put(_NOTHING_MORE)

    def wait_for(self, event: str) -> dict[str, Any]:
        """Return the next log line that tells of an event."""
        while True:
            try:
                said = self._events.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                said = _NOTHING_MORE
            if said is _NOTHING_MORE:
                raise AssertionError(f"the server never said {event!r}, but: {''.join(self.lines)}")
            if said["event"] == event:
                return said

    def url(self) -> str:
        """Wait until it listens, and return where."""
        return str(self.wait_for("listening")["url"])

    def ready_url(self) -> str:
        """Wait until its models are ready, and return where it listens."""
        url = self.url()
        self.wait_for("ready")
        return url

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def ended(self, *, within_seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for its end and return the exit code."""
        code = self.process.wait(within_seconds)
        self._reader.join()
        return code

    def resident_bytes(self) -> int:
        """Return the memory that it holds now."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self._folder.cleanup()


@contextlib.contextmanager
def serving(*arguments: str, command: Sequence[str] = SERVE, **env: str) -> Iterator[ServerProcess]:
    """Start a server on a free port of this machine; it is gone afterwards."""
    server = ServerProcess(*arguments, command=command, **env)
    try:
        yield server
    finally:
        server.close()
