"""Who holds a key: what is remembered for how long, and what happens when the database is away."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest

from fakes import FakeClock
from fault_proxy import FAULTS, Fault, FaultProxy
from quiver import keyring, keys
from quiver.accounts import FIRST_TIERS, ApiKey, User
from quiver.db import Accounts
from quiver.errors import AuthUnavailable, DatabaseDown, Overloaded, QuiverError, Unauthorized, UnknownAccount
from quiver.keyring import Keyring, Order
from quiver.keys import KeyText
from stores import added, database_url, opened, postgres

ROUNDS = 4
ANN = User(1, "ann@b.c", FIRST_TIERS[0])


@dataclass
class Shelf:
    """Keys in memory that can be down; counts how often it was asked."""

    rows: dict[str, ApiKey] = field(default_factory=dict)
    down: bool = False
    asked: Counter[str] = field(default_factory=Counter)

    async def find(self, key_id: str) -> ApiKey | None:
        """Find a key."""
        self.asked[key_id] += 1
        await asyncio.sleep(0)
        if self.down:
            raise DatabaseDown("it is away")
        return self.rows.get(key_id)

    def put(self, prefix: str = "qv", **facts: object) -> KeyText:
        """Keep a new key."""
        text = keys.mint(prefix)
        hashed = keys.hash_key(text, rounds=ROUNDS)
        self.rows[text.id] = ApiKey(id=text.id, prefix=prefix, hash=hashed, user=ANN, **facts)
        return text

    def change(self, key: KeyText, **facts: object) -> None:
        """Change a row."""
        self.rows[key.id] = replace(self.rows[key.id], **facts)


@pytest.fixture
def shelf() -> Shelf:
    """Return keys in memory."""
    return Shelf()


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock that stands still."""
    return FakeClock()


@pytest.fixture
async def ring(shelf: Shelf, clock: FakeClock) -> AsyncIterator[Keyring]:
    """Return a keyring over the shelf."""
    async with Keyring(shelf.find, rounds=ROUNDS, clock=clock, now=clock) as ring:
        yield ring


async def settle() -> None:
    """Let what was begun in the background end."""
    for _ in range(20):
        await asyncio.sleep(0.002)


def wrong(key: KeyText) -> str:
    """Return another secret under the same id, with its checksum right."""
    while (other := keys.mint(key.prefix)).id != key.id:
        body = f"{key.prefix}_{key.id}_{other.text.split('_')[2]}"
        return f"{body}_{keys._check(body)}"
    return other.text


async def refusal(ring: Keyring, text: str) -> QuiverError:
    """Return why a key is refused."""
    with pytest.raises(QuiverError) as caught:
        await ring.identify(text)
    return caught.value


async def test_a_good_key_is_its_row(ring, shelf):
    """The caller is who the database says."""
    key = shelf.put(name="laptop")
    assert await ring.identify(key.text) == shelf.rows[key.id]
    assert ring.knows(key.text)


async def test_every_bad_key_is_refused_alike(ring, shelf, clock):
    """Wrong, unknown, revoked, expired, malformed or odd: the same error with the same words."""
    good = shelf.put()
    bad = [
        wrong(good),
        keys.mint("qv").text,
        shelf.put(revoked_at=clock() - 1).text,
        shelf.put(expires_at=clock()).text,
        good.text[:-1],
        "",
        "sk-other",
        "\ud800",
        "é" * 1000,
    ]
    for text in bad:
        errors = [await refusal(ring, text) for _ in range(2)]
        assert [(type(e), e.message) for e in errors] == [(Unauthorized, "the API key is wrong")] * 2
    await ring.identify(good.text)


async def test_a_known_key_is_hashed_once_while_it_is_used(shelf, clock):
    """Bcrypt runs for the first of many requests, and again only after a minute without one."""
    async with Keyring(shelf.find, rounds=ROUNDS, clock=clock, now=clock) as ring:
        key, hasher = shelf.put(), ring._hasher
        counted = hasher.submit
        num_hashed = 0

        def submit(*arguments):
            nonlocal num_hashed
            num_hashed += 1
            return counted(*arguments)

        hasher.submit = submit
        await asyncio.gather(*(ring.identify(key.text) for _ in range(50)))
        for _ in range(200):
            clock.pass_by(1.0)
            await ring.identify(key.text)
            await settle_quickly()
        assert num_hashed == 1
        clock.pass_by(keyring.HASHED_SECONDS + 1)
        await ring.identify(key.text)
        assert num_hashed == 2


async def settle_quickly() -> None:
    """Let a task without a thread end."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_database_is_asked_every_few_seconds_and_by_one_request(ring, shelf, clock):
    """Within two seconds it is left alone; later one question serves all, and nobody waits for it at first."""
    key = shelf.put()
    await asyncio.gather(*(ring.identify(key.text) for _ in range(20)))
    clock.pass_by(keyring.FRESH_SECONDS - 0.1)
    await ring.identify(key.text)
    assert shelf.asked[key.id] == 1
    clock.pass_by(0.2)
    await asyncio.gather(*(ring.identify(key.text) for _ in range(20)))
    await settle()
    assert shelf.asked[key.id] == 2


@pytest.mark.parametrize("change", [{"revoked_at": 1.0}, {"hash": keys.hash_key(keys.mint("qv"), rounds=ROUNDS)}])
async def test_a_revoked_key_ends_within_five_seconds(ring, shelf, clock, change):
    """However busy it is, nobody gets in with it five seconds after; the same holds for a hash that was replaced."""
    key = shelf.put()
    await ring.identify(key.text)
    shelf.change(key, **change)
    ended = None
    for tenth in range(51):
        try:
            await ring.identify(key.text)
        except Unauthorized:
            ended = ended or tenth
        else:
            assert ended is None
        await settle_quickly()
        clock.pass_by(0.1)
    assert ended is not None


async def test_a_key_ends_at_its_time_though_it_is_known(ring, shelf, clock):
    """An expiry needs no word of the database's."""
    key = shelf.put(expires_at=clock() + 1)
    await ring.identify(key.text)
    clock.pass_by(1.0)
    assert isinstance(await refusal(ring, key.text), Unauthorized)
    assert shelf.asked[key.id] == 1


async def test_a_key_that_is_known_needs_no_waiting_for_a_while(ring, shelf, clock):
    """For as long as the database's word is fresh, and never past its end; nobody is known before that was found out."""
    lasting, short = shelf.put(), shelf.put(expires_at=clock() + 1.5)
    assert ring.identify_now(lasting.text) is None
    for key in (lasting, short):
        await ring.identify(key.text)
    clock.pass_by(1.0)
    assert {key: ring.identify_now(key.text)[1] for key in (lasting, short)} == {
        lasting: pytest.approx(keyring.FRESH_SECONDS - 1),
        short: pytest.approx(0.5),
    }
    clock.pass_by(0.5)
    assert ring.identify_now(short.text) is None


async def test_a_change_of_tier_reaches_a_known_key(ring, shelf, clock):
    """Its limits are those of a few seconds ago at most."""
    key = shelf.put()
    await ring.identify(key.text)
    shelf.change(key, user=replace(ANN, tier=FIRST_TIERS[2]))
    clock.pass_by(keyring.CONFIRM_SECONDS)
    assert (await ring.identify(key.text)).user.tier == FIRST_TIERS[2]


async def test_a_bad_key_is_remembered_for_some_seconds(ring, shelf, clock):
    """A client that keeps sending it costs neither a question nor a hash each time."""
    text = keys.mint("qv")
    for _ in range(3):
        await refusal(ring, text.text)
    assert shelf.asked[text.id] == 1
    clock.pass_by(keyring.REFUSED_SECONDS)
    await refusal(ring, text.text)
    assert shelf.asked[text.id] == 2


async def test_what_is_remembered_is_bounded_and_not_the_key(ring, shelf):
    """Ten thousand of each at most, under something that cannot be turned back."""
    key = shelf.put()
    await ring.identify(key.text)
    for i in range(keyring.MAX_KEYS + 10):
        ring._refusal(b"%d" % i)
        keyring._remember(ring._known, b"%d" % i, None)
    assert len(ring._refused) == len(ring._known) == keyring.MAX_KEYS
    assert key.text.split("_")[2] not in f"{ring.__dict__}"


async def seconds_to(ring: Keyring, text: str) -> float:
    """Identify a key; returns how long that took."""
    start = time.perf_counter()
    await ring.identify(text)
    return time.perf_counter() - start


async def test_strangers_get_one_thread_and_a_short_queue(shelf):
    """Of many new keys at once the first few are checked, the others told to come back; a known one does not wait."""
    async with Keyring(shelf.find, rounds=10) as ring:
        key = shelf.put()
        await ring.identify(key.text)
        attack = [asyncio.create_task(refusal(ring, keys.mint("qv").text)) for _ in range(50)]
        await asyncio.sleep(0.02)
        assert min([await seconds_to(ring, key.text) for _ in range(5)]) < 0.01
        kinds = Counter(type(error) for error in await asyncio.gather(*attack))
        assert kinds == {Unauthorized: keyring.MAX_HASHING, Overloaded: 50 - keyring.MAX_HASHING}


# The database is away


async def test_known_keys_are_served_while_the_database_is_away(ring, shelf, clock):
    """For a quarter of an hour and no longer, and the database is not asked for each request."""
    key = shelf.put()
    await ring.identify(key.text)
    shelf.down = True
    served = 0
    for _ in range(100):
        clock.pass_by(8.99)
        await asyncio.gather(*(ring.identify(key.text) for _ in range(5)))
        await settle_quickly()
        served += 1
    assert served == 100
    assert shelf.asked[key.id] == 101
    clock.pass_by(2.0)
    assert isinstance(await refusal(ring, key.text), AuthUnavailable)
    shelf.down = False
    clock.pass_by(keyring.DOWN_SECONDS)
    await ring.identify(key.text)


async def test_an_unknown_key_is_not_refused_while_the_database_is_away(ring, shelf, clock):
    """It may be good: the client is told to come back, and gets in once the database is there."""
    key = shelf.put()
    shelf.down = True
    error = await refusal(ring, key.text)
    assert isinstance(error, AuthUnavailable)
    assert error.retry_after_seconds > 0
    assert isinstance(await refusal(ring, "sk-malformed"), Unauthorized)
    shelf.down = False
    clock.pass_by(keyring.DOWN_SECONDS)
    assert await ring.identify(key.text) == shelf.rows[key.id]


async def test_neither_expired_nor_mighty_keys_are_served_stale(ring, shelf, clock):
    """An expiry holds without a database, and whoever may change accounts needs its word."""
    short, mighty = shelf.put(expires_at=clock() + 5), shelf.put(scopes=frozenset({"embed", "admin"}))
    for key in (short, mighty):
        await ring.identify(key.text)
    shelf.down = True
    clock.pass_by(5.0)
    assert isinstance(await refusal(ring, short.text), Unauthorized)
    assert isinstance(await refusal(ring, mighty.text), AuthUnavailable)


async def test_who_gives_up_takes_nobody_along(ring, shelf):
    """A client that goes while its key is checked leaves the others who brought the same one."""
    key = shelf.put()
    first, second = (asyncio.create_task(ring.identify(key.text)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == shelf.rows[key.id]
    with pytest.raises(asyncio.CancelledError):
        await first


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_broken_postgres_stops_no_known_key(fault):
    """Behind a real database that fails in any way, every request with a known key is answered, and but for one at once."""
    async with postgres() as url, FaultProxy("127.0.0.1", url.port or 5432) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.listens_at).render_as_string(hide_password=False)
        async with opened(through) as database:
            accounts, clock = Accounts(database), FakeClock()
            user = await accounts.set_user("ann@b.c", "scale", now=1.0)
            key = await keyring.issue(accounts, Order(user=user), now=1.0, rounds=ROUNDS)
            async with Keyring(accounts.find_key, rounds=ROUNDS, clock=clock, now=clock) as ring:
                await ring.identify(key.text)
                before = [await identified(ring, key, clock) for _ in range(200)]
                await proxy.break_down(fault)
                during = [await identified(ring, key, clock) for _ in range(200)]
                unknown = await refusal(ring, keys.mint("qv").text)
                await proxy.break_down(Fault.NONE)
    assert isinstance(unknown, AuthUnavailable)
    assert added(before, during) < 0.025


async def identified(ring: Keyring, key: KeyText, clock: FakeClock) -> float:
    """Identify a key, with a tenth of a second between any two; returns the seconds that it took."""
    clock.pass_by(0.1)
    start = time.perf_counter()
    await ring.identify(key.text)
    return time.perf_counter() - start


# Making keys


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_keys_are_issued_rotated_and_revoked(kind, tmp_path):
    """The new key takes the old one's place, at once or after a grace; the database never sees a secret."""
    async with database_url(kind, tmp_path) as url, opened(url) as database:
        accounts, clock = Accounts(database), FakeClock()
        user = await accounts.set_user("ann@b.c", "pro", now=clock())
        order = Order(user=user, prefix="fe", name="laptop", scopes=frozenset({"embed"}), expires_at=clock() + 90)
        first = await keyring.issue(accounts, order, now=clock(), rounds=ROUNDS)
        second = await keyring.rotate(accounts, first.id, now=clock(), rounds=ROUNDS, grace_seconds=60)
        async with Keyring(accounts.find_key, rounds=ROUNDS, clock=clock, now=clock) as ring:
            for key in (first, second):
                found = await ring.identify(key.text)
                assert (found.prefix, found.name, found.user, found.scopes) == ("fe", "laptop", user, order.scopes)
            clock.pass_by(60)
            assert isinstance(await refusal(ring, first.text), Unauthorized)
            third = await keyring.rotate(accounts, second.id, now=clock(), rounds=ROUNDS)
            clock.pass_by(keyring.CONFIRM_SECONDS)
            assert isinstance(await refusal(ring, second.text), Unauthorized)
            assert (await ring.identify(third.text)).expires_at == order.expires_at
        for key in (second.id, "nobody"):
            with pytest.raises(UnknownAccount):
                await keyring.rotate(accounts, key, now=clock(), rounds=ROUNDS)
        kept = f"{[(key, key.hash) for key in await accounts.keys()]}"
        assert not any(key.text.split("_")[2] in kept for key in (first, second, third))


# Timing


def distance(one: list[float], other: list[float]) -> float:
    """Return how far two samples are apart: the largest gap between their distributions (Kolmogorov, Smirnov)."""
    steps = sorted([(x, 1 / len(one)) for x in one] + [(x, -1 / len(other)) for x in other])
    gap = largest = 0.0
    for _, step in steps:
        gap += step
        largest = max(largest, abs(gap))
    return largest


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_an_unknown_key_takes_as_long_as_a_wrong_one(kind, tmp_path):
    """Their times cannot be told apart, though the same test tells a malformed key at once."""
    samples = 120
    async with database_url(kind, tmp_path) as url, opened(url) as database:
        accounts = Accounts(database)
        user = await accounts.set_user("ann@b.c", "pro", now=1.0)
        key = await keyring.issue(accounts, Order(user=user), now=1.0, rounds=6)
        took: dict[str, list[float]] = {"unknown": [], "wrong": [], "malformed": []}
        async with Keyring(accounts.find_key, rounds=6) as ring:
            for _ in range(samples):
                texts = {"unknown": keys.mint("qv").text, "wrong": wrong(key), "malformed": keys.mint("qv").text[:-1]}
                for name, text in random.sample(list(texts.items()), len(texts)):
                    start = time.perf_counter()
                    await refusal(ring, text)
                    took[name].append(time.perf_counter() - start)
    # 0.1 % of pairs of samples of one distribution are further apart than 1.95 sqrt(2 / n).
    apart = 1.95 * (2 / samples) ** 0.5
    assert distance(took["unknown"], took["wrong"]) < apart
    assert distance(took["malformed"], took["wrong"]) > apart
