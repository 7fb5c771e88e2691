"""A place among the processes of a server, and the process that holds it."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket

from quiver.patience import Patience
from quiver.place import LEAVE, MAX_BYTES, READY, STOPPING, VARIABLE, Place, control_pair


@dataclass(slots=True, eq=False)
class Process:
    """One that was started and not buried yet."""

    running: subprocess.Popen[bytes]
    name: str
    control: socket
    waits: bool
    """It takes connections once it is ready, and not before."""
    is_serving: bool = False
    is_stopping: bool = False
    is_silent: bool = False
    """It has closed its end of the control socket: it ends."""
    ready_at: float = float("inf")
    kill_at: float = float("inf")

    @property
    def is_ready(self) -> bool:
        """Whether its models are loaded, and it goes on."""
        return self.ready_at < float("inf") and not self.is_stopping

    @property
    def accepts(self) -> bool:
        """Whether it accepts connections at the socket of its place."""
        return self.is_ready if self.waits else self.is_serving and not self.is_stopping

    @property
    def code(self) -> int | None:
        """How it ended, if it has."""
        return self.running.poll()

    @property
    def ready_seconds(self) -> float:
        """For how long it has been ready."""
        return max(0.0, time.monotonic() - self.ready_at)

    def hear(self) -> None:
        """Take note of what it says."""
        with suppress(BlockingIOError):
            while word := self._word():
                self.is_serving = True
                if word == READY:
                    self.ready_at = time.monotonic()
                self.is_stopping |= word == STOPPING
            self.is_silent = self.is_stopping = True

    def _word(self) -> bytes:
        try:
            return self.control.recv(MAX_BYTES)
        except ConnectionError:
            return b""

    def leave(self) -> None:
        """Let it end, now that another has its place."""
        with suppress(OSError):
            self.control.send(LEAVE)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.running.send_signal(number)


@dataclass(slots=True, eq=False)
class Seat:
    """What stays while processes come and go: a number, cores, and a socket at the port."""

    number: int
    count: int
    cores: Sequence[int]
    port: socket | None
    folder: Path
    process: Process | None = None
    coming: Process | None = None
    """The one that takes over once it is ready."""
    due_at: float = float("inf")
    """When to start a process."""
    patience: Patience = field(default_factory=Patience)

    @property
    def accepts(self) -> bool:
        """Whether someone accepts connections at its socket."""
        return self.process is not None and self.process.accepts

    @property
    def is_ready(self) -> bool:
        """Whether its process is ready."""
        return self.process is not None and self.process.is_ready

    @property
    def processes(self) -> list[Process]:
        """Who is here, and who is on the way."""
        return [process for process in (self.process, self.coming) if process]

    def start(self, command: Sequence[str], env: Mapping[str, str], *, waits: bool) -> Process:
        """Start a process for this place; the caller puts it there. Raises `OSError`."""
        ours, theirs = control_pair()
        with theirs:
            place = Place(
                number=self.number,
                count=self.count,
                control=theirs.fileno(),
                port=self.port.fileno() if self.port else None,
                directory=str(self.folder),
                waits=waits,
            )
            given = [descriptor for descriptor in (place.control, place.port) if descriptor is not None]
            with _on(self.cores):
                running = subprocess.Popen(  # noqa: S603  the very command that started us
                    [*command],
                    env={**env, VARIABLE: place.written()},
                    pass_fds=given,
                    stdin=subprocess.DEVNULL,
                    process_group=0,  # a signal from the terminal is for the supervisor, which then tells all
                )
        return Process(running, f"{self.number}-{running.pid}", ours, waits)


@contextmanager
def _on(cores: Sequence[int]) -> Iterator[None]:
    """Be on these cores for a moment: what is started then stays there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def why(code: int) -> str:
    """Say in words how a process ended."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
