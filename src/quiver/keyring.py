"""Who holds a key: asked of the database, remembered for a short while, and no slow hash for a key that is known.

What was found out about a text is kept under its keyed hash, never under the text itself:

    age of the database's word   a known key
    ─────────────────────────    ─────────────────────────────────────────────────────────────
    up to 2 s                    is served
    up to 4 s                    is served, while the database is asked in the background
    more                         waits for the database's word: what was revoked ends here
    more than 60 s               is hashed again, too, as a new one is

A database that is down leaves known keys as they were, up to `stale_seconds` and never past their expiry, and nobody
waits for it; of other keys nobody can say whether they are good, which is no refusal.
"""

import asyncio
import hashlib
import hmac
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from quiver import keys
from quiver.accounts import ADMIN, DEFAULT_SCOPES, ApiKey, User
from quiver.errors import AuthUnavailable, DatabaseDown, Overloaded, Unauthorized, UnknownAccount
from quiver.keys import KeyText

if TYPE_CHECKING:  # a server without accounts does without SQLAlchemy
    from quiver.db import Accounts

T = TypeVar("T")
Find = Callable[[str], Awaitable[ApiKey | None]]
"""id of a key -> the key; raises `DatabaseDown`."""

FRESH_SECONDS = 2.0
CONFIRM_SECONDS = 4.0
HASHED_SECONDS = 60.0
REFUSED_SECONDS = 5.0
DOWN_SECONDS = 1.0
"""How long a database that failed is left alone."""
STEP_SECONDS = 0.025
"""Refusals are answered in whole steps and a random part of one, so that the time does not tell whether there is a key of that id."""
MAX_KEYS = 10_000
MAX_HASHING = 8
"""Keys that may wait for the one thread that hashes; strangers must not get more of the machine."""


@dataclass(frozen=True, slots=True)
class _Known:
    key: ApiKey
    asked_at: float
    """When the database was last asked."""


class Keyring:
    """Turns the text of a key into the key; used on one event loop."""

    def __init__(
        self,
        find: Find,
        *,
        stale_seconds: float = 900.0,
        rounds: int = keys.ROUNDS,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._find = find
        self._stale_seconds = stale_seconds
        self._clock = clock
        self._now = now
        self._pepper = secrets.token_bytes(32)
        self._decoy = keys.hash_key(keys.mint("qv"), rounds=rounds)
        """Compared where there is no such key, so that an unknown one takes as long as a wrong one."""
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._refused: OrderedDict[bytes, float] = OrderedDict()
        self._flights: dict[bytes, asyncio.Task[ApiKey]] = {}
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="key-hash")
        self._num_hashing = 0
        self._is_down = False
        self._down_until = float("-inf")

    async def identify(self, text: str) -> ApiKey:
        """Return the key with that text. Raises `Unauthorized`, `AuthUnavailable` or `Overloaded`."""
        mac = self._mac(text)
        if self._refused.get(mac, float("-inf")) > self._clock():
            raise _unauthorized()
        if key := self._served(mac, text):
            return self._good(mac, key)
        return await asyncio.shield(self._flight(mac, text))

    def identify_now(self, text: str) -> tuple[ApiKey, float] | None:
        """Return the key with that text if it is known to be good, and for how many seconds that needs no asking again."""
        mac = self._mac(text)
        key, now = self._served(mac, text), self._now()
        if key is None or not key.is_good(now):
            return None
        fresh_seconds = self._known[mac].asked_at + FRESH_SECONDS - self._clock()
        return key, min(fresh_seconds, (key.expires_at or math.inf) - now)

    def knows(self, text: str) -> bool:
        """Whether a key was good lately, or bad: then finding out again costs next to nothing."""
        mac = self._mac(text)
        return mac in self._known or self._refused.get(mac, float("-inf")) > self._clock()

    def recall(self, text: str) -> ApiKey | None:
        """Return a key that was good lately, whether or not it still is; asks nobody."""
        known = self._known.get(self._mac(text))
        return known.key if known else None

    async def close(self) -> None:
        """End what is under way."""
        flights = tuple(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        self._hasher.shutdown(cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _mac(self, text: str) -> bytes:
        # Keyed, as an HMAC is, and ten times as fast as the library's.
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._pepper, digest_size=32).digest()

    def _flight(self, mac: bytes, text: str) -> asyncio.Task[ApiKey]:
        """Find out about a text once, however many ask."""
        if (flight := self._flights.get(mac)) is None:
            flight = self._flights[mac] = asyncio.create_task(self._confirm(mac, text))
            flight.add_done_callback(lambda done: self._landed(mac, done))
        return flight

    def _landed(self, mac: bytes, flight: asyncio.Task[ApiKey]) -> None:
        del self._flights[mac]
        if not flight.cancelled():
            flight.exception()  # whoever waits is told; nobody need be waiting

    def _served(self, mac: bytes, text: str) -> ApiKey | None:
        """Return a key that gets in before the database has said more, and have it asked where that is due."""
        known = self._known.get(mac)
        if known is None or not self._is_served(known):
            return None
        self._known.move_to_end(mac)
        if self._clock() - known.asked_at >= FRESH_SECONDS and self._clock() >= self._down_until:
            self._flight(mac, text)
        return known.key

    def _is_served(self, known: _Known) -> bool:
        """Whether a key gets in before the database has said more."""
        return self._clock() - known.asked_at < CONFIRM_SECONDS or (self._is_down and self._may_be_stale(known))

    def _may_be_stale(self, known: _Known) -> bool:
        return ADMIN not in known.key.scopes and self._clock() - known.asked_at < self._stale_seconds

    async def _confirm(self, mac: bytes, text: str) -> ApiKey:
        parsed = keys.parse(text)
        if parsed is None:
            raise _unauthorized()  # its form says so to anyone: no use in hiding it behind a hash
        start = time.perf_counter()
        try:
            return await self._find_out(mac, parsed)
        except Unauthorized:
            # A timer wakes at whole milliseconds from when it was set: noise covers what that still shows.
            noise = secrets.randbelow(1000) / 1000 * STEP_SECONDS
            await asyncio.sleep(STEP_SECONDS - (time.perf_counter() - start) % STEP_SECONDS + noise)
            raise

    async def _find_out(self, mac: bytes, parsed: KeyText) -> ApiKey:
        known, asked_at = self._known.get(mac), self._clock()
        try:
            found = await self._ask(parsed.id)
        except DatabaseDown as error:
            if known and self._may_be_stale(known):
                return self._good(mac, known.key)
            raise AuthUnavailable("keys cannot be checked at the moment: try again") from error
        if not self._is_hashed(known, found) and not await self._matches(parsed, found):
            raise self._refusal(mac)
        if found is None:
            raise self._refusal(mac)
        _remember(self._known, mac, _Known(found, asked_at))
        return self._good(mac, found)

    async def _ask(self, key_id: str) -> ApiKey | None:
        if self._clock() < self._down_until:
            raise DatabaseDown("the database did not answer a moment ago")
        try:
            found = await self._find(key_id)
        except DatabaseDown:
            self._is_down, self._down_until = True, self._clock() + DOWN_SECONDS
            raise
        self._is_down = False
        return found

    def _is_hashed(self, known: _Known | None, found: ApiKey | None) -> bool:
        """Whether the hash in the row was compared with this text before, and the row was asked for since."""
        if known is None or found is None or self._clock() - known.asked_at > HASHED_SECONDS:
            return False
        return hmac.compare_digest(known.key.hash, found.hash)

    async def _matches(self, parsed: KeyText, found: ApiKey | None) -> bool:
        if self._num_hashing >= MAX_HASHING:
            raise Overloaded("too many new keys are being checked: try again", retry_after_seconds=1.0)
        self._num_hashing += 1
        try:
            loop, hashed = asyncio.get_running_loop(), found.hash if found else self._decoy
            return await loop.run_in_executor(self._hasher, keys.matches, parsed, hashed)
        finally:
            self._num_hashing -= 1

    def _good(self, mac: bytes, key: ApiKey) -> ApiKey:
        if key.is_good(self._now()):
            return key
        raise self._refusal(mac)

    def _refusal(self, mac: bytes) -> Unauthorized:
        self._known.pop(mac, None)
        _remember(self._refused, mac, self._clock() + REFUSED_SECONDS)
        return _unauthorized()


def _unauthorized() -> Unauthorized:
    return Unauthorized("the API key is wrong")


def _remember(store: OrderedDict[bytes, T], mac: bytes, value: T) -> None:
    """Keep something in bounds: what was used longest ago goes."""
    store[mac] = value
    store.move_to_end(mac)
    if len(store) > MAX_KEYS:
        store.popitem(last=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A key that someone wants."""

    user: User
    prefix: str = "qv"
    name: str = ""
    scopes: frozenset[str] = DEFAULT_SCOPES
    expires_at: float | None = None


async def issue(accounts: "Accounts", order: Order, *, now: float, rounds: int = keys.ROUNDS) -> KeyText:
    """Make a key and keep all of it but the secret, which is only in what is returned."""
    text = keys.mint(order.prefix)
    hashed = await asyncio.to_thread(keys.hash_key, text, rounds=rounds)
    key = ApiKey(
        id=text.id,
        prefix=text.prefix,
        hash=hashed,
        user=order.user,
        name=order.name,
        scopes=order.scopes,
        created_at=now,
        expires_at=order.expires_at,
    )
    await accounts.add_key(key)
    return text


async def rotate(
    accounts: "Accounts", key_id: str, *, now: float, grace_seconds: float = 0.0, rounds: int = keys.ROUNDS
) -> KeyText:
    """Issue a key like an old one, which ends after the grace. Raises `UnknownAccount` where there is no good one."""
    old = await accounts.find_key(key_id)
    if old is None or not old.is_good(now):
        raise UnknownAccount(f"there is no key {key_id!r} that is still good", param="key")
    order = Order(user=old.user, prefix=old.prefix, name=old.name, scopes=old.scopes, expires_at=old.expires_at)
    new = await issue(accounts, order, now=now, rounds=rounds)
    if grace_seconds > 0:
        await accounts.expire(key_id, at=now + grace_seconds)
    else:
        await accounts.revoke(key_id, now=now)
    return new
