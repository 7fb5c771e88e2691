"""The database that accounts are in: how every command of theirs opens it, and the commands that look after it.

SQLAlchemy is imported when one of them runs: no other command waits for it.
"""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from quiver.cli_settings import Command, run_async, with_settings
from quiver.cli_values import say
from quiver.config import Config
from quiver.errors import DatabaseDown, DatabaseError

if TYPE_CHECKING:
    from quiver.db import Accounts, Database

T = TypeVar("T")

database = typer.Typer(no_args_is_help=True, help="Look after the database that accounts are in.")

WHERE = ("database_url", "data_dir")
"""Settings that say which database is meant."""
PATIENCE_SECONDS = 30.0
"""A person waits longer for a database than a request may."""
MIGRATION_SECONDS = 3600.0


@database.command("upgrade", cls=Command)
@with_settings(*WHERE)
def upgrade_database(*, settings: Config) -> None:
    """Make the database, or bring it to this version's tables; a server that starts does it, too."""
    run_async(_upgrade(settings))


async def _upgrade(settings: Config) -> None:
    from quiver import db  # noqa: PLC0415  late, as the head of this file says

    async with _database(settings, seconds=MIGRATION_SECONDS) as opened:
        ran = await db.upgrade(opened)
        version = (await db.status(opened)).version
    typer.echo(f"{opened.name} is at {version}: " + (f"ran {', '.join(ran)}" if ran else "nothing was missing"))


@database.command("status", cls=Command)
@with_settings(*WHERE)
def status_of_database(*, settings: Config) -> None:
    """Say which database it is and how far, changing nothing; the exit code is 1 where `upgrade` has something to do."""
    if not run_async(_status(settings)):
        raise typer.Exit(1)


async def _status(settings: Config) -> bool:
    from quiver import db  # noqa: PLC0415  late, as the head of this file says

    _refuse_missing_file(settings)
    async with _database(settings) as opened:
        found = await db.status(opened)
    missing = f"missing {', '.join(found.missing)}" if found.missing else "nothing is missing"
    typer.echo(f"{opened.name} is at {found.version or 'nothing'}: {missing}")
    return not found.missing


async def with_accounts(
    settings: Config, work: Callable[["Accounts"], Coroutine[Any, Any, T]], *, make: bool = False
) -> T:
    """Do something with the accounts, and return what it returns."""
    async with accounts_of(settings, make=make) as accounts:
        return await work(accounts)


@asynccontextmanager
async def accounts_of(settings: Config, *, make: bool = False) -> AsyncIterator["Accounts"]:
    """Open the accounts, as `opened_database` does."""
    from quiver.db import Accounts  # noqa: PLC0415  late, as the head of this file says

    async with opened_database(settings, make=make) as opened:
        yield Accounts(opened)


@asynccontextmanager
async def opened_database(settings: Config, *, make: bool = False) -> AsyncIterator["Database"]:
    """Open the database with its tables: made if they are not there, or else refused. Raises `DatabaseError`."""
    from quiver import db  # noqa: PLC0415  late, as the head of this file says

    if not make:
        _refuse_missing_file(settings)
    async with _database(settings) as opened:
        if make and (ran := await db.upgrade(opened)):
            say(f"{opened.name}: ran {', '.join(ran)}.")
        if missing := (await db.status(opened)).missing:
            raise DatabaseError(f"{opened.name} lacks {', '.join(missing)}: run `quiver db upgrade`")
        yield opened


@asynccontextmanager
async def _database(settings: Config, *, seconds: float = PATIENCE_SECONDS) -> AsyncIterator["Database"]:
    """Open the database as it is. Raises `DatabaseError` whenever it fails."""
    from quiver import db  # noqa: PLC0415  late, as the head of this file says

    async with db.Database(_url(settings), read_seconds=seconds, write_seconds=seconds) as opened:
        try:
            yield opened
        except DatabaseDown as error:
            raise DatabaseError(f"{error.message}; is it running, and is database_url right?") from error


def _refuse_missing_file(settings: Config) -> None:
    """Keep a command that only asks from making a database. Raises `DatabaseError`."""
    from quiver import db  # noqa: PLC0415  late, as the head of this file says

    file = db.file_of(_url(settings))
    if file and not file.exists():
        raise DatabaseError(f"there is no database {file} yet: `quiver keys create` or `quiver db upgrade` makes it")


def _url(settings: Config) -> str:
    from quiver import db  # noqa: PLC0415  late, as the head of this file says

    return settings.accounts.database_url.reveal() or db.sqlite_url(settings.models.data_dir)
