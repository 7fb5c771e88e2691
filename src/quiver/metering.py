"""What callers use: reserved before it is computed, settled after, and in the ledger exactly once.

A user's month is what the ledger says, plus what this process settled and the ledger does not have yet, plus what is
reserved. Other servers' part of it is as old as `REFRESH_SECONDS`; within one process no quota is ever exceeded.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import structlog

from quiver.accounts import ApiKey, Request, UsageEntry, end_of_period, period_of
from quiver.errors import AuthUnavailable, DatabaseDown, InsufficientQuota, KeyReused, StillRunning
from quiver.spool import Spool

log = structlog.get_logger(__name__)

REFRESH_SECONDS = 5.0
FLUSH_SECONDS = 1.0
TALLY_SECONDS = 0.05
"""For so long what is answered at once is tallied: as much of it may be lost with a process that is killed."""
CLOSE_SECONDS = 3.0
FORGET_SECONDS = 3600.0
"""How often old rows are removed."""
KEEP_DAYS = 90.0


class UsageLedger(Protocol):
    """Where usage ends up; its methods raise `DatabaseDown`."""

    async def apply(self, entries: Sequence[UsageEntry]) -> int:
        """Add what was not there yet."""

    async def used(self, user_id: int, period: str) -> int:
        """Return what counts towards a user's month."""

    async def fingerprint(self, request_id: str) -> str | None:
        """Return what a request's body was, if it was answered before."""

    async def forget(self, before: float) -> int:
        """Remove the rows of requests before a time."""


@dataclass(slots=True, eq=False)
class _Month:
    """One user's month as this process sees it."""

    user_id: int
    period: str
    base: int = 0
    """What the ledger had when it was asked."""
    asked_at: float = float("-inf")
    reserved: int = 0
    pending: int = 0
    """Settled here, and not known to be in `base`."""
    refresh: asyncio.Task[None] | None = None

    @property
    def is_known(self) -> bool:
        return self.asked_at > float("-inf")

    @property
    def used(self) -> int:
        return self.base + self.pending + self.reserved


@dataclass(slots=True, eq=False)
class _Tally:
    """What a key was answered at once with a model's known results, and is not put down yet."""

    key: ApiKey
    since: float
    month: _Month
    requests: int = 0
    embeddings: int = 0
    cached: int = 0
    tokens: int = 0


@dataclass(slots=True, eq=False)
class Reservation:
    """Part of a quota that is held for one request."""

    key: ApiKey
    request: Request
    embeddings: int
    is_repeated: bool = False
    """The same request was answered before: it costs nothing again."""
    is_settled: bool = False
    held: list[tuple[_Month, int]] = field(default_factory=list)
    """Of which month how much; of one that is settled, nothing more."""


class Meter:
    """Reserves and settles; used on one event loop, and closed after the last request."""

    def __init__(
        self,
        ledger: UsageLedger,
        spool: Spool,
        *,
        counts_cached: bool = True,
        keep_days: float = KEEP_DAYS,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spool = spool
        self._ledger = ledger
        self._counts_cached = counts_cached
        self._keep_seconds = keep_days * 86400
        self._now = now
        self._clock = clock
        self._months: dict[tuple[int, str], _Month] = {}
        self._unapplied: dict[str, UsageEntry] = {}
        """What this process settled and the ledger is not known to have."""
        self._tallies: dict[tuple[str, str], _Tally] = {}
        """By key and model."""
        self._running: dict[str, str] = {}
        """Requests with an idempotency key that are being answered, and their fingerprints."""
        self._ledger_turn = asyncio.Lock()
        self._flusher: asyncio.Task[None] | None = None
        self._forget_at = clock() + FORGET_SECONDS

    @property
    def num_unapplied(self) -> int:
        """Requests that are settled and not in the ledger yet."""
        tallied = sum([tally.requests for tally in self._tallies.values()])
        return tallied + sum([entry.requests for entry in self._unapplied.values()])

    @asynccontextmanager
    async def reservation(
        self, key: ApiKey, embeddings: int, request: Request | None = None
    ) -> AsyncIterator[Reservation]:
        """Hold part of a key's quota; what is not settled is given back.

        Raises `InsufficientQuota`, `StillRunning`, `KeyReused`, or `AuthUnavailable` where nobody can say what is left.
        """
        request = request or Request(new_request_id(self._now()))
        is_repeated = await self._begin(request)
        reservation = Reservation(key, request, embeddings, is_repeated)
        try:
            await self._reserve(reservation, embeddings)
            yield reservation
        finally:
            self._running.pop(request.id, None)
            self._release(reservation)

    async def extend(self, reservation: Reservation, embeddings: int) -> None:
        """Hold more for a request that turns out to be larger. Raises `InsufficientQuota` or `AuthUnavailable`."""
        await self._reserve(reservation, embeddings)
        reservation.embeddings += embeddings

    def charge_now(self, key: ApiKey, embeddings: int, *, model: str, tokens: int) -> bool:
        """Note a request that is answered with known results, if so much is known to be left; waits for nobody.

        Those of a moment are put down together: there may be thousands in a second.
        """
        tally = self._tallies.get((key.id, model)) or self._open_tally(key, model)
        month, most = tally.month, key.user.tier.monthly_embeddings
        if most is not None and not (month.is_known and month.used + embeddings <= most):
            return False
        counted = embeddings if self._counts_cached else 0
        month.pending += counted
        tally.requests += 1
        tally.embeddings += counted
        tally.cached += embeddings
        tally.tokens += tokens
        return True

    def _open_tally(self, key: ApiKey, model: str) -> _Tally:
        if not self._tallies:
            asyncio.get_running_loop().call_later(TALLY_SECONDS, self._put_down)
        now = self._now()
        month = self._month(key.user.id, period_of(now))
        if key.user.tier.monthly_embeddings is not None:
            self._look_up(month)
        tally = self._tallies[key.id, model] = _Tally(key, now, month)
        return tally

    def _put_down(self) -> None:
        """Let the spool have what is tallied."""
        tallies, self._tallies = self._tallies, {}
        for (key_id, model), tally in tallies.items():
            if not tally.requests:
                continue  # its key had nothing left
            entry = UsageEntry(
                request_id=new_request_id(tally.since),
                user_id=tally.key.user.id,
                key_id=key_id,
                model=model,
                embeddings=tally.embeddings,
                cached=tally.cached,
                tokens=tally.tokens,
                created_at=tally.since,
                requests=tally.requests,
            )
            if self.spool.add(entry).done():  # there was no room for it
                tally.month.pending -= tally.embeddings
            else:
                self._unapplied[entry.request_id] = entry

    def settle(self, reservation: Reservation, *, model: str, cached: int, tokens: int) -> asyncio.Future[bool]:
        """Note what a request used; the future tells, within a moment, whether that is on disk."""
        assert not reservation.is_settled, "this is a bug: a request is settled twice"
        reservation.is_settled = True
        if reservation.is_repeated:
            done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            done.set_result(True)
            return done
        entry = UsageEntry(
            request_id=reservation.request.id,
            user_id=reservation.key.user.id,
            key_id=reservation.key.id,
            model=model,
            embeddings=reservation.embeddings - (0 if self._counts_cached else cached),
            cached=cached,
            tokens=tokens,
            created_at=self._now(),
            fingerprint=reservation.request.fingerprint,
        )
        self._release(reservation)
        saved = self.spool.add(entry)
        if not saved.done():  # else there was no room for it
            self._unapplied[entry.request_id] = entry
            self._month(entry.user_id, entry.period).pending += entry.embeddings
        return saved

    async def flush(self) -> None:
        """Bring to the ledger what is settled, and what processes that died left behind. Raises `DatabaseDown`."""
        self._put_down()
        await self.spool.drain(self._apply)

    async def close(self) -> None:
        """Flush if that is soon done; the rest is on disk, for the next process."""
        if self._flusher:
            self._flusher.cancel()
            await asyncio.gather(self._flusher, return_exceptions=True)
        refreshes = [month.refresh for month in self._months.values() if month.refresh]
        for refresh in refreshes:
            refresh.cancel()
        await asyncio.gather(*refreshes, return_exceptions=True)
        with suppress(DatabaseDown, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.flush()
        self._put_down()
        await self.spool.close()

    async def __aenter__(self) -> Self:
        self._flusher = asyncio.create_task(self._keep_flushing())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Reserving

    async def _begin(self, request: Request) -> bool:
        """Tell whether a request with an idempotency key was answered before; others never were."""
        if not request.fingerprint:
            return False
        if (running := self._running.get(request.id)) is not None:
            if running == request.fingerprint:
                raise StillRunning("a request with this idempotency key is being answered: ask again in a moment")
            raise _reused()
        self._running[request.id] = request.fingerprint
        try:
            known = await self._fingerprint(request.id)
        except BaseException:
            del self._running[request.id]
            raise
        if known is None:
            return False
        if known != request.fingerprint:
            del self._running[request.id]
            raise _reused()
        return True

    async def _fingerprint(self, request_id: str) -> str | None:
        if request_id in self._unapplied:
            return self._unapplied[request_id].fingerprint
        with suppress(DatabaseDown):  # the ledger will count it once all the same
            return await self._ledger.fingerprint(request_id)
        return None

    async def _reserve(self, reservation: Reservation, embeddings: int) -> None:
        if reservation.is_repeated or not embeddings:
            return
        tier, now = reservation.key.user.tier, self._now()
        month = self._month(reservation.key.user.id, period_of(now))
        if (most := tier.monthly_embeddings) is not None:
            await self._know(month)
            if month.used + embeddings > most:
                left = max(0, most - month.used)
                raise InsufficientQuota(
                    f"{embeddings} embeddings are asked for, but {left} of the {most} of tier "
                    f"{tier.name!r} are left in {month.period}",
                    retry_after_seconds=end_of_period(now) - now,
                )
        month.reserved += embeddings
        reservation.held.append((month, embeddings))

    def _release(self, reservation: Reservation) -> None:
        for month, embeddings in reservation.held:
            month.reserved -= embeddings
        reservation.held.clear()

    def _month(self, user_id: int, period: str) -> _Month:
        if (month := self._months.get((user_id, period))) is None:
            self._months = {at: m for at, m in self._months.items() if m.period >= period or m.pending or m.reserved}
            month = self._months[user_id, period] = _Month(user_id, period)
        return month

    async def _know(self, month: _Month) -> None:
        """Ask the ledger about a month; only the first to ask waits."""
        self._look_up(month)
        if not month.is_known and month.refresh:
            await asyncio.shield(month.refresh)
        if not month.is_known:
            raise AuthUnavailable("how much is left of the quota cannot be found out at the moment: try again")

    def _look_up(self, month: _Month) -> None:
        """Have the ledger asked about a month that it was not asked about lately."""
        is_asked = month.refresh is not None and not month.refresh.done()
        if self._clock() - month.asked_at >= REFRESH_SECONDS and not is_asked:
            month.refresh = asyncio.create_task(self._refresh(month))

    async def _refresh(self, month: _Month) -> None:
        with suppress(DatabaseDown):
            async with self._ledger_turn:  # nothing is applied between the question and the answer
                month.base = await self._ledger.used(month.user_id, month.period)
                month.asked_at = self._clock()

    # Applying

    async def _keep_flushing(self) -> None:
        while True:
            try:
                await self.flush()
                await self._forget()
            except DatabaseDown:
                pass
            except Exception:
                log.exception("usage could not be brought to the ledger; it is kept, and tried again")
            await asyncio.sleep(FLUSH_SECONDS)

    async def _apply(self, entries: Sequence[UsageEntry]) -> None:
        async with self._ledger_turn:
            await self._ledger.apply(entries)
            for entry in entries:
                if self._unapplied.pop(entry.request_id, None):
                    month = self._month(entry.user_id, entry.period)
                    month.pending -= entry.embeddings
                    month.base += entry.embeddings

    async def _forget(self) -> None:
        if self._clock() >= self._forget_at:
            self._forget_at = self._clock() + FORGET_SECONDS
            await self._ledger.forget(self._now() - self._keep_seconds)


def _reused() -> KeyReused:
    return KeyReused("this idempotency key came with another request before: use a new one")


def new_request_id(now: float) -> str:
    """Make an id that is nobody else's; later ones sort behind earlier ones, which databases like."""
    return f"{int(now * 1000):012x}{secrets.token_hex(10)}"


def repeatable(key: ApiKey, idempotency_key: str, body: bytes) -> Request:
    """Name a request by the key that its user gave it."""
    name = hashlib.blake2b(idempotency_key.encode("utf-8", "surrogatepass"), digest_size=16, key=b"%d" % key.user.id)
    return Request(f"i{name.hexdigest()}", hashlib.blake2b(body, digest_size=16).hexdigest())


def spool_folder(data_dir: Path, database: str) -> Path:
    """Name the directory of what waits for one database: what is another's must not be applied to it."""
    return data_dir / "usage" / hashlib.blake2b(database.encode(), digest_size=8).hexdigest()
