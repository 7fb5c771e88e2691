"""Keys, users, tiers and usage: what `quiver keys`, `users`, `tiers` and `usage` do, by JSON."""

import time
from collections.abc import Sequence
from typing import Annotated

import msgspec

from quiver.accounts import DEFAULT_SCOPES, FIRST_TIERS, ApiKey, Rate, Tier, User, parse_scopes, period_of
from quiver.admin.office import Office, written
from quiver.api.call import Call, Reply, decode_json
from quiver.errors import InvalidInput, UnknownAccount
from quiver.keyring import Order, issue, rotate
from quiver.register import Books
from quiver.service import Service

Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class KeyRow(msgspec.Struct, kw_only=True):
    """A key, never its secret."""

    id: str
    prefix: str
    email: str
    tier: str
    name: str
    scopes: list[str]
    state: str
    """good, expired or revoked."""
    created_at: float
    expires_at: float | None


class KeysReply(msgspec.Struct):
    """Reply of GET /api/keys."""

    auth: str
    """As the setting says: auto, required or off."""
    needs_key: bool
    """Whether calls need one now."""
    keys: list[KeyRow]


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/keys."""

    email: str
    name: str = ""
    scopes: list[str] = []
    """None: all but admin."""
    tier: str = ""
    """The user's from now on; none: as it is, and free for a new user."""
    expires_seconds: Annotated[float, msgspec.Meta(gt=0)] | None = None


class KeyReply(msgspec.Struct):
    """Reply with a new key, whose text is shown this once."""

    key: str
    row: KeyRow


class Grace(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/keys/{id}/rotate."""

    grace_seconds: Seconds = 24 * 3600
    """How long the old key is still good."""


class UserRow(msgspec.Struct):
    """Who pays, and in which tier."""

    email: str
    tier: str
    created_at: float = 0.0


class UserBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/users: a new address is a new user."""

    email: str
    tier: str


class TierRow(msgspec.Struct, forbid_unknown_fields=True):
    """A tier, and body of POST /api/tiers; null: no bound, or as the server's settings say."""

    name: str
    monthly_embeddings: Count | None = None
    rate_per_second: float | None = None
    burst: float | None = None


class UsageRow(msgspec.Struct, kw_only=True):
    """What one key has had of one model in a month, and what its user's tier allows."""

    period: str
    email: str
    key: str
    model: str
    requests: int
    embeddings: int
    cached: int
    tokens: int
    quota: int | None


async def _books(office: Office) -> Books | None:
    """Open them, unless there are none: looking makes no database."""
    return await office.register.books() if office.register.is_there else None


# Keys


async def list_keys(office: Office, service: Service, call: Call) -> Reply:
    """List the keys, the newest first."""
    del service, call
    books, now = await _books(office), time.time()
    found = await books.accounts.keys() if books else []
    rows = [_key_row(key, now) for key in reversed(found)]
    return written(KeysReply(office.config.accounts.auth, office.register.needs_key, rows))


def _key_row(key: ApiKey, now: float) -> KeyRow:
    ended = "revoked" if key.revoked_at is not None else "expired"
    return KeyRow(
        id=key.id,
        prefix=key.prefix,
        email=key.user.email,
        tier=key.user.tier.name,
        name=key.name,
        scopes=sorted(key.scopes),
        state="good" if key.is_good(now) else ended,
        created_at=key.created_at,
        expires_at=key.expires_at,
    )


async def create_key(office: Office, service: Service, call: Call) -> Reply:
    """Make a key and show it, this once; user and database are made where there are none."""
    del service
    body, now = decode_json(call, NewKey), time.time()
    scopes = parse_scopes(body.scopes) if body.scopes else DEFAULT_SCOPES
    books = await office.register.books()
    order = Order(
        user=await _user(books, body.email, body.tier),
        prefix=office.config.accounts.key_prefix,
        name=body.name,
        scopes=scopes,
        expires_at=now + body.expires_seconds if body.expires_seconds else None,
    )
    text = await issue(books.accounts, order, now=now)
    return written(await _shown(books, text.id, text.text), 201)


async def _user(books: Books, email: str, tier: str) -> User:
    """Find a user, or make one; a tier that is named is the user's from now on."""
    try:
        user = await books.accounts.user(email)
    except UnknownAccount:
        return await books.accounts.set_user(email, tier or "free", now=time.time())
    return await books.accounts.set_user(email, tier, now=time.time()) if tier not in ("", user.tier.name) else user


async def _shown(books: Books, key_id: str, text: str) -> KeyReply:
    return KeyReply(text, await _row_of(books, key_id))


async def _row_of(books: Books, key_id: str) -> KeyRow:
    if (key := await books.accounts.find_key(key_id)) is None:
        raise UnknownAccount(f"there is no key {key_id!r}", param="key")
    return _key_row(key, time.time())


async def revoke_key(office: Office, service: Service, call: Call) -> Reply:
    """End a key for good; servers follow within five seconds."""
    del service
    books, key_id = await office.register.books(), call.params["id"]
    await books.accounts.revoke(key_id, now=time.time())
    return written(await _row_of(books, key_id))


async def rotate_key(office: Office, service: Service, call: Call) -> Reply:
    """Make a key like an old one and show it, this once; the old one ends after a while."""
    del service
    grace, books = decode_json(call, Grace).grace_seconds, await office.register.books()
    text = await rotate(books.accounts, call.params["id"], now=time.time(), grace_seconds=grace)
    return written(await _shown(books, text.id, text.text), 201)


# Users and tiers


async def list_users(office: Office, service: Service, call: Call) -> Reply:
    """List the users, the first one first."""
    del service, call
    books = await _books(office)
    users: Sequence[User] = await books.accounts.users() if books else ()
    return written([UserRow(user.email, user.tier.name, user.created_at) for user in users])


async def set_user(office: Office, service: Service, call: Call) -> Reply:
    """Add a user, or move one to another tier, with all its keys."""
    del service
    body, books = decode_json(call, UserBody), await office.register.books()
    user = await books.accounts.set_user(body.email, body.tier, now=time.time())
    return written(UserRow(user.email, user.tier.name, user.created_at))


async def list_tiers(office: Office, service: Service, call: Call) -> Reply:
    """List the tiers with their limits; where there is no database yet, those that it begins with."""
    del service, call
    books = await _books(office)
    return written([_tier_row(tier) for tier in (await books.accounts.tiers() if books else FIRST_TIERS)])


def _tier_row(tier: Tier) -> TierRow:
    rate = tier.rate
    return TierRow(tier.name, tier.monthly_embeddings, rate.per_second if rate else None, rate.burst if rate else None)


async def set_tier(office: Office, service: Service, call: Call) -> Reply:
    """Add a tier, or change the limits of one; those who have it feel it within seconds."""
    del service
    body = decode_json(call, TierRow)
    if (body.rate_per_second is None) != (body.burst is None):
        raise InvalidInput("a rate has two parts: give rate_per_second and burst, or neither", param="burst")
    rate = (
        Rate(body.rate_per_second, body.burst) if body.rate_per_second is not None and body.burst is not None else None
    )
    tier = Tier(body.name, body.monthly_embeddings, rate)
    await (await office.register.books()).accounts.set_tier(tier)
    return written(_tier_row(tier))


# Usage


async def show_usage(office: Office, service: Service, call: Call) -> Reply:
    """Sum up what was used in a month: this one, or `?period=2026-07`."""
    del service
    period, books = call.query.get("period") or period_of(time.time()), await _books(office)
    if books is None:
        return written([])
    quotas = {user.email: user.tier.monthly_embeddings for user in await books.accounts.users()}
    return written(
        [
            UsageRow(
                period=total.period,
                email=total.email,
                key=total.key_id,
                model=total.model,
                requests=total.requests,
                embeddings=total.embeddings,
                cached=total.cached,
                tokens=total.tokens,
                quota=quotas.get(total.email),
            )
            for total in await books.ledger.totals(period=period)
        ]
    )
