"""Users, tiers, keys and usage, the same over SQLite and a real PostgreSQL."""

import asyncio
import contextlib
import itertools
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, text

from fault_proxy import FAULTS, Fault, FaultProxy
from quiver import db
from quiver.accounts import FIRST_TIERS, ApiKey, Rate, Tier, UsageEntry, User
from quiver.db import Accounts, Database, Ledger
from quiver.db.tables import METADATA, TOTALS, USAGE
from quiver.errors import ConfigError, DatabaseDown, DatabaseError, InvalidInput, MissingExtra, UnknownAccount
from stores import database_url, opened, postgres

JULY = 1_782_950_400.0  # 2026-07-02
KINDS = ("sqlite", "postgresql")
COUNTS = ("embeddings", "cached", "tokens")


@pytest.fixture(params=KINDS)
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """Name an empty database of each kind."""
    async with database_url(request.param, tmp_path) as url:
        yield url


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """Open a database of each kind, with its tables."""
    async with opened(url) as database:
        yield database


def key_of(user: User, key_id: str = "a" * 12, **facts: object) -> ApiKey:
    """Make a key that nobody can present."""
    return ApiKey(id=key_id, prefix="qv", hash="x" * 60, user=user, created_at=JULY, **facts)


def entry(request_id: str, **facts: object) -> UsageEntry:
    """Make an entry of the first user's."""
    usual = {"user_id": 1, "key_id": "a" * 12, "model": "m", "embeddings": 1, "created_at": JULY}
    return UsageEntry(request_id=request_id, **{**usual, **facts})


async def sums_and_rows(database: Database) -> tuple[Counter[str], Counter[str]]:
    """Add up both tables of usage."""
    totals = select(*(func.sum(TOTALS.c[name]).label(name) for name in ("requests", *COUNTS)))
    rows = select(func.count().label("requests"), *(func.sum(USAGE.c[name]).label(name) for name in COUNTS))

    async def ask(query):
        (found,) = (await database.read(lambda connection: connection.execute(query))).mappings()
        return Counter({name: int(count or 0) for name, count in found.items()})

    return await ask(totals), await ask(rows)


# Opening


async def test_the_migrations_make_the_tables(database):
    """After every migration nothing differs from what the code works with."""

    async def work(connection):
        return await connection.run_sync(lambda c: compare_metadata(MigrationContext.configure(c), METADATA))

    assert await database.write(work) == []


async def test_a_second_upgrade_changes_nothing(url):
    """Whatever ran is not run again, by this process or one that starts with it."""
    async with Database(url) as one, Database(url) as other:
        ran = await asyncio.gather(db.upgrade(one), db.upgrade(other), db.upgrade(one))
    assert sorted(map(len, ran)) == [0, 0, 3]


async def test_a_newer_database_is_refused(database):
    """A server does not touch tables that it does not know, and says why."""
    await database.write(lambda c: c.execute(text("UPDATE alembic_version SET version_num = '9999'")))

    with pytest.raises(DatabaseError, match=r"newer version of Quiver \(it has 9999, this one knows up to \d{4}\)"):
        await db.upgrade(database)


async def test_an_unreachable_database_is_named_without_its_password():
    """The operator reads where it should be, and nobody reads the password."""
    url = "postgresql://quiver:s3cret@127.0.0.1:1/name?password=s3cret"
    async with Database(url) as database:
        with pytest.raises(DatabaseDown) as caught:
            await database.ping()
    assert "postgresql://quiver:***@127.0.0.1:1/name" in caught.value.message
    assert "s3cret" not in f"{caught.value!r}{database.name}"


async def test_a_server_waits_for_its_database_if_told_so():
    """One that comes up late is found; without patience, or beyond it, the start fails and names it."""
    async with postgres() as url, FaultProxy("127.0.0.1", url.port or 5432) as proxy:
        await proxy.break_down(Fault.REFUSE)
        through = url.set(host="127.0.0.1", port=proxy.listens_at).render_as_string(hide_password=False)
        async with Database(through) as database:
            for patience in (0.0, 0.2):
                with pytest.raises(DatabaseError, match=r"cannot start without its database: postgresql://"):
                    await db.prepare(database, wait_seconds=patience)
            starting = asyncio.create_task(db.prepare(database, wait_seconds=10))
            await asyncio.sleep(0.2)
            await proxy.break_down(Fault.NONE)
            assert await starting == ["0001", "0002", "0003"]


@pytest.mark.parametrize("url", ["mysql://host/name", "no url", ""])
def test_a_url_that_means_nothing_is_refused(url):
    """What cannot be a database is said at the start."""
    with pytest.raises(ConfigError, match="database URL"):
        Database(url)


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    """PostgreSQL is an extra, missed only by who uses it."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(MissingExtra, match=r"pip install 'quiver\[postgres\]'"):
        Database("postgresql://host/name")


async def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    """A file in the way of the data directory is a mistake of the operator's."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DatabaseError, match="cannot be made"):
        Database(db.sqlite_url(tmp_path / "file" / "below"))


async def test_sqlite_lets_readers_and_a_writer_work_at_once(tmp_path):
    """A long write holds up no reader, and the next writer waits for it."""
    async with opened(db.sqlite_url(tmp_path)) as database:
        accounts, begun = Accounts(database), asyncio.Event()

        async def write_slowly(connection):
            await connection.execute(text("UPDATE tiers SET burst = 99"))
            begun.set()
            await asyncio.sleep(0.3)

        writing = asyncio.create_task(database.write(write_slowly))
        await begun.wait()
        during = await accounts.tiers()
        await accounts.set_tier(Tier("own"))
        await writing
        assert during == list(FIRST_TIERS)
        assert [tier.name for tier in await accounts.tiers()] == ["free", "own", "pro", "scale"]


# Accounts


async def test_a_new_database_has_the_tiers(database):
    """They are those of the price list."""
    assert await Accounts(database).tiers() == list(FIRST_TIERS)


@pytest.mark.parametrize("tier", [Tier("pro", 5, Rate(1.5, 2)), Tier("pro"), Tier("own", None, Rate(3, 3))])
async def test_a_tier_is_added_or_changed(database, tier):
    """What was set is read back."""
    accounts = Accounts(database)
    await accounts.set_tier(tier)
    assert tier in await accounts.tiers()


async def test_a_user_has_one_row_and_one_tier(database):
    """An address is one user, however it is written, and can move to another tier."""
    accounts = Accounts(database)
    first = await accounts.set_user("Ann@Example.com ", "free", now=JULY)
    second = await accounts.set_user("ann@example.com", "scale", now=JULY + 1)
    assert (first.id, first.email, first.tier.name) == (second.id, "ann@example.com", "free")
    assert await accounts.users() == [second]
    assert (second.tier.name, second.created_at) == ("scale", JULY)


async def test_what_is_not_there_is_said(database):
    """A user, tier or key that there is not has an error that names it."""
    accounts = Accounts(database)
    with pytest.raises(UnknownAccount, match=r"no tier 'gold' \(there are: free, pro, scale"):
        await accounts.set_user("a@b.c", "gold", now=JULY)
    with pytest.raises(UnknownAccount, match=r"no user 'a@b\.c'"):
        await accounts.user("a@b.c")
    with pytest.raises(UnknownAccount, match="no key 'nobody'"):
        await accounts.revoke("nobody", now=JULY)
    assert await accounts.find_key("nobody") is None


@pytest.mark.parametrize("email", ["", "a", "@b", "a@", "a b@c.d", "x" * 320 + "@b.c"])
async def test_what_is_no_address_is_refused(database, email):
    """Nobody could be found by it."""
    with pytest.raises(InvalidInput, match="no e-mail address"):
        await Accounts(database).set_user(email, "free", now=JULY)


async def test_a_key_is_kept_with_its_user_and_tier(database):
    """What was added is found, listed, and counts as a key."""
    accounts = Accounts(database)
    ann = await accounts.set_user("ann@b.c", "pro", now=JULY)
    bob = await accounts.set_user("bob@b.c", "free", now=JULY)
    assert not await accounts.has_keys()

    keys = [
        key_of(ann, "a" * 12, name="laptop", scopes=frozenset({"embed", "admin"}), expires_at=JULY + 9.5),
        key_of(bob, "b" * 12),
    ]
    for key in keys:
        await accounts.add_key(key)

    assert await accounts.has_keys()
    assert [await accounts.find_key(key.id) for key in keys] == keys
    assert await accounts.keys() == keys
    assert await accounts.keys("bob@b.c") == keys[1:]


async def test_a_change_of_tier_reaches_the_keys(database):
    """A key has no limits of its own."""
    accounts = Accounts(database)
    ann = await accounts.set_user("ann@b.c", "free", now=JULY)
    await accounts.add_key(key_of(ann))
    await accounts.set_tier(Tier("free", 7))
    assert (await accounts.find_key("a" * 12)).user.tier == Tier("free", 7)


async def test_a_key_ends_once(database):
    """Revoking it again does not move the time, and an end is never put off."""
    accounts = Accounts(database)
    await accounts.add_key(key_of(await accounts.set_user("ann@b.c", "free", now=JULY)))
    for at in (JULY + 5, JULY + 3, JULY + 8):
        await accounts.expire("a" * 12, at=at)
        await accounts.revoke("a" * 12, now=at)
    found = await accounts.find_key("a" * 12)
    assert (found.expires_at, found.revoked_at) == (JULY + 3, JULY + 5)


# Usage


async def test_an_entry_counts_once(database):
    """However often it comes, with others or twice in one batch, rows and sums have it once."""
    ledger = Ledger(database)
    first, second = entry("1", tokens=3), entry("2", embeddings=5, cached=2)

    applied = [await ledger.apply(batch) for batch in ([first], [first, second, second], [second, first], [])]

    assert applied == [1, 1, 0, 0]
    assert await ledger.used(1, "2026-07") == 6
    sums, rows = await sums_and_rows(database)
    assert sums == rows == Counter(requests=2, embeddings=6, cached=2, tokens=3)


async def test_usage_is_summed_by_month_key_and_model(database):
    """Each month, key and model has its own sum, and the newest month stands first."""
    ledger = Ledger(database)
    for email in ("ann@b.c", "bob@b.c"):
        await Accounts(database).set_user(email, "free", now=JULY)
    august = JULY + 31 * 86400
    facts = itertools.product((1, 2), (JULY, august), ("m", "n"))
    await ledger.apply(
        [entry(str(i), user_id=u, created_at=t, model=m, tokens=10 * i) for i, (u, t, m) in enumerate(facts)]
    )

    totals = await ledger.totals(email="ann@b.c")

    assert [(t.period, t.model, t.tokens) for t in totals] == [
        ("2026-08", "m", 20),
        ("2026-08", "n", 30),
        ("2026-07", "m", 0),
        ("2026-07", "n", 10),
    ]
    assert len(await ledger.totals()) == 8
    assert {t.email for t in await ledger.totals(period="2026-08")} == {"ann@b.c", "bob@b.c"}
    assert await ledger.used(2, "2026-08") == 2
    assert await ledger.used(3, "2026-08") == 0


async def test_forgotten_rows_leave_their_sums(database):
    """Old requests go, and what was used stays."""
    ledger = Ledger(database)
    await ledger.apply([entry("old", fingerprint="f"), entry("new", created_at=JULY + 10)])
    assert await ledger.fingerprint("old") == "f"
    assert await ledger.forget(JULY + 5) == 1
    assert await ledger.fingerprint("old") is None
    assert await ledger.fingerprint("new") == ""
    assert await ledger.used(1, "2026-07") == 2


async def test_many_writers_lose_nothing(url):
    """Servers that apply the same entries in opposite orders end with every entry once, and none waits for ever."""
    async with opened(url) as one, Database(url) as other:
        for round_ in range(4):  # the first opens the connections, one after the other: none meets another
            entries = [entry(f"{round_}-{i}", user_id=i % 3, model=f"m{i % 5}", tokens=i) for i in range(300)]
            ledgers, orders = (Ledger(one), Ledger(other)), (entries, entries[::-1]) * 2
            applied = await asyncio.gather(*(ledger.apply(order) for order in orders for ledger in ledgers))
            assert sum(applied) == 300
        sums, rows = await sums_and_rows(one)
    assert sums == rows
    assert (rows["requests"], rows["tokens"]) == (1200, 4 * sum(range(300)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(st.integers(0, 12), max_size=6), max_size=8))
def test_the_ledger_is_the_set_of_its_entries(tmp_path_factory, batches):
    """Whatever is applied in whatever batches, the sums are those of the distinct entries."""

    async def check():
        async with opened(db.sqlite_url(tmp_path_factory.mktemp("db"))) as database:
            for batch in batches:
                await Ledger(database).apply([entry(str(i), user_id=i % 2, tokens=2**i) for i in batch])
            return await sums_and_rows(database)

    sums, rows = asyncio.run(check())
    assert sums == rows
    assert rows["tokens"] == sum(2**i for i in set(itertools.chain(*batches)))


# Trouble


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_broken_postgres_is_said_in_time_and_comes_back(fault):
    """Whatever is wrong with it, a read fails as what it is within its time, and works once the fault is gone."""
    async with postgres() as url, FaultProxy("127.0.0.1", url.port or 5432) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.listens_at).render_as_string(hide_password=False)
        async with opened(through, read_seconds=0.3) as database:
            accounts = Accounts(database)
            await proxy.break_down(fault)
            for _ in range(12):  # more than the pool has connections
                start = time.perf_counter()
                with pytest.raises(DatabaseDown):
                    await accounts.tiers()
                assert time.perf_counter() - start < 0.6
            await proxy.break_down(Fault.NONE)
            assert await recovered(accounts) == list(FIRST_TIERS)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_broken_postgres_holds_up_no_end(fault):
    """A server that stops gives up on its database within seconds, whether or not it was asked meanwhile."""
    async with postgres() as url, FaultProxy("127.0.0.1", url.port or 5432) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.listens_at).render_as_string(hide_password=False)
        for is_asked in (False, True):
            database = Database(through, read_seconds=0.3)
            await asyncio.gather(*(database.ping() for _ in range(3)))
            await proxy.break_down(fault)
            if is_asked:
                with pytest.raises(DatabaseDown):
                    await database.ping()
            async with asyncio.timeout(4):
                await database.close()
            await proxy.break_down(Fault.NONE)


async def recovered(accounts: Accounts, *, within_seconds: float = 5.0) -> list[Tier]:
    """Ask until there is an answer."""
    end = time.perf_counter() + within_seconds
    while True:
        try:
            return await accounts.tiers()
        except DatabaseDown:
            if time.perf_counter() > end:
                raise
            await asyncio.sleep(0.05)


async def test_a_restarted_postgres_costs_no_read():
    """Connections that died while nobody looked are replaced within the read that finds out."""
    async with postgres() as url, opened(url.render_as_string(hide_password=False)) as database:
        accounts = Accounts(database)
        await asyncio.gather(*(accounts.tiers() for _ in range(5)))
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        async with Database(url.render_as_string(hide_password=False)) as other:
            await other.read(lambda c: c.execute(text(ended)))
        assert await accounts.tiers() == list(FIRST_TIERS)


async def test_a_connection_that_begins_waits_for_a_writer(tmp_path):
    """SQLite refuses at once to keep a log beside a writer that keeps none: two servers may start at the same moment."""
    with contextlib.closing(sqlite3.connect(tmp_path / "quiver.db", isolation_level=None)) as writer:
        writer.execute("CREATE TABLE a (b)")
        writer.execute("BEGIN IMMEDIATE")
        async with Database(db.sqlite_url(tmp_path)) as database:
            asking = asyncio.create_task(database.ping())
            await asyncio.sleep(0.1)
            assert not asking.done()
            writer.execute("COMMIT")
            await asking


async def test_a_locked_sqlite_is_down_and_nothing_is_lost(tmp_path):
    """A writer that cannot get its turn is told so, and what it wanted is neither half done nor done later."""
    url = db.sqlite_url(tmp_path)
    async with opened(url) as holder, Database(url, write_seconds=0.3) as database:
        held, let_go = asyncio.Event(), asyncio.Event()

        async def hold(_):
            held.set()
            await let_go.wait()

        holding = asyncio.create_task(holder.write(hold))
        await held.wait()
        with pytest.raises(DatabaseDown):
            await Ledger(database).apply([entry("1")])
        let_go.set()
        await holding
        await asyncio.sleep(0.3)
        assert await Ledger(holder).apply([entry("1")]) == 1
