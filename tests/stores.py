"""Real stores for tests: a database of its own in SQLite and PostgreSQL for each test, and keys of its own in Redis.

`TEST_POSTGRES_URL` and `TEST_REDIS_URL` name them where they are not as `make services-up` starts them. Where they are missing
a test is skipped, but never in continuous integration (`CI` is set there): it fails.
"""

import contextlib
import os
import secrets
import statistics
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import asyncpg
import pytest
import redis.asyncio as redis
from sqlalchemy.engine import URL, make_url

from quiver import db
from quiver.db import Database

POSTGRES = os.environ.get("TEST_POSTGRES_URL", "postgresql://postgres:quiver@127.0.0.1:5432/postgres")
REDIS = os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379/0")


def missing(store: str, url: str, error: Exception) -> None:
    """Skip a test for want of a store, or fail where there must be one."""
    reason = f"no {store} at {url} ({type(error).__name__}): `make services-up` starts one"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.asynccontextmanager
async def postgres() -> AsyncIterator[URL]:
    """Make an empty database in PostgreSQL, and remove it afterwards."""
    name = f"quiver_test_{secrets.token_hex(6)}"
    try:
        admin = await asyncpg.connect(POSTGRES, timeout=5)
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        missing("PostgreSQL", POSTGRES, error)
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        yield make_url(POSTGRES).set(database=name)
    finally:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.close()


@contextlib.asynccontextmanager
async def database_url(kind: str, folder: Path) -> AsyncIterator[str]:
    """Name an empty database of a kind."""
    if kind == "sqlite":
        yield db.sqlite_url(folder)
        return
    async with postgres() as url:
        yield url.render_as_string(hide_password=False)


@contextlib.asynccontextmanager
async def opened(url: str, **options: float) -> AsyncIterator[Database]:
    """Open a database with its tables; however short its time limits are, those are made in peace."""
    async with Database(url) as patient:
        await db.upgrade(patient)
    async with Database(url, **options) as database:
        yield database


@contextlib.asynccontextmanager
async def redis_prefix() -> AsyncIterator[str]:
    """Name the beginning of this test's keys in Redis, and remove them afterwards."""
    prefix = f"quiver-test-{secrets.token_hex(6)}:"
    client = redis.Redis.from_url(REDIS)
    try:
        await client.ping()
    except (TimeoutError, redis.RedisError, OSError) as error:
        await client.aclose()
        missing("Redis", REDIS, error)
    try:
        yield prefix
    finally:
        if left := [key async for key in client.scan_iter(f"{prefix}*", count=1000)]:
            await client.delete(*left)
        await client.aclose()


def added(before: Sequence[float], during: Sequence[float]) -> float:
    """Return by how much the slowest of a hundred is slower than it was before (p99), whatever else the machine does."""
    return statistics.quantiles(during, n=100)[98] - statistics.quantiles(before, n=100)[98]
