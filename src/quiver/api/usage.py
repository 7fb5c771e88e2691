"""Quiver's own: what the caller's keys used in a month, and what is left of it."""

import re
import time

import msgspec

from quiver.accounts import end_of_period, period_of
from quiver.api.call import Call, Dialect, Reply, Route
from quiver.errors import InvalidInput
from quiver.service import Service

MONTH = re.compile(r"20\d\d-(?:0[1-9]|1[0-2])")


class UsageRow(msgspec.Struct):
    """What one key used of one model; `key` is its id, never its secret."""

    key: str
    model: str
    requests: int
    embeddings: int
    cached: int
    tokens: int


class UsageReply(msgspec.Struct):
    """Reply of GET /v1/usage: the sums of all keys of the caller's user in a month (UTC), a second old at most."""

    object: str
    period: str
    email: str
    tier: str
    quota: int | None
    """Embeddings that the tier has in a month; null: no bound."""
    used: int
    """Embeddings that count towards it."""
    left: int | None
    """What is left of this month's; null where nothing bounds it, and for other months."""
    resets_at: int | None
    """Unix seconds when this month ends; null for other months."""
    requests: int
    cached: int
    tokens: int
    data: list[UsageRow]


async def show_usage(service: Service, call: Call) -> Reply:
    """Show a month of the caller's user: this one, or `?period=2026-07`."""
    now = time.time()
    period = call.query.get("period") or period_of(now)
    if not MONTH.fullmatch(period):
        raise InvalidInput(f"period is {period!r}: send a month like {period_of(now)}", param="period")
    totals = await service.used(call.caller, period)
    user, is_now = service.user(call.caller), period == period_of(now)
    used, quota = sum(total.embeddings for total in totals), user.tier.monthly_embeddings
    reply = UsageReply(
        object="usage",
        period=period,
        email=user.email,
        tier=user.tier.name,
        quota=quota,
        used=used,
        left=max(0, quota - used) if quota is not None and is_now else None,
        resets_at=round(end_of_period(now)) if is_now else None,
        requests=sum(total.requests for total in totals),
        cached=sum(total.cached for total in totals),
        tokens=sum(total.tokens for total in totals),
        data=[UsageRow(t.key_id, t.model, t.requests, t.embeddings, t.cached, t.tokens) for t in totals],
    )
    return Reply(200, msgspec.json.encode(reply))


def usage_routes(shape: Dialect) -> Dialect:
    """Return the route; its errors are written in the shape of another dialect."""
    return Dialect(
        name="usage",
        routes=[Route("GET", "/v1/usage", show_usage, "Show what was used, and what is left", reply=UsageReply)],
        render_error=shape.render_error,
        error=shape.error,
        has_prefix=False,
    )
