"""What was used, in the database: rows that count once, and sums that change with them or not at all."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from quiver.accounts import UsageEntry, UsageTotal
from quiver.db.database import Database
from quiver.db.tables import TOTALS, USAGE, USERS

_COUNTS = ("requests", "embeddings", "cached", "tokens")
_OF_ONE = ("user_id", "period", "key_id", "model")


class Ledger:
    """Adds to what was used, and sums it up."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._insert = (postgresql if database.dialect == "postgresql" else sqlite).insert

    async def apply(self, entries: Sequence[UsageEntry]) -> int:
        """Add what was not there yet, and return how much that was: applying an entry again changes nothing."""

        async def work(connection: AsyncConnection) -> int:
            once = {entry.request_id: entry for entry in entries}
            rows = [_row(once[request_id]) for request_id in sorted(once)]  # see `_sums`
            insert = self._insert(USAGE).on_conflict_do_nothing().returning(USAGE.c.request_id)
            new = {row[0] for row in await connection.execute(insert, rows)}
            for total in _sums([once[request_id] for request_id in new]):
                await connection.execute(self._add(total))
            return len(new)

        return await self._database.write(work) if entries else 0

    async def used(self, user_id: int, period: str) -> int:
        """Return how many embeddings count towards a user's month."""
        query = select(func.coalesce(func.sum(TOTALS.c.embeddings), 0)).where(
            TOTALS.c.user_id == user_id, TOTALS.c.period == period
        )

        async def work(connection: AsyncConnection) -> int:
            return int((await connection.execute(query)).scalar_one())

        return await self._database.read(work)

    async def fingerprint(self, request_id: str) -> str | None:
        """Return what a request's body was, if it was answered before."""
        query = select(USAGE.c.fingerprint).where(USAGE.c.request_id == request_id)

        async def work(connection: AsyncConnection) -> str | None:
            found: str | None = (await connection.execute(query)).scalar_one_or_none()
            return found

        return await self._database.read(work)

    async def totals(self, *, email: str | None = None, period: str | None = None) -> list[UsageTotal]:
        """Sum up by month, user, key and model, the newest month first."""
        columns = (TOTALS.c.period, USERS.c.email, TOTALS.c.key_id, TOTALS.c.model)
        query = select(*columns, *(TOTALS.c[name] for name in _COUNTS)).join(USERS, USERS.c.id == TOTALS.c.user_id)
        query = query.where(USERS.c.email == email) if email else query
        query = query.where(TOTALS.c.period == period) if period else query
        query = query.order_by(TOTALS.c.period.desc(), *columns[1:])

        async def work(connection: AsyncConnection) -> list[UsageTotal]:
            return [UsageTotal(**row) for row in (await connection.execute(query)).mappings()]

        return await self._database.read(work)

    async def forget(self, before: float) -> int:
        """Remove the rows of requests before a time; their sums stay. What is replayed must be younger."""

        async def work(connection: AsyncConnection) -> int:
            return (await connection.execute(delete(USAGE).where(USAGE.c.created_at < before))).rowcount

        return await self._database.write(work)

    def _add(self, total: dict[str, Any]) -> Any:
        insert = self._insert(TOTALS).values(total)
        more = {name: TOTALS.c[name] + insert.excluded[name] for name in _COUNTS}
        return insert.on_conflict_do_update(index_elements=list(_OF_ONE), set_=more)


def _row(entry: UsageEntry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in USAGE.c.keys()}  # noqa: SIM118  a collection of columns is no dict


def _sums(entries: Sequence[UsageEntry]) -> list[dict[str, Any]]:
    """Sum up entries for each row of the totals. Rows are told in one order everywhere: no two servers lock each other out."""
    sums: dict[tuple[Any, ...], list[int]] = {}
    for entry in entries:
        counts = sums.setdefault(tuple(getattr(entry, name) for name in _OF_ONE), [0] * len(_COUNTS))
        for i, more in enumerate((entry.requests, entry.embeddings, entry.cached, entry.tokens)):
            counts[i] += more
    names = (*_OF_ONE, *_COUNTS)
    return [dict(zip(names, (*one, *counts), strict=True)) for one, counts in sorted(sums.items())]
