"""Brings a database to the tables that this version of Quiver works with."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection

from quiver.db.database import Database
from quiver.db.tables import METADATA
from quiver.errors import DatabaseDown, DatabaseError

_SCRIPTS = Path(__file__).parent / "migrations"
_LOCK = 0x51756976
"""What servers that start at the same time on one PostgreSQL wait for."""

_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Status:
    """How far a database is."""

    version: str
    """The last migration that ran; empty: none, it has no tables."""
    missing: tuple[str, ...]
    """Migrations that this version of Quiver would run, in their order."""


async def prepare(database: Database, *, wait_seconds: float = 0.0) -> list[str]:
    """Upgrade the database of a server that starts, waiting a while for one that is not there yet.

    Raises `DatabaseError`.
    """
    end = time.monotonic() + wait_seconds
    while True:
        try:
            return await upgrade(database)
        except DatabaseDown as error:
            if (left := end - time.monotonic()) <= 0:
                raise DatabaseError(f"the server cannot start without its database: {error.message}") from error
        await asyncio.sleep(min(_RETRY_SECONDS, left))


async def upgrade(database: Database) -> list[str]:
    """Run every migration that is missing, all or none; returns their ids. Raises `DatabaseError` or `DatabaseDown`."""

    async def work(connection: AsyncConnection) -> list[str]:
        if database.dialect == "postgresql":
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        return await connection.run_sync(_upgrade, database.name)

    return await database.write(work)


async def status(database: Database) -> Status:
    """Tell how far the database is, and change nothing. Raises `DatabaseError` or `DatabaseDown`."""

    async def work(connection: AsyncConnection) -> Status:
        return await connection.run_sync(_status, database.name)

    return await database.read(work)


def _status(connection: Connection, name: str) -> Status:
    scripts = ScriptDirectory(str(_SCRIPTS))
    version = _version(connection, scripts, name)
    missing = [script.revision for script in scripts.iterate_revisions("head", version or "base")]
    return Status(version, tuple(reversed(missing)))


def _version(connection: Connection, scripts: ScriptDirectory, name: str) -> str:
    """Return the last migration that ran. Raises `DatabaseError` where it is none of ours."""
    known = {script.revision for script in scripts.walk_revisions()}
    before = set(MigrationContext.configure(connection).get_current_heads())
    if before - known:
        raise DatabaseError(
            f"{name} belongs to a newer version of Quiver (it has {', '.join(sorted(before - known))}, this one knows "
            f"up to {scripts.get_current_head()}): install that version, or restore a copy from before"
        )
    return max(before, default="")


def _upgrade(connection: Connection, name: str) -> list[str]:
    scripts = ScriptDirectory(str(_SCRIPTS))
    _version(connection, scripts, name)
    ran: list[str] = []
    options = {"fn": lambda rev, _: scripts._upgrade_revs("head", rev), "destination_rev": "head"}  # noqa: SLF001
    with EnvironmentContext(Config(), scripts, **options) as environment:
        environment.configure(
            connection=connection,
            target_metadata=METADATA,
            transaction_per_migration=False,
            on_version_apply=lambda *, step, **_: ran.append(step.up_revision_id),
        )
        environment.run_migrations()
    return ran
