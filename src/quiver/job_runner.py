"""Does the lines of jobs: takes those that are due, as many as keep the lanes busy, and writes what came of them.

    database ──> take ──> a task for each line ──> write ──> database
                   ▲                                 │
                   └────────── room again ───────────┘

What is taken and not yet written is bounded, in lines and in bytes: that is all that a job has in memory, whatever its
size. A write costs as much as several lines, so that a file's results gather for a moment; what is no file's is written
at once, for somebody may wait for it.
"""

import asyncio
import contextvars
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from quiver.accounts import ApiKey
from quiver.db.files import Files
from quiver.db.jobs import JobRows
from quiver.db.lines import Lines
from quiver.errors import (
    DatabaseDown,
    DeadlineExceeded,
    EngineError,
    InsufficientQuota,
    LaneDied,
    OutOfMemory,
    QuiverError,
    Stalled,
    Unauthorized,
    Unavailable,
)
from quiver.job import Job, Kind, Line, LineState, Outcome
from quiver.metering import repeatable
from quiver.types import Caller, Priority

log = structlog.get_logger(__name__)
T = TypeVar("T")

LEASE_SECONDS = 15.0
"""A runner that has not been heard of for so long is gone: others do its lines."""
MAX_ATTEMPTS = 4
"""A line that was begun so often, and whose server ended each time, is not begun again."""
POLL_SECONDS = 1.0
"""How often the database is asked for what other servers have put there."""
MAX_BYTES = 64 << 20
"""Most bytes of lines at work, results included as far as they can be told before."""
RESULT_BYTES = 8192
"""What an input's result takes, roughly."""
GATHER_SECONDS, GATHER_SHARE = 0.5, 1 / 2
"""How long a file's results may wait to be written together, and which part of the lines at work they are at the most."""
MANY_LINES = 16
"""Of fewer at work each place is given as soon as it is free; of more, several at once."""
RETRY_SECONDS = 0.5
MEMORY_SECONDS = 5.0
"""How long what was read of a job, and of the key that it was made with, holds."""
FINAL = (DeadlineExceeded, OutOfMemory, InsufficientQuota)
"""What makes a line fail though it says that another time would do."""


@dataclass(frozen=True, slots=True)
class Store:
    """The three doors to one database."""

    jobs: JobRows
    lines: Lines
    files: Files
    find_key: Callable[[str], Awaitable[ApiKey | None]]


@dataclass(slots=True, eq=False)
class _Held:
    """A line that this runner has begun."""

    line: Line
    cost: int
    task: asyncio.Task[None] | None = None


class JobRunner:
    """Owns the lines at work of one server; used on one event loop."""

    def __init__(
        self, store: Store, kinds: Mapping[str, Kind], on_ended: Callable[[str], None], *, max_lines: int
    ) -> None:
        self.id = uuid.uuid4().hex
        self._store = store
        self._kinds = kinds
        self._on_ended = on_ended
        self._max_lines = max_lines
        self._held: dict[int, _Held] = {}
        self._cost = 0
        self._jobs: dict[str, tuple[Job, Caller]] = {}
        """Those whose lines are at work, read anew now and then: a key may be revoked meanwhile."""
        self._jobs_until = 0.0
        self._found_some = False
        """Whether there were lines when they were asked for last: there will be more, most likely."""
        self._contexts: dict[str, contextvars.Context] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._is_urgent = False
        """Whether one of the results is no file's."""
        self._given_back: dict[int, tuple[float, bool]] = {}
        """When lines may be begun again, and whether this was an attempt."""
        self.ended: Counter[LineState] = Counter()
        """Lines whose results were written, by what became of them."""
        self._has_work = asyncio.Event()
        self._has_results = asyncio.Event()

    @property
    def num_lines(self) -> int:
        """Lines at work."""
        return len(self._held)

    def wake(self) -> None:
        """Look for work now."""
        self._has_work.set()

    def remember(self, job_id: str, context: contextvars.Context) -> None:
        """Do a job's first line in the context of the request that brought it: its trace goes on there."""
        while len(self._contexts) >= self._max_lines:
            del self._contexts[next(iter(self._contexts))]
        self._contexts[job_id] = context

    def drop(self, job_id: str) -> None:
        """Do no more for a job that is not wanted any more."""
        for line_id, held in tuple(self._held.items()):
            if held.line.job_id == job_id and line_id not in self._outcomes:
                self._let_go(line_id)

    async def run(self) -> None:
        """Do what is due until cancelled; then give back what is at work."""
        try:
            await patiently(
                self._live_once, "staying alive"
            )  # before the first line: who is not known is taken for dead
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._live())
                tasks.create_task(self._take())
                tasks.create_task(self._write())
        finally:
            await self._stop()

    async def _stop(self) -> None:
        tasks = [held.task for held in self._held.values() if held.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(QuiverError, OSError):
            await self._write_once()
            if self._held:
                await self._store.lines.release(self.id, dict.fromkeys(self._held, 0.0), was_attempt=False)
            await self._store.lines.leave(self.id)

    async def _live(self) -> None:
        """Say again and again that this runner lives, and take back what dead ones had begun."""
        while True:
            self.wake()
            await asyncio.sleep(LEASE_SECONDS / 4)
            await patiently(self._live_once, "staying alive")

    async def _live_once(self) -> None:
        now = time.time()
        await self._store.lines.beat(self.id, until=now + LEASE_SECONDS)
        if number := await self._store.lines.take_back(now=now):
            log.warning("lines taken up again", lines=number)

    # Lines

    async def _take(self) -> None:
        while True:
            lines = await patiently(self._claim, "taking lines") if self._has_room() else []
            for line in lines or ():
                await self._begin(line)
                await asyncio.sleep(0)  # requests come in between
            if not lines:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._has_work.wait()
                self._has_work.clear()

    def _has_room(self) -> bool:
        least = int(self._max_lines * GATHER_SHARE) if self._max_lines >= MANY_LINES else 1
        return self._max_lines - len(self._held) >= least and self._cost < MAX_BYTES

    async def _claim(self) -> list[Line]:
        now = time.time()
        if not (self._found_some or await self._store.lines.are_waiting(now=now)):
            return []
        room = {"max_lines": self._max_lines - len(self._held), "max_bytes": MAX_BYTES - self._cost}
        lines = await self._store.lines.claim(self.id, **room, now=now)
        self._found_some = bool(lines)
        await self._learn_jobs({line.job_id for line in lines}, now)
        return lines

    async def _learn_jobs(self, job_ids: set[str], now: float) -> None:
        """Find out whose lines these are."""
        if now >= self._jobs_until:
            self._jobs, self._jobs_until = {}, now + MEMORY_SECONDS
        for job in await self._store.jobs.find(job_ids - self._jobs.keys()):
            key = await self._store.find_key(job.key_id) if job.key_id else None
            self._jobs[job.id] = (job, Caller(job.caller, key=key, priority=Priority.BULK))

    async def _begin(self, line: Line) -> None:
        """Start a line as soon as there is memory for what will come of it."""
        held = _Held(line, len(line.request) + RESULT_BYTES * (1 + line.request.count(b",")))
        while self._cost and self._cost + held.cost > MAX_BYTES:
            self._has_work.clear()
            await self._has_work.wait()
        self._held[line.id] = held
        self._cost += held.cost
        context = self._contexts.pop(line.job_id, None)
        held.task = asyncio.create_task(self._do(line, *self._jobs[line.job_id]), context=context)

    async def _do(self, line: Line, job: Job, caller: Caller) -> None:
        """Do a line, and note what came of it."""
        kind = self._kinds[job.kind]
        try:
            self._outcomes[line.id] = await _outcome(kind, job, line, caller)
            self._is_urgent |= not job.gives_files
        except (LaneDied, Stalled):
            self._given_back[line.id] = (time.time() + RETRY_SECONDS, True)
        except Unavailable as busy:
            self._given_back[line.id] = (time.time() + busy.retry_after_seconds, False)
        self._has_results.set()

    # Results

    async def _write(self) -> None:
        while True:
            await self._has_results.wait()
            await self._gather()
            await patiently(self._write_once, "writing results")

    async def _gather(self) -> None:
        """Wait for more results while more are on their way, a moment at the most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(GATHER_SECONDS):
                while self._has_more_to_come:
                    self._has_results.clear()
                    await self._has_results.wait()
        self._has_results.clear()

    @property
    def _has_more_to_come(self) -> bool:
        """Whether to wait for other results: not when all are there, nor when it would keep new lines from their room."""
        number = len(self._outcomes) + len(self._given_back)
        return not self._is_urgent and number < min(len(self._held), self._max_lines * GATHER_SHARE)

    async def _write_once(self) -> None:
        """Write all that has gathered, and make room."""
        outcomes, given_back, self._is_urgent = dict(self._outcomes), dict(self._given_back), False
        for was_attempt in (True, False):
            back = {line_id: at for line_id, (at, counts) in given_back.items() if counts is was_attempt}
            if back:
                await self._store.lines.release(self.id, back, was_attempt=was_attempt)
        for line_id in given_back:
            self._let_go(line_id)
        ended = await self._store.lines.finish(self.id, outcomes, now=time.time()) if outcomes else []
        self.ended.update(LineState.DONE if each.is_done else LineState.FAILED for each in outcomes.values())
        for line_id in outcomes:
            self._let_go(line_id)
        for job_id in ended:
            self._on_ended(job_id)
        self.wake()

    def _let_go(self, line_id: int) -> None:
        self._outcomes.pop(line_id, None)
        self._given_back.pop(line_id, None)
        if held := self._held.pop(line_id, None):
            self._cost -= held.cost
            if held.task:
                held.task.cancel()  # does nothing to one that is done
            self.wake()


async def _outcome(kind: Kind, job: Job, line: Line, caller: Caller) -> Outcome:
    """Do a line; whatever is wrong with it is what comes of it. Raises `Unavailable` where it should wait."""
    try:
        _check(job, line, caller)
        return await kind.do(job, line, _once(job, line, caller))
    except FINAL as error:
        return kind.refuse(job, line, error)
    except (Unavailable, LaneDied, Stalled):
        raise
    except QuiverError as error:
        return kind.refuse(job, line, error)
    except Exception:
        log.exception("a line failed", job=job.id, line=line.number)
        return kind.refuse(job, line, QuiverError("the server failed; the log says why"))


def _once(job: Job, line: Line, caller: Caller) -> Caller:
    """Let a line count once towards a quota, however often it is begun."""
    if caller.key is None:
        return caller
    return replace(caller, request=repeatable(caller.key, f"{job.id} {line.number} {job.retries}", line.request))


def _check(job: Job, line: Line, caller: Caller) -> None:
    """Refuse what is not to be begun again, or not for this caller."""
    if line.attempts > MAX_ATTEMPTS:
        raise EngineError(f"given up: the server ended {line.attempts - 1} times while it was at work")
    if job.key_id and not (caller.key and caller.key.is_good(time.time())):
        raise Unauthorized("the key that the job was made with is not good any more")


async def patiently(work: Callable[[], Awaitable[T]], what: str) -> T:
    """Do some work of the database's; while it does not answer, try again."""
    seconds = RETRY_SECONDS
    while True:
        try:
            return await work()
        except DatabaseDown as error:
            log.warning("the database is away", while_=what, error=error.message)
        await asyncio.sleep(seconds)
        seconds = min(2 * seconds, 10 * RETRY_SECONDS)
