"""Who may call, and how often: by a key of an account, by the one key of the whole server, or everybody.

key presented ──> the server's own? ──> of a key's form? ──> too many wrong ones lately? ──> the keyring ──> the rate
"""

import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from quiver import keys
from quiver.accounts import ApiKey, Rate
from quiver.config import AccountsConfig, Secret
from quiver.errors import AuthUnavailable, ConfigError, InvalidInput, RateLimited, Unauthorized
from quiver.limits import Buckets, Limiter, Verdict
from quiver.register import Register
from quiver.telemetry.observer import Figure
from quiver.types import Caller

ATTEMPTS = Rate(1.0, 20.0)
"""Keys that nobody knows, from one address: each costs a slow hash, and only one thread makes them."""
SERVERS_KEY = "the server's key"
"""Whose bucket it is that all share who show it."""
STANDING_SECONDS = 1.0
"""How long it holds what the settings say of a caller: whether calls need a key may change."""
_MISSING = Unauthorized("send an API key: 'Authorization: Bearer …'")
_WRONG = Unauthorized("the API key is wrong")


class Passage(NamedTuple):
    """Who was let in, and what is left of how often it may ask."""

    caller: Caller
    verdict: Verdict | None = None
    """None where nothing bounds that; one that is not `allowed` is to be refused."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Who a caller is, found out before: for a moment, nobody need be asked again."""

    caller: Caller
    bucket: str
    """What its requests are taken from."""
    rate: Rate | None
    until: float
    """By the monotonic clock."""


class Gate:
    """Turns the headers of a call into a caller, or refuses it; used on one event loop."""

    def __init__(self, api_key: Secret, register: Register, limiter: Limiter, config: AccountsConfig) -> None:
        if api_key and config.auth == "off":
            raise ConfigError("api_key is set, but auth is off: leave one of them out")
        self._static = _digest(api_key.reveal()) if api_key else None
        self._register = register
        self._limiter = limiter
        self._rate = _rate(config)
        self._attempts = Buckets()
        self._num_refused = {"missing": 0, "wrong": 0, "too_many": 0}
        self._num_limited = 0

    def glance(self, headers: Mapping[str, str], peer: str) -> Caller | Unauthorized:
        """Tell who seems to call, or why it is refused, as far as the headers alone show; takes microseconds."""
        if not self._asks_for_key:
            return Caller(peer)
        text = presented_key(headers)
        if not text:
            return self._refused("missing", _MISSING)
        if self._is_static(text):
            return Caller(peer)
        with suppress(AuthUnavailable):
            if self._register.needs_key and (known := self._register.keyring.recall(text)):
                return _caller(known)
        if keys.parse(text) is None or not self._register.needs_key:
            return self._refused("wrong", _WRONG)
        return Caller(peer)

    @property
    def tells_users_apart(self) -> bool:
        """Whether all who are let in show a key of an account."""
        return self._static is None and self._register.needs_key

    def standing(self, headers: Mapping[str, str], peer: str) -> Standing | None:
        """Tell who calls, if that is known; None where it is still to be found out, or is nobody who is let in."""
        now = time.monotonic()
        if not self._asks_for_key:
            return Standing(Caller(peer), f"address {peer}", self._rate, now + STANDING_SECONDS)
        text = presented_key(headers)
        if self._is_static(text):
            return Standing(Caller(peer), SERVERS_KEY, self._rate, now + STANDING_SECONDS)
        with suppress(AuthUnavailable):
            if self._register.needs_key and (known := self._register.keyring.identify_now(text)):
                key, seconds = known
                return Standing(_caller(key), f"key {key.id}", key.user.tier.rate or self._rate, now + seconds)
        return None

    def admit_now(self, standing: Standing) -> Passage | None:
        """Let in who may ask now; None where it may not, or where others must be asked."""
        if standing.rate is None:
            return Passage(standing.caller)
        verdict = self._limiter.take_here(standing.bucket, standing.rate)
        return Passage(standing.caller, verdict) if verdict and verdict.allowed else None

    async def admit(self, headers: Mapping[str, str], peer: str) -> Passage:
        """Return who calls: the holder of a key, or, where none is asked for, the address.

        Raises `Unauthorized`, `RateLimited` where an address tries too many keys, `AuthUnavailable` or `Overloaded`.
        """
        if not self._asks_for_key:
            return await self._passage(Caller(peer), f"address {peer}")
        text = presented_key(headers)
        if self._is_static(text):
            return await self._passage(Caller(peer), SERVERS_KEY)
        key = await self._identify(text, peer)
        return await self._passage(_caller(key), f"key {key.id}", key.user.tier.rate)

    def figures(self) -> Sequence[Figure]:
        """Count who was not let in."""
        return (
            Figure("quiver_refused_keys", "Calls without a good key.", dict(self._num_refused), "why", counted=True),
            Figure("quiver_rate_limited", "Calls that came too soon.", {"": self._num_limited}, counted=True),
        )

    @property
    def _asks_for_key(self) -> bool:
        return self._static is not None or self._register.needs_key

    def _is_static(self, text: str) -> bool:
        # Digests have one length and are compared in constant time: nothing of the key shows in the timing.
        return self._static is not None and hmac.compare_digest(_digest(text), self._static)

    async def _identify(self, text: str, peer: str) -> ApiKey:
        """Ask the keyring; addresses that bring many keys which are none wait for their turn."""
        if not text:
            raise Unauthorized(self._refused("missing", _MISSING).message)
        if keys.parse(text) is None or not self._register.needs_key:
            raise Unauthorized(self._refused("wrong", _WRONG).message)
        keyring = self._register.keyring
        if keyring.knows(text):
            return await self._checked(text)
        verdict = self._attempts.take(peer, ATTEMPTS)
        if not verdict.allowed:
            self._num_refused["too_many"] += 1
            message = "too many keys from this address are wrong: come back later"
            raise RateLimited(message, retry_after_seconds=verdict.retry_after_seconds)
        is_wrong = False
        try:
            return await self._checked(text)
        except Unauthorized:
            is_wrong = True
            raise
        finally:
            if not is_wrong:
                self._attempts.take(peer, ATTEMPTS, cost=-1.0)  # it was no attempt

    async def _checked(self, text: str) -> ApiKey:
        try:
            return await self._register.keyring.identify(text)
        except Unauthorized as error:
            self._refused("wrong", error)
            raise

    async def _passage(self, caller: Caller, who: str, rate: Rate | None = None) -> Passage:
        if (rate := rate or self._rate) is None:
            return Passage(caller)
        verdict = await self._limiter.take(who, rate)
        self._num_limited += not verdict.allowed
        return Passage(caller, verdict)

    def _refused(self, why: str, error: Unauthorized) -> Unauthorized:
        self._num_refused[why] += 1
        return error


class OpenGate(Gate):
    """Lets everybody in, as often as they like: for where the listener itself keeps strangers out."""

    def __init__(self, register: Register, limiter: Limiter) -> None:
        super().__init__(Secret(""), register, limiter, AccountsConfig())

    @property
    def _asks_for_key(self) -> bool:
        return False


def _caller(key: ApiKey) -> Caller:
    """Users, not keys, take turns: who makes more keys gets no more of the server."""
    return Caller(f"user {key.user.id}", key=key)


def _rate(config: AccountsConfig) -> Rate | None:
    if not config.rate_per_second:
        return None
    try:
        return Rate(config.rate_per_second, config.rate_burst)
    except InvalidInput as error:
        raise ConfigError(f"rate_per_second and rate_burst: {error.message}") from error


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


KEY_HEADERS = ("authorization", "x-api-key", "api-key")


def presented_key(headers: Mapping[str, str]) -> str:
    """Accept the forms that clients of the APIs we speak send: `Bearer k`, a bare `k`, `x-api-key`, `api-key`."""
    authorization = headers.get("authorization", "").strip()
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    return authorization or headers.get("x-api-key", "") or headers.get("api-key", "")
