"""What a key pays for one request: held before anything is computed, and put down once it is."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from quiver.accounts import ApiKey, UsageTotal, User
from quiver.errors import Forbidden
from quiver.metering import Meter, Reservation
from quiver.register import Register
from quiver.types import Caller, Usage


@dataclass(slots=True, eq=False)
class Tab:
    """One reservation of a quota, and what the engine was asked for on it."""

    meter: Meter
    reservation: Reservation
    model: str = ""
    """The first that was asked for."""
    cached: int = 0
    tokens: int = 0

    async def hold(self, embeddings: int) -> None:
        """Hold so many more of the quota. Raises `InsufficientQuota` or `AuthUnavailable`."""
        await self.meter.extend(self.reservation, embeddings)

    def add(self, model: str, usage: Usage) -> None:
        """Note what was computed."""
        self.model = self.model or model
        self.cached += len(usage.cached)
        self.tokens += usage.num_tokens


class Billing:
    """Opens a tab for each request that comes with a key."""

    def __init__(self, register: Register, *, waits: bool = False) -> None:
        """With `waits`, a reply comes once its usage is on the disk."""
        self._register = register
        self._waits = waits

    @asynccontextmanager
    async def tab(self, caller: Caller, key: ApiKey) -> AsyncIterator[Tab]:
        """Yield the tab of a caller's request; a new one is settled if all goes well, and else costs nothing.

        Unless it is asked for, nobody waits for the disk: an answer would come a write later (milliseconds), and what a
        process that is killed has answered in its last moment is all that can be lost.
        """
        if isinstance(caller.tab, Tab):
            yield caller.tab
            return
        meter = self._register.meter
        async with meter.reservation(key, 0, caller.request) as reservation:
            tab = Tab(meter, reservation)
            yield tab
            if tab.model:  # else nothing was computed
                cached = min(tab.cached, reservation.embeddings)
                saved = meter.settle(reservation, model=tab.model, cached=cached, tokens=tab.tokens)
                if self._waits:
                    await saved

    def charge_now(self, key: ApiKey, embeddings: int, *, model: str, tokens: int) -> bool:
        """Put down a request that is answered at once, with known results; False where something must be waited for.

        Raises `AuthUnavailable`.
        """
        return not self._waits and self._register.meter.charge_now(key, embeddings, model=model, tokens=tokens)

    async def used(self, user: User, period: str) -> Sequence[UsageTotal]:
        """Tell what a user's keys used in a month, by key and model. Raises `DatabaseDown` or `AuthUnavailable`."""
        return await self._register.ledger.totals(email=user.email, period=period)


def check(caller: Caller, scope: str) -> None:
    """Raise `Forbidden` where a caller's key is not good for something; one without a key of an account may all."""
    key = caller.key
    if key and scope not in key.scopes:
        its = " and ".join(sorted(key.scopes)) or "nothing"
        raise Forbidden(f"this key is good for {its}, not for {scope}: use another")
