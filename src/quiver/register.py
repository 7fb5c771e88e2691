"""The accounts of one server: nothing while calls need no key, else the database, and what is known of it.

    auth        at the start                                   while it serves
    ────────    ───────────────────────────────────────────    ──────────────────────────────────────────
    off         nothing is opened                              nothing
    required    the database is opened                         nothing more: calls need a key
    auto        opened if there is one, to see its keys        every two seconds a look for the first key

Once there is a key, calls need one until the server ends: removing the database opens no door.
"""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog

from quiver.config import AccountsConfig
from quiver.errors import AuthUnavailable, DatabaseDown, DatabaseError
from quiver.keyring import Keyring
from quiver.metering import Meter, spool_folder
from quiver.spool import Spool, SpoolCounts
from quiver.telemetry.observer import Figure

if TYPE_CHECKING:
    from quiver.db import Accounts, Database, Ledger

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Books:
    """What an operator reads and writes."""

    accounts: "Accounts"
    ledger: "Ledger"


LOOK_SECONDS = 2.0
"""How often a server without keys looks whether there is one: what is made closes it within five seconds."""


class Register:
    """Opened before the first request and closed after the last. Raises `DatabaseError`, `ConfigError` or `MissingExtra`."""

    def __init__(self, config: AccountsConfig, data_dir: Path, *, look_seconds: float = LOOK_SECONDS) -> None:
        self.needs_key = config.auth == "required"
        """Whether there is an account that a caller could have: it never becomes false again."""
        self._config = config
        self._data_dir = data_dir
        self._look_seconds = look_seconds
        self._database: Database | None = None
        self._keyring: Keyring | None = None
        self._meter: Meter | None = None
        self._ledger: Ledger | None = None
        self._fault = "keys cannot be checked yet: try again"
        self._looking: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._open = AsyncExitStack()

    @property
    def keyring(self) -> Keyring:
        """Who holds a key. Raises `AuthUnavailable` where that cannot be said."""
        if self._keyring is None:
            raise AuthUnavailable(self._fault)
        return self._keyring

    @property
    def meter(self) -> Meter:
        """What keys use. Raises `AuthUnavailable` where that cannot be said."""
        if self._meter is None:
            raise AuthUnavailable(self._fault)
        return self._meter

    @property
    def ledger(self) -> "Ledger":
        """What keys have used. Raises `AuthUnavailable` where that cannot be said."""
        if self._ledger is None:
            raise AuthUnavailable(self._fault)
        return self._ledger

    async def books(self) -> Books:
        """Open them for an operator, the database made where there is none. Raises `DatabaseDown`, `DatabaseError`."""
        database = await self._opened()
        from quiver import db  # noqa: PLC0415  see below

        return Books(db.Accounts(database), db.Ledger(database))

    def figures(self) -> Sequence[Figure]:
        """Tell what became of usage on its way to the ledger."""
        counts = self._meter.spool.counts if self._meter else SpoolCounts()
        unapplied = self._meter.num_unapplied if self._meter else 0
        lost = {"dropped": counts.dropped, "damaged": counts.damaged, "replayed": counts.replayed}
        return (
            Figure(
                "quiver_spool_entries", "Usage that went other ways than the usual one.", lost, "fate", counted=True
            ),
            Figure("quiver_unapplied_entries", "Requests that the ledger lacks.", {"": unapplied}),
        )

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opening:  # what fails half way is closed
            match self._config.auth:
                case "required":
                    await self._prepare(opening, self._config.database_wait_seconds)
                    await self._begin(opening)
                case "auto" if self.is_there:
                    database = await self._prepare(opening, self._config.database_wait_seconds)
                    if await _has_keys(database):
                        await self._begin(opening)
            self._open = opening.pop_all()
        if self._config.auth == "auto" and not self.needs_key:
            self._looking = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._looking:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self._open.aclose()

    @property
    def is_there(self) -> bool:
        """Whether there is a database to open: SQLite's own is made with the first key."""
        return self._database is not None or bool(self._config.database_url) or (self._data_dir / "quiver.db").exists()

    async def _prepare(self, opening: AsyncExitStack, wait_seconds: float | None = None) -> "Database":
        """Open the database and bring it to this version; without a time to wait, one that is away is `DatabaseDown`."""
        await asyncio.to_thread(_import_db)
        from quiver import db  # noqa: PLC0415  see above

        url = self._config.database_url.reveal() or db.sqlite_url(self._data_dir)
        database = await opening.enter_async_context(db.Database(url))
        if wait_seconds is None:
            await db.upgrade(database)
        else:
            await db.prepare(database, wait_seconds=wait_seconds)
        self._database = database
        return database

    async def _begin(self, opening: AsyncExitStack) -> None:
        """Let callers in by their keys, and nobody else."""
        from quiver import db  # noqa: PLC0415  see above

        assert self._database, "it is opened first"
        self.needs_key = True
        accounts, ledger = db.Accounts(self._database), db.Ledger(self._database)
        keyring = await asyncio.to_thread(Keyring, accounts.find_key)  # it hashes
        spool = Spool(spool_folder(self._data_dir, self._database.name))
        meter = Meter(ledger, spool, counts_cached=self._config.count_cached, keep_days=self._config.usage_days)
        self._keyring = await opening.enter_async_context(keyring)
        self._meter, self._ledger = await opening.enter_async_context(meter), ledger
        log.info("calls need a key", database=self._database.name)

    async def _look(self) -> None:
        """Look for the first key, until there is one."""
        while self._ledger is None:
            await asyncio.sleep(self._look_seconds)
            try:
                await self._look_once()
            except DatabaseDown:
                pass  # it is asked again
            except DatabaseError as error:
                self._fault, self.needs_key = error.message, True
                log.error("calls are refused", why=error.message)  # noqa: TRY400  no traceback: it is the operator's
                return
            except Exception:
                log.exception("nobody can say whether there is a key; that is tried again")

    async def _look_once(self) -> None:
        if not self.is_there:
            return
        if await _has_keys(await self._opened()):
            await self._begin(self._open)

    async def _opened(self) -> "Database":
        async with self._opening:
            if (database := self._database) is None:
                async with AsyncExitStack() as opening:  # one that cannot be used is closed, and tried again
                    database = await self._prepare(opening)
                    self._open.push_async_exit(opening.pop_all())
            return database


async def _has_keys(database: "Database") -> bool:
    from quiver import db  # noqa: PLC0415  see above

    return await db.Accounts(database).has_keys()


def _import_db() -> None:
    """Import SQLAlchemy off the event loop: that takes half a second, and a server without accounts does without it."""
