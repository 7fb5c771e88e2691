"""Reserved before, settled after, in the ledger exactly once: whatever becomes of the database, the disk or the process."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select

from fakes import FakeClock
from fault_proxy import FAULTS, Fault, FaultProxy
from quiver import db, metering, spool
from quiver.accounts import ApiKey, Tier, UsageEntry, User, end_of_period, period_of
from quiver.db import Accounts, Database, Ledger
from quiver.db.tables import USAGE
from quiver.errors import AuthUnavailable, DatabaseDown, InsufficientQuota, KeyReused, StillRunning
from quiver.metering import Meter, repeatable, spool_folder
from quiver.spool import Spool
from stores import database_url, opened, postgres

JULY = 1_782_950_400.0  # 2026-07-02
BODY = b'{"input": "text"}'


def key_of(monthly: int | None = 100, user_id: int = 1) -> ApiKey:
    """Make a key whose user may have so much in a month."""
    user = User(user_id, f"user{user_id}@b.c", Tier("own", monthly))
    return ApiKey(id=f"{user_id:012}", prefix="qv", hash="", user=user)


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """Open a database of each kind."""
    async with database_url(request.param, tmp_path) as url, opened(url) as database:
        yield database


@pytest.fixture
async def lite(tmp_path: Path) -> AsyncIterator[Database]:
    """Open a SQLite database."""
    async with opened(db.sqlite_url(tmp_path)) as database:
        yield database


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that stands in July."""
    return FakeClock(JULY)


def metered(database: Database, tmp_path: Path, clock: FakeClock, **options: object) -> Meter:
    """Make a meter that flushes when it is told to and when it is closed."""
    return Meter(Ledger(database), Spool(tmp_path / "usage"), now=clock, clock=clock, **options)


async def use(meter: Meter, key: ApiKey, embeddings: int = 1, **request: object) -> bool:
    """Answer one request; tells whether it is on disk."""
    async with meter.reservation(key, embeddings, **request) as reservation:
        saved = meter.settle(reservation, model="m", cached=0, tokens=10 * embeddings)
    return await saved


async def rows(database: Database) -> dict[str, UsageEntry]:
    """Return the rows of the ledger by their id."""
    found = await database.read(lambda connection: connection.execute(select(USAGE)))
    return {row["request_id"]: UsageEntry(**row) for row in found.mappings()}


# Reserving and settling


async def test_a_request_is_reserved_settled_and_in_the_ledger(database, tmp_path, clock):
    """What it was worth is counted for its user, key, model and month."""
    meter = metered(database, tmp_path, clock)
    async with meter.reservation(key_of(), 3) as reservation:
        assert await meter.settle(reservation, model="m", cached=2, tokens=30)
    await meter.flush()
    (entry,) = (await rows(database)).values()
    assert (entry.user_id, entry.key_id, entry.model) == (1, key_of().id, "m")
    assert (entry.embeddings, entry.cached, entry.tokens, entry.created_at) == (3, 2, 30, JULY)
    assert await Ledger(database).used(1, "2026-07") == 3
    assert meter.num_unapplied == 0
    await meter.close()


async def test_what_is_not_answered_costs_nothing(lite, tmp_path, clock):
    """A request that fails, or whose client goes, gives back what was held for it."""
    meter, key = metered(lite, tmp_path, clock), key_of(5)
    with pytest.raises(ValueError, match="it failed"):
        async with meter.reservation(key, 5):
            raise ValueError("it failed")
    assert await use(meter, key, 5)
    await meter.close()
    assert len(await rows(lite)) == 1


async def test_cached_inputs_are_free_where_it_is_so_configured(lite, tmp_path, clock):
    """They are counted as cached all the same."""
    meter = metered(lite, tmp_path, clock, counts_cached=False)
    async with meter.reservation(key_of(3), 3) as reservation:
        meter.settle(reservation, model="m", cached=2, tokens=30)
    assert await use(meter, key_of(3), 2)
    await meter.close()
    assert await Ledger(lite).used(1, "2026-07") == 3


async def test_a_quota_is_never_exceeded(database, tmp_path, clock):
    """Of many requests at once, flushed and refreshed meanwhile, exactly as many as fit are let through."""
    meter, key, refused = metered(database, tmp_path, clock), key_of(100), 0

    async def ask(embeddings: int) -> int:
        nonlocal refused
        try:
            async with meter.reservation(key, embeddings) as reservation:
                await asyncio.sleep(embeddings / 100)
                meter.settle(reservation, model="m", cached=0, tokens=1)
        except InsufficientQuota:
            refused += 1
            return 0
        return embeddings

    async def trouble() -> None:
        while True:
            await meter.flush()
            clock.pass_by(metering.REFRESH_SECONDS)
            await asyncio.sleep(0.002)

    troubling = asyncio.create_task(trouble())
    let_through = sum(await asyncio.gather(*(ask(1 + i % 3) for i in range(120))))
    troubling.cancel()
    await asyncio.gather(troubling, return_exceptions=True)
    await meter.close()
    assert 98 <= let_through <= 100
    assert refused > 0
    assert await Ledger(database).used(1, "2026-07") == let_through


async def test_who_is_over_is_told_until_when(lite, tmp_path, clock):
    """The error says how much is left and when the month is over; then it begins anew."""
    meter, key = metered(lite, tmp_path, clock), key_of(10)
    await use(meter, key, 8)
    with pytest.raises(InsufficientQuota, match=r"3 embeddings are asked for, but 2 of the 10 of tier 'own'") as caught:
        await use(meter, key, 3)
    assert JULY + caught.value.retry_after_seconds == end_of_period(JULY)
    clock.pass_by(caught.value.retry_after_seconds)
    assert period_of(clock()) == "2026-08"
    assert await use(meter, key, 10)
    await meter.close()


async def test_users_have_quotas_and_keys_share_them(lite, tmp_path, clock):
    """Two keys of one user have one month together, and another user another."""
    meter, key = metered(lite, tmp_path, clock), key_of(5)
    other_key = ApiKey(id="b" * 12, prefix="qv", hash="", user=key.user)
    await use(meter, key, 3)
    with pytest.raises(InsufficientQuota):
        await use(meter, other_key, 3)
    assert await use(meter, key_of(5, user_id=2), 5)
    assert await use(meter, key_of(None, user_id=3), 10**9)
    await meter.close()


async def test_servers_see_each_other_s_usage(database, tmp_path, clock):
    """What another server brought to the ledger counts here, a few seconds later at most."""
    one, other = (metered(database, tmp_path / name, clock) for name in "ab")
    key = key_of(10)
    assert await use(one, key, 2)
    assert await use(other, key, 7)
    await other.flush()
    clock.pass_by(metering.REFRESH_SECONDS)
    assert await use(one, key, 1)  # asks, and does not wait for the answer
    await asyncio.sleep(0.3)
    with pytest.raises(InsufficientQuota):
        await use(one, key, 1)
    await one.close()
    await other.close()
    assert await Ledger(database).used(1, "2026-07") == 10


async def test_the_first_question_needs_an_answer(tmp_path, clock):
    """Where nobody ever said what is left, a request is told to come back; one without a quota is answered."""
    async with Database("postgresql://nobody@127.0.0.1:1/none") as database:
        meter = metered(database, tmp_path, clock)
        with pytest.raises(AuthUnavailable):
            await use(meter, key_of(10))
        assert await use(meter, key_of(None))
        await meter.close()


# The same request again


async def test_a_repeated_request_costs_once(database, tmp_path, clock):
    """With one idempotency key, before and after it is in the ledger, it is answered each time and counted once."""
    meter, key = metered(database, tmp_path, clock), key_of(5)
    for _ in range(2):
        assert await use(meter, key, 5, request=repeatable(key, "k", BODY))
    await meter.flush()
    assert await use(meter, key, 5, request=repeatable(key, "k", BODY))
    await meter.close()
    assert await Ledger(database).used(1, "2026-07") == 5


async def test_an_idempotency_key_is_of_one_request_and_one_user(lite, tmp_path, clock):
    """With another body it is refused, now and later; another user may have the same."""
    meter, key, other = metered(lite, tmp_path, clock), key_of(), key_of(user_id=2)
    await use(meter, key, request=repeatable(key, "k", BODY))
    with pytest.raises(KeyReused):
        await use(meter, key, request=repeatable(key, "k", b"other"))
    assert await use(meter, other, request=repeatable(other, "k", b"other"))
    await meter.flush()
    with pytest.raises(KeyReused):
        await use(meter, key, request=repeatable(key, "k", b"other"))
    await meter.close()


async def test_a_request_that_is_still_running_is_not_begun_again(lite, tmp_path, clock):
    """A retry that overtakes it is told to wait; once it failed, the key is free."""
    meter, key = metered(lite, tmp_path, clock), key_of()
    request = repeatable(key, "k", BODY)
    async with meter.reservation(key, 1, request):
        for again, error in ((BODY, StillRunning), (b"other", KeyReused), (BODY, StillRunning)):
            with pytest.raises(error):
                await use(meter, key, request=repeatable(key, "k", again))
    assert await use(meter, key, request=request)
    await meter.close()
    assert len(await rows(lite)) == 1


async def test_two_servers_count_a_repeated_request_once(lite, tmp_path, clock):
    """Even if neither knows of the other's."""
    meters = [metered(lite, tmp_path / name, clock) for name in "ab"]
    for meter in meters:
        assert await use(meter, key_of(), 3, request=repeatable(key_of(), "k", BODY))
    for meter in meters:
        await meter.close()
    assert await Ledger(lite).used(1, "2026-07") == 3


# Trouble


async def applied(meter: Meter) -> None:
    """Flush until the ledger has everything: on a busy machine a database in full health may be late."""
    async with asyncio.timeout(20):
        while meter.num_unapplied:
            with contextlib.suppress(DatabaseDown):
                await meter.flush()
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_broken_postgres_loses_no_usage(fault, tmp_path, clock):
    """While it fails requests are answered and kept, and once it is well each is in the ledger once."""
    async with postgres() as url, FaultProxy("127.0.0.1", url.port or 5432) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.listens_at).render_as_string(hide_password=False)
        async with opened(through, write_seconds=0.3) as database:
            meter, key = metered(database, tmp_path, clock), key_of(1000)
            for _ in range(10):
                assert await use(meter, key)
            await applied(meter)
            await proxy.break_down(fault)
            for _ in range(3):
                for _ in range(10):
                    assert await use(meter, key)
                    clock.pass_by(1.0)
                with pytest.raises(DatabaseDown):
                    await meter.flush()
            await proxy.break_down(Fault.NONE)
            await applied(meter)
            await meter.close()
        async with Database(url.render_as_string(hide_password=False)) as database:
            assert await Ledger(database).used(1, "2026-07") == len(await rows(database)) == 40


async def test_a_disk_that_takes_nothing_is_done_without(lite, tmp_path, clock):
    """Usage waits in memory, is said not to be safe, and comes to the ledger all the same."""
    (tmp_path / "usage").write_text("a file where the directory should be")
    meter = metered(lite, tmp_path, clock)
    assert not await use(meter, key_of(), 4)
    assert not await use(meter, key_of(), 5)
    await meter.flush()
    assert await Ledger(lite).used(1, "2026-07") == 9
    (tmp_path / "usage").unlink()
    assert await use(meter, key_of(), 1)
    await meter.close()
    assert await Ledger(lite).used(1, "2026-07") == 10


async def test_what_waits_is_bounded(tmp_path, clock):
    """Without a database it grows to its bound; what comes then is answered, dropped and counted."""
    async with Database("postgresql://nobody@127.0.0.1:1/none") as database:
        meter = Meter(Ledger(database), Spool(tmp_path / "usage", max_bytes=2000), now=clock, clock=clock)
        saved = [await use(meter, key_of(None)) for _ in range(30)]
        assert saved == sorted(saved, reverse=True)
        assert 0 < sum(saved) < 15
        assert meter.spool.counts.dropped == 30 - sum(saved)
        await meter.close()
        assert sum(path.stat().st_size for path in (tmp_path / "usage").iterdir()) < 2300


async def test_old_rows_are_forgotten_and_sums_kept(lite, tmp_path, clock):
    """The ledger does not grow for ever."""
    async with metered(lite, tmp_path, clock, keep_days=10) as meter:
        await use(meter, key_of(), 7)
        await meter.flush()
        clock.pass_by(11 * 86400)
        await asyncio.sleep(2 * metering.FLUSH_SECONDS)
        assert await rows(lite) == {}
    assert await Ledger(lite).used(1, "2026-07") == 7


# Segments


async def test_what_a_dead_process_left_is_applied_once(lite, tmp_path, clock):
    """A segment that nobody holds is applied by the next process, and a line that was cut off is passed over."""
    left = metered(lite, tmp_path, clock)
    for _ in range(5):
        await use(left, key_of())
    await left.spool.close()
    (path,) = (tmp_path / "usage").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[0][:-9])
    path.with_name("copy.usage").write_bytes(whole)

    meter = metered(lite, tmp_path, clock)
    await meter.flush()

    assert len(await rows(lite)) == 5
    assert (meter.spool.counts.replayed, meter.spool.counts.damaged) == (10, 1)
    assert list((tmp_path / "usage").iterdir()) == []
    await meter.close()


async def test_a_living_process_keeps_its_segment(lite, tmp_path, clock):
    """Another server on the same directory leaves it alone."""
    one, other = metered(lite, tmp_path, clock), metered(lite, tmp_path, clock)
    await use(one, key_of())
    await other.flush()
    assert await rows(lite) == {}
    await one.flush()
    assert len(await rows(lite)) == 1
    await one.close()
    await other.close()


async def test_many_requests_share_a_write_to_the_disk(lite, tmp_path, clock):
    """A thousand at once are on disk after a few writes, and none waits long."""
    meter = metered(lite, tmp_path, clock)
    async with asyncio.timeout(5):
        assert all(await asyncio.gather(*(use(meter, key_of(None)) for _ in range(1000))))
    await meter.close()
    assert len(await rows(lite)) == 1000


@pytest.mark.parametrize("entry", [UsageEntry(request_id="é\n", user_id=1, key_id="k", model="m\r\n", embeddings=1)])
async def test_any_text_survives_the_spool(tmp_path, entry):
    """A line break in a name breaks no line."""
    found = []

    async def apply(entries):
        found.extend(entries)

    waiting = Spool(tmp_path)
    waiting.add(entry)
    await waiting.drain(apply)
    await waiting.close()
    assert found == [entry]
    assert waiting.counts == spool.SpoolCounts()


def test_each_database_has_a_spool_of_its_own(tmp_path):
    """What waits for one must not be applied to another."""
    assert spool_folder(tmp_path, "sqlite:///a") != spool_folder(tmp_path, "sqlite:///b")


# kill -9


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_nothing_is_lost_or_doubled_when_the_process_is_killed(kind, tmp_path):
    """Killed again and again in the middle of settling and flushing: whatever was said to be safe is there, once."""
    async with database_url(kind, tmp_path) as url, opened(url) as database:
        await Accounts(database).set_user("ann@b.c", "free", now=JULY)
        folder, said = tmp_path / "usage", {}
        for i in range(6):
            said |= await asyncio.to_thread(killed_after, 0.3 + 0.17 * i, url, folder)
        async with Meter(Ledger(database), Spool(folder)) as meter:
            await meter.flush()
        ledger = await rows(database)
        assert len(said) > 100
        assert said.keys() <= ledger.keys()
        assert {i: (ledger[i].embeddings, ledger[i].tokens) for i in said} == said
        unsaid = len(ledger) - len(said)
        assert unsaid <= 6 * 8  # one request of each task, on disk before its client could be told
        period = next(iter(ledger.values())).period
        totals = await Ledger(database).totals()
        assert await Ledger(database).used(1, period) == sum(entry.embeddings for entry in ledger.values())
        assert sum(total.requests for total in totals) == len(ledger)
        assert list(folder.iterdir()) == []


def killed_after(seconds: float, url: str, folder: Path) -> dict[str, tuple[int, int]]:
    """Run the process for a while, and kill it; returns what it said was safe."""
    command = [sys.executable, "-m", "metering_process", url, str(folder), "1", "0" * 12]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent) as process:  # noqa: S603
        first = process.stdout.readline()
        killer = threading.Timer(seconds, process.send_signal, [signal.SIGKILL])
        killer.start()
        lines = [first, *process.stdout]
        killer.join()
    whole = [line.split() for line in lines if line.endswith("\n")]
    return {request_id: (int(embeddings), int(tokens)) for request_id, embeddings, tokens in whole}
