"""One database: how it is opened, asked and told, and what its failures are called. Knows no table."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from sqlite3 import OperationalError
from typing import Any, Self, TypeVar

from sqlalchemy import event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from quiver.errors import ConfigError, DatabaseDown, DatabaseError, MissingExtra, StorageFull

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]

READ_SECONDS = 1.0
"""How long a read may take: someone waits for it, but a machine under load must not pass for a database that is away."""
WRITE_SECONDS = 10.0
BEGIN_SECONDS, PAUSE_SECONDS = 0.5, 0.005
"""How long a connection to SQLite tries to begin, and how often."""
_CLOSE_SECONDS = 3.0
_CONNECTIONS = 5
_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}
_WRITES = "quiver_writes"
_FULL = re.compile(r"disk is full|disk I/O error|No space left|could not extend file")
_FAULTS = (DBAPIError, PoolTimeout, OSError, TimeoutError)


def sqlite_url(data_dir: Path) -> str:
    """Name the database that a server has where none is configured."""
    return f"sqlite:///{data_dir / 'quiver.db'}"


def file_of(url: str) -> Path | None:
    """Return the file that a database is in; None: it is in none. Raises `ConfigError`."""
    parsed = _parse(url)
    in_a_file = parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:")
    return Path(str(parsed.database)) if in_a_file else None


class Database:
    """Connections to one database. Every failure of it is a `DatabaseDown`; nothing waits longer than it may."""

    def __init__(self, url: str, *, read_seconds: float = READ_SECONDS, write_seconds: float = WRITE_SECONDS) -> None:
        parsed = _parse(url)
        self.name = _without_secrets(parsed)
        """What it may be called in an error or a log line."""
        self._read_seconds = read_seconds
        self._write_seconds = write_seconds
        self._engine = _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _postgres(parsed)
        self._reader = self._engine
        if self.dialect == "postgresql":  # spares every read two round trips
            self._reader = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._abandoned: set[asyncio.Task[Any]] = set()

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    async def read(self, work: Work[T]) -> T:
        """Ask something with one statement. Raises `DatabaseDown`."""
        return await self._bounded(self._reading(work), self._read_seconds)

    async def write(self, work: Work[T]) -> T:
        """Change something, wholly or not at all. Raises `DatabaseDown`, after which it may have happened or not."""
        return await self._bounded(self._writing(work), self._write_seconds)

    async def ping(self) -> None:
        """Prove that it answers. Raises `DatabaseDown`."""
        await self.read(lambda connection: connection.execute(text("SELECT 1")))

    async def close(self) -> None:
        """Give back the connections; of a database that is gone none waits for a goodbye."""
        closing = asyncio.ensure_future(self._close())
        if (await asyncio.wait({closing}, timeout=_CLOSE_SECONDS))[1]:
            self._abandon(closing)

    async def _close(self) -> None:
        if self._abandoned:
            await asyncio.wait(self._abandoned)
        await self._engine.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _reading(self, work: Work[T]) -> T:
        try:
            return await self._read_once(work)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
        return await self._read_once(work)  # the database was restarted: the pool has thrown away what it had

    async def _read_once(self, work: Work[T]) -> T:
        async with self._reader.connect() as connection:
            return await work(connection)

    async def _writing(self, work: Work[T]) -> T:
        async with self._engine.connect() as connection:
            await connection.execution_options(**{_WRITES: True})
            async with connection.begin():
                return await work(connection)

    async def _bounded(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """Wait for some work, but never for its cleaning up: a peer that is gone would hold up that, too."""
        task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
        except asyncio.CancelledError:
            # SQLite's statements end by themselves, and soon; a connection that is cut short would be lost.
            self._abandon(task, cancel=self.dialect != "sqlite")
            raise
        if not done:
            self._abandon(task)
            raise DatabaseDown(f"{self.name} did not answer within {seconds:g} s")
        return self._result(task)

    def _abandon(self, task: asyncio.Task[Any], *, cancel: bool = True) -> None:
        if cancel:
            task.cancel()
        self._abandoned.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._abandoned.discard(task)
        with suppress(asyncio.CancelledError):
            task.exception()

    def _result(self, task: asyncio.Task[T]) -> T:
        try:
            return task.result()
        except IntegrityError:
            raise
        except Exception as error:
            if not _is_fault(error):
                raise
            kind = StorageFull if _FULL.search(str(error)) else DatabaseDown
            raise kind(f"{self.name} failed: {_first_line(error)}") from error


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError("the database URL is none: it is like postgresql://user:password@host/name") from error
    if parsed.drivername not in _DRIVERS:
        raise ConfigError(f"the database URL begins with {parsed.drivername}: Quiver knows sqlite and postgresql")
    return parsed.set(drivername=_DRIVERS[parsed.drivername])


def _without_secrets(url: URL) -> str:
    """Leave out the password, and the query, where one may stand too."""
    name = url.set(drivername=url.get_backend_name(), query={})
    return name.set(password=None).render_as_string()


def _sqlite(url: URL) -> AsyncEngine:
    if url.database and url.database != ":memory:":
        try:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseError(f"{_without_secrets(url)} cannot be made: {error.strerror}") from error
    engine = create_async_engine(url, pool_size=_CONNECTIONS, max_overflow=0, connect_args={"isolation_level": None})
    event.listen(engine.sync_engine, "connect", _set_up_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    for pragma in ("busy_timeout = 5000", "synchronous = FULL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
    _write_ahead(connection)


def _write_ahead(connection: Any) -> None:
    """Keep a log: SQLite does not wait for another connection that begins to, or ends, at the same moment."""
    ends = time.monotonic() + BEGIN_SECONDS
    while True:
        cursor = connection.cursor()
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > ends:
                raise
        else:
            return
        finally:
            cursor.close()
        connection.run_async(lambda _: asyncio.sleep(PAUSE_SECONDS))


def _begin_sqlite(connection: Any) -> None:
    # A transaction that reads first and writes later is refused at once when another wrote between: take the lock first.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(_WRITES) else "BEGIN")


def _postgres(url: URL) -> AsyncEngine:
    query = dict(url.query)
    arguments: dict[str, Any] = {"timeout": 5.0, "server_settings": {"application_name": "quiver"}}
    if "sslmode" in query:  # libpq's word for what the driver calls ssl
        arguments["ssl"] = query.pop("sslmode")
    try:
        return create_async_engine(
            url.set(query=query),
            pool_size=_CONNECTIONS,
            max_overflow=0,
            pool_recycle=1800,
            connect_args=arguments,
        )
    except ModuleNotFoundError as error:
        raise MissingExtra("postgres", "a PostgreSQL database") from error


def _is_fault(error: Exception) -> bool:
    """Whether it is the database's; the driver's own errors come unwrapped while it connects."""
    return isinstance(error, _FAULTS) or type(error).__module__.partition(".")[0] in {"asyncpg", "sqlite3"}


def _first_line(error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {cause}".partition("\n")[0]
