"""The commands of accounts: keys, users, tiers, usage, and the database that they are in.

What only they need (SQLAlchemy, bcrypt) is imported when one of them runs: no other command waits for it.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quiver import cli_values
from quiver.accounts import SCOPES, ApiKey, Tier, UsageTotal, User, parse_scopes
from quiver.cli_database import WHERE, accounts_of, database, opened_database, with_accounts
from quiver.cli_settings import Command, run_async, with_settings
from quiver.cli_values import moment, say, show, written
from quiver.config import Config
from quiver.errors import InvalidInput, UnknownAccount

if TYPE_CHECKING:
    from quiver.db import Accounts
    from quiver.keys import KeyText

Line = Mapping[str, Any]

cli = typer.Typer(no_args_is_help=True)
keys = typer.Typer(no_args_is_help=True, help="Make, list and end the keys that callers show.")
users = typer.Typer(no_args_is_help=True, help="Say who pays, and in which tier.")
tiers = typer.Typer(no_args_is_help=True, help="Say how many embeddings a month, and how many requests a second.")
cli.add_typer(keys, name="keys")
cli.add_typer(users, name="users")
cli.add_typer(tiers, name="tiers")
cli.add_typer(database, name="db")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
OfUser = Annotated[str, typer.Option("--email", help="Only what is this user's.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id, alone or with its prefix (qv_…).")]


# Keys


@keys.command("create", cls=Command)
@with_settings(*WHERE, "key_prefix")
def create_key(
    *,
    email: Annotated[str, typer.Option(help="Whose it is; a new address is a new user.")],
    tier: Annotated[
        str, typer.Option(help="The user's tier from now on; default: as it is, and free for a new user.")
    ] = "",
    name: Annotated[str, typer.Option(help="What people call it.")] = "",
    scopes: Annotated[
        str, typer.Option(help=f"What it is good for, of {', '.join(SCOPES)}; default: all of them but admin.")
    ] = "",
    expires: Annotated[
        str, typer.Option(help="When it ends: after a time (90d; w, h, m, s), or a last day in UTC (2027-01-31).")
    ] = "",
    settings: Config,
) -> None:
    """Make a key and print it, this once; the database and the user are made where there are none.

    The key alone is on standard output: KEY=$(quiver keys create …) keeps it.
    """
    wanted = _Wanted(
        email=email,
        tier=tier,
        name=name,
        scopes=parse_scopes([part.strip() for part in scopes.split(",") if part.strip()]),
        expires_at=cli_values.end_of(expires, time.time()) if expires else None,
    )
    run_async(_create_key(settings, wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A key as it was asked for."""

    email: str
    tier: str
    name: str
    scopes: frozenset[str]
    expires_at: float | None


async def _create_key(settings: Config, wanted: _Wanted) -> None:
    from quiver.keyring import Order, issue  # noqa: PLC0415  late, as the head of this file says

    async with accounts_of(settings, make=True) as accounts:
        is_first = not await accounts.has_keys()
        order = Order(
            user=await _user(accounts, wanted.email, wanted.tier),
            prefix=settings.accounts.key_prefix,
            name=wanted.name,
            scopes=wanted.scopes,
            expires_at=wanted.expires_at,
        )
        await _hand_over(accounts, await issue(accounts, order, now=time.time()))
    if is_first:
        say("It is the first key here: unless auth is off, servers ask every caller for one from now on.")


async def _user(accounts: "Accounts", email: str, tier: str) -> User:
    """Find a user, or make one; a tier that is named is the user's from now on."""
    try:
        user = await accounts.user(email)
    except UnknownAccount:
        return await accounts.set_user(email, tier or "free", now=time.time())
    if tier in ("", user.tier.name):
        return user
    moved = await accounts.set_user(email, tier, now=time.time())
    say(f"{user.email} moved from tier {user.tier.name} to {tier}.")
    return moved


async def _hand_over(accounts: "Accounts", text: "KeyText") -> None:
    """Print a new key, and beside it what it is."""
    typer.echo(text.text)
    key = await accounts.find_key(text.id)
    if key is not None:
        say(f"Key {key.id} of {key.user.email}, {_end(key)}, for {', '.join(sorted(key.scopes))};")
        say(f"{cli_values.limits(key.user.tier)}.")
    say("The key is not shown again: keep it now.")


@keys.command("list", cls=Command)
@with_settings(*WHERE)
def list_keys(*, email: OfUser = "", as_json: AsJson = False, settings: Config) -> None:
    """List the keys, the oldest first: what they are, never their secrets."""
    now = time.time()
    lines = [_key_line(key, now) for key in run_async(_keys(settings, email))]
    show(lines, as_json=as_json, hidden=("id", "revoked"))


async def _keys(settings: Config, email: str) -> list[ApiKey]:
    async with accounts_of(settings) as accounts:
        return await accounts.keys((await accounts.user(email)).email if email else None)


def _key_line(key: ApiKey, now: float) -> Line:
    ended = "revoked" if key.revoked_at is not None else "expired"
    return {
        "id": key.id,
        "key": f"{key.prefix}_{key.id}",
        "user": key.user.email,
        "tier": key.user.tier.name,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "created": moment(key.created_at),
        "expires": moment(key.expires_at),
        "revoked": moment(key.revoked_at),
        "state": "good" if key.is_good(now) else ended,
    }


@keys.command("revoke", cls=Command)
@with_settings(*WHERE)
def revoke_key(key: KeyId, *, settings: Config) -> None:
    """End a key for good; servers follow within five seconds."""
    key_id = cli_values.id_of(key)
    run_async(with_accounts(settings, lambda accounts: accounts.revoke(key_id, now=time.time())))
    say(f"Key {key_id} is revoked.")


@keys.command("rotate", cls=Command)
@with_settings(*WHERE)
def rotate_key(
    key: KeyId,
    *,
    grace: Annotated[str, typer.Option(help="How long the old key is still good; 0s: not at all.")] = "24h",
    settings: Config,
) -> None:
    """Make a key like an old one and print it, this once; the old one ends a day later, unless told otherwise."""
    run_async(_rotate_key(settings, cli_values.id_of(key), cli_values.seconds_of(grace)))


async def _rotate_key(settings: Config, key_id: str, grace_seconds: float) -> None:
    from quiver.keyring import rotate  # noqa: PLC0415  late, as the head of this file says

    async with accounts_of(settings) as accounts:
        await _hand_over(accounts, await rotate(accounts, key_id, now=time.time(), grace_seconds=grace_seconds))
        old = await accounts.find_key(key_id)
    if old is not None:
        say(f"The old key {key_id} is {_end(old)}.")


def _end(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "good without an end" if key.expires_at is None else f"good until {written(key.expires_at)}"


# Users and tiers


@users.command("list", cls=Command)
@with_settings(*WHERE)
def list_users(*, as_json: AsJson = False, settings: Config) -> None:
    """List the users with their tiers, the first one first."""
    found = run_async(with_accounts(settings, lambda accounts: accounts.users()))
    lines = [{"user": user.email, "tier": user.tier.name, "created": moment(user.created_at)} for user in found]
    show(lines, as_json=as_json)


@users.command("set", cls=Command)
@with_settings(*WHERE)
def set_user(
    email: Annotated[str, typer.Argument(metavar="EMAIL", help="The user's address; a new one is a new user.")],
    *,
    tier: Annotated[str, typer.Option(help="The tier from now on.")],
    settings: Config,
) -> None:
    """Add a user, or move one to another tier, with all its keys."""
    work = with_accounts(settings, lambda accounts: accounts.set_user(email, tier, now=time.time()), make=True)
    user = run_async(work)
    say(f"{user.email} has {cli_values.limits(user.tier)}.")


@tiers.command("list", cls=Command)
@with_settings(*WHERE)
def list_tiers(*, as_json: AsJson = False, settings: Config) -> None:
    """List the tiers with their limits."""
    found = run_async(with_accounts(settings, lambda accounts: accounts.tiers()))
    show([_tier_line(tier) for tier in found], as_json=as_json)


def _tier_line(tier: Tier) -> Line:
    per_second, burst = (tier.rate.per_second, tier.rate.burst) if tier.rate else (None, None)
    return {"tier": tier.name, "monthly": tier.monthly_embeddings, "rate": per_second, "burst": burst}


@tiers.command("set", cls=Command)
@with_settings(*WHERE)
def set_tier(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tier; a new name is a new one.")],
    *,
    monthly: Annotated[str, typer.Option(help="Embeddings of a user in a month (UTC); none: no bound.")] = "",
    rate: Annotated[
        str, typer.Option(help="Requests a second of a key, on average; none: as the server's settings say.")
    ] = "",
    burst: Annotated[str, typer.Option(help="Requests of a key that may come at once after a rest.")] = "",
    settings: Config,
) -> None:
    """Add a tier, or change one: what is not given stays as it is, and in a new tier is not bounded."""
    if not (monthly or rate or burst):
        raise InvalidInput("say what to set: --monthly, --rate or --burst, with a number or none")

    async def work(accounts: "Accounts") -> Tier:
        old = {tier.name: tier for tier in await accounts.tiers()}.get(name, Tier(name))
        new = cli_values.changed(old, monthly=monthly, rate=rate, burst=burst)
        await accounts.set_tier(new)
        return new

    say(f"From now on: {cli_values.limits(run_async(with_accounts(settings, work, make=True)))}.")


# Usage


@cli.command("usage", cls=Command)
@with_settings(*WHERE)
def usage(
    *,
    email: OfUser = "",
    period: Annotated[str, typer.Option(help="Only this month (UTC): 2026-07.")] = "",
    as_json: AsJson = False,
    settings: Config,
) -> None:
    """Sum up what was used by month, user, key and model, and say how much of the user's quota that is.

    What running servers have not written down yet is missing: that of the last seconds.
    """
    lines = run_async(_usage(settings, email, cli_values.period_of(period) if period else ""))
    if not as_json:
        lines = _with_bars(lines)
    show(lines, as_json=as_json, hidden=("quota", "quota_used"))


async def _usage(settings: Config, email: str, period: str) -> Sequence[Line]:
    from quiver.db import Accounts, Ledger  # noqa: PLC0415  late, as the head of this file says

    async with opened_database(settings) as opened:
        accounts = Accounts(opened)
        known = [await accounts.user(email)] if email else await accounts.users()
        totals = await Ledger(opened).totals(email=known[0].email if email else None, period=period or None)
    quotas = {user.email: user.tier.monthly_embeddings for user in known}
    used: Counter[tuple[str, str]] = Counter()
    for total in totals:
        used[total.period, total.email] += total.embeddings
    return [_usage_line(total, used[total.period, total.email], quotas.get(total.email)) for total in totals]


def _usage_line(total: UsageTotal, used: int, quota: int | None) -> Line:
    return {
        "month": total.period,
        "user": total.email,
        "key": total.key_id,
        "model": total.model,
        "requests": total.requests,
        "embeddings": total.embeddings,
        "cached": total.cached,
        "tokens": total.tokens,
        "quota_used": used,
        "quota": quota,
    }


def _with_bars(lines: Sequence[Line]) -> Sequence[Line]:
    """Add how much of the quota a month was, once for each user and month."""
    shown: set[tuple[str, str]] = set()
    longer = []
    for line in lines:
        month = (line["month"], line["user"])
        bar = "" if month in shown else cli_values.part_of(line["quota_used"], line["quota"])
        longer.append({**line, "of the quota": bar})
        shown.add(month)
    return longer
