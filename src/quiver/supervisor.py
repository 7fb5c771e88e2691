"""Several processes that are one server: started, watched, replaced and ended by this one, which serves nobody itself.

The port has a listening socket for each process, among which the kernel divides connections. This process keeps all of
them and hands a socket on to whoever takes a place next, so that none is closed while the server lives, with people in
it. Who connects where nobody accepts at the moment, because a process is being replaced, and who comes by a unix socket,
is accepted here and handed to the processes in turn.

    SIGTERM, SIGINT    all drain; a second one ends them at once
    SIGHUP             one process after another is replaced: the new one is ready before the old one leaves
"""

import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from socket import socket

import structlog

from quiver.api import listeners
from quiver.api.listeners import Listener
from quiver.config import Config, divisions, portions
from quiver.errors import ConfigError
from quiver.place import hand_over
from quiver.seat import Process, Seat, why
from quiver.siblings import bury

log = structlog.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
TICK_SECONDS = 0.02
"""How soon it is tried again to hand someone over, where nobody could take them."""
GRACE_SECONDS = 15.0
"""Who has not ended so long after the time to drain is killed."""
MAX_FOLDER_BYTES = 80
"""A socket's path has 107 at most."""
EX_SOFTWARE = 70
EX_CONFIG = 78
NEVER = float("inf")


class Supervisor:
    """Runs a command in as many processes as are configured, until it is told to end or cannot run them."""

    def __init__(self, config: Config, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._config = config
        self._command = (tuple(command), dict(env))
        self._seats: list[Seat] = []
        self._files: tuple[Listener, ...] = ()
        self._leaving: list[Process] = []
        """Processes whose place another one has taken."""
        self._to_replace: deque[Seat] = deque()
        self._arrived: deque[tuple[socket, str]] = deque()
        """Who is accepted and not handed over yet, and the name of the socket; "" is the port."""
        self._turn = 0
        self._told: deque[int] = deque()
        """Signals that are not obeyed yet."""
        self._was_ready = self._was_complete = False
        self._exit_code: int | None = None
        """How to end, once all processes have."""
        self._started_at = time.monotonic()

    def run(self) -> int:
        """Serve until the end -> exit code. Raises `ConfigError`."""
        if sys.platform != "linux":
            raise ConfigError("several processes share a port on Linux alone: leave processes at 1")
        with ExitStack() as made:
            ports, self._files = listeners.bind_together(self._config.server, self._config.server.processes)
            for listener in (*ports, *self._files):
                made.callback(listener.close)
            folder = Path(tempfile.mkdtemp(prefix="quiver-"))
            made.callback(shutil.rmtree, folder, ignore_errors=True)
            if len(bytes(folder)) > MAX_FOLDER_BYTES:
                raise ConfigError(f"{folder} is too long a path for sockets: set TMPDIR to a shorter one")
            signals = made.enter_context(_noting(self._told))
            self._say_where(ports)
            self._seats = _seats([port.bound for port in ports], folder, self._config.server.processes)
            self._seats[0].due_at = self._started_at  # alone: what is wrong shows once, and what is fetched is once
            while self._exit_code is None or self._living:
                self._step(signals)
        return self._exit_code

    def _say_where(self, ports: Sequence[Listener]) -> None:
        config, count = self._config, self._config.server.processes
        scheme = "https" if config.tls.is_on else "http"
        url = {"url": scheme + ports[0].url.removeprefix("http")} if ports else {}
        files = {"sockets": [listener.url for listener in self._files]} if self._files else {}
        log.info("listening", **url, **files, processes=count)
        rates = "shared by Redis" if config.cache.redis_url else f"each process lets 1/{count} of each rate through"
        log.info("divided", rates=rates, **divisions(config, count))
        if count > (cores := len(os.sched_getaffinity(0))):
            log.warning("there are more processes than cores: they take turns", processes=count, cores=cores)

    @property
    def _living(self) -> list[Process]:
        return [*(process for seat in self._seats for process in seat.processes), *self._leaving]

    @property
    def _is_ending(self) -> bool:
        return self._exit_code is not None

    def _step(self, signals: int) -> None:
        """Wait until something happens, and see to it."""
        reactions = self._reactions() | {signals: partial(os.read, signals, 4096)}
        poll = select.poll()
        for descriptor in reactions:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(self._milliseconds()):
            reactions[descriptor]()
        while self._told:
            self._obey(self._told.popleft())
        for process in self._living:
            process.hear()
            if (code := process.code) is not None:
                self._bury(process, code)
            elif time.monotonic() >= process.kill_at:
                log.error("a process does not end: it is killed", pid=process.running.pid)
                process.kill_at = NEVER
                process.signal(signal.SIGKILL)
        if not self._is_ending:
            self._note_readiness()
            self._start_what_is_due()
            self._replace_the_next()
        self._hand_on()

    def _reactions(self) -> dict[int, Callable[[], object]]:
        """Return what to do for each descriptor at which something may happen."""
        reactions: dict[int, Callable[[], object]] = {
            process.control.fileno(): process.hear for process in self._living if not process.is_silent
        }
        if self._takers and not self._arrived and not self._is_ending:
            deserted = [(seat.port, "") for seat in self._seats if seat.port and not seat.accepts]
            for bound, name in (*deserted, *((listener.bound, listener.name) for listener in self._files)):
                reactions[bound.fileno()] = partial(self._accept, bound, name)
        return reactions

    def _milliseconds(self) -> float | None:
        if self._arrived:
            return 1000 * TICK_SECONDS
        due = [] if self._is_ending else [seat.due_at for seat in self._seats]
        next_at = min([*due, *(process.kill_at for process in self._living)], default=NEVER)
        return None if next_at == NEVER else max(0.0, 1000 * (next_at - time.monotonic()) + 1)

    def _obey(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._end(0)
        elif number == signal.SIGHUP and not self._is_ending:
            log.info("replacing all processes, one after another")
            self._to_replace = deque(self._seats)

    # Processes

    def _note_readiness(self) -> None:
        """Start the others once the first is ready, and say so once all are."""
        if not self._was_ready and any(seat.is_ready for seat in self._seats):
            self._was_ready = True
            for seat in self._seats[1:]:
                seat.due_at = time.monotonic()
        if not self._was_complete and all(seat.is_ready for seat in self._seats):
            self._was_complete = True
            seconds = round(time.monotonic() - self._started_at, 2)
            log.info("ready", seconds=seconds, processes=len(self._seats))

    def _start_what_is_due(self) -> None:
        for seat in self._seats:
            if time.monotonic() >= seat.due_at:
                seat.due_at = NEVER
                seat.process = self._start(seat, waits=any(other.is_ready for other in self._seats))
                if seat.process is None:
                    self._try_again(seat, 0.0, EX_SOFTWARE)

    def _start(self, seat: Seat, *, waits: bool) -> Process | None:
        try:
            return seat.start(*self._command, waits=waits)
        except OSError as error:
            log.error("no process can be started", why=error.strerror)  # noqa: TRY400  it is the machine's
            return None

    def _replace_the_next(self) -> None:
        """Let the next process take a place, once the last one that was replaced has ended."""
        for seat in self._seats:
            if seat.coming and seat.coming.is_ready:
                self._let_leave(seat)
        if self._leaving or any(seat.coming for seat in self._seats) or not self._to_replace:
            return
        seat = self._to_replace[0]
        if seat.process is None or seat.is_ready:  # one that is gone is started anyway
            self._to_replace.popleft()
        if seat.is_ready:
            seat.coming = self._start(seat, waits=True)

    def _let_leave(self, seat: Seat) -> None:
        old, seat.process, seat.coming = seat.process, seat.coming, None
        log.info("a process is replaced", process=seat.number, left=len(self._to_replace))
        if old:
            old.kill_at = time.monotonic() + self._config.server.drain_seconds + GRACE_SECONDS
            old.leave()
            self._leaving.append(old)

    def _bury(self, process: Process, code: int) -> None:
        """See to what follows from the end of a process."""
        process.control.close()
        bury(self._seats[0].folder, process.name)
        seat = next((seat for seat in self._seats if process in seat.processes), None)
        is_new = seat is not None and process is seat.coming
        if seat is None:
            self._leaving.remove(process)
        elif is_new:
            seat.coming = None
            self._to_replace.clear()
        else:
            seat.process, seat.coming = seat.coming, None
        if self._is_ending:
            self._exit_code = self._exit_code or _exit_code(code)
        elif seat and is_new:
            log.error("a new process did not start: the others go on", process=seat.number, why=why(code))
        elif seat:
            log.error("a process ended", process=seat.number, why=why(code))
            self._try_again(seat, process.ready_seconds, code)

    def _try_again(self, seat: Seat, ready_seconds: float, code: int) -> None:
        """Start a process after a while, unless that has no prospect."""
        seconds = seat.patience.after_end(ready_seconds)
        is_alone = not any(other.is_ready for other in self._seats)
        if code == EX_CONFIG and not self._was_ready:
            self._end(EX_CONFIG)
        elif is_alone and seat.patience.is_at_its_end:
            log.error("processes end again and again: giving up", times=seat.patience.failures, last=why(code))
            self._end(_exit_code(code) or EX_SOFTWARE)
        elif seat.process is None:
            seat.due_at = time.monotonic() + seconds

    def _end(self, code: int) -> None:
        """Let all drain; said again, end at once."""
        if not self._is_ending:
            log.info("stopping", drain_seconds=self._config.server.drain_seconds)
            self._exit_code = code
            self._stop_listening()
        config = self._config.server
        for process in self._living:
            process.kill_at = time.monotonic() + config.drain_delay_seconds + config.drain_seconds + GRACE_SECONDS
            process.signal(signal.SIGTERM)

    # Connections

    @property
    def _takers(self) -> list[Process]:
        """Who can be handed connections: those that are ready, or, while none is, those that say so."""
        processes = [seat.process for seat in self._seats if seat.process]
        return [p for p in processes if p.is_ready] or [p for p in processes if p.is_serving]

    def _accept(self, bound: socket, name: str) -> None:
        with suppress(OSError):  # too many files are open: some are, when these are handed on
            self._arrived.extend((client, name) for client in listeners.connected(bound))

    def _hand_on(self) -> None:
        """Hand who has arrived to the processes, in turn; those whom nobody can take now wait a moment."""
        while self._arrived:
            client, name = self._arrived[0]
            takers = self._takers
            for _ in takers:
                self._turn += 1
                if hand_over(takers[self._turn % len(takers)].control, client, name):
                    break
            else:
                return
            self._arrived.popleft()
            client.close()

    def _stop_listening(self) -> None:
        """Hand on who is connected, and leave the rest to those processes that accept for themselves."""
        for seat in self._seats:
            if seat.port and not seat.accepts:
                listeners.turn_away(seat.port)
                self._accept(seat.port, "")
            if seat.port:
                seat.port.close()
        for listener in self._files:
            self._accept(listener.bound, listener.name)
            listener.close()
        self._hand_on()


def _seats(ports: Sequence[socket], folder: Path, count: int) -> list[Seat]:
    """Divide the cores: neighbours stay together, and where there are too few, some have several processes."""
    cores, seats, begin = sorted(os.sched_getaffinity(0)), [], 0
    for number, size in enumerate(portions(max(count, len(cores)), count)):
        share = [cores[i % len(cores)] for i in range(begin, begin + size)]
        seats.append(Seat(number, count, share, ports[number] if ports else None, folder))
        begin += size
    return seats


@contextmanager
def _noting(told: deque[int]) -> Iterator[int]:
    """Note signals as they come; yields a descriptor that can be read once there is one."""
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    before = {number: signal.signal(number, lambda number, _: told.append(number)) for number in SIGNALS}
    loud = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    try:
        yield ear
    finally:
        signal.set_wakeup_fd(loud)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(ear)
        os.close(mouth)


def _exit_code(code: int) -> int:
    """Return how to end because of a process: as it did; killed before it could listen to us, or by somebody else."""
    if code == -signal.SIGTERM:
        return 0
    return code if code >= 0 else EX_SOFTWARE
