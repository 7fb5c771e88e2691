"""Users, tiers and keys in the database."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import RowMapping, Select, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from quiver.accounts import ApiKey, Rate, Tier, User
from quiver.db.database import Database
from quiver.db.tables import KEYS, TIERS, USERS
from quiver.errors import InvalidInput, UnknownAccount

_MAX_EMAIL = 320
_MAX_TIER = 64
_MAX_NAME = 200


class Accounts:
    """What is kept of those who may call."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def tiers(self) -> list[Tier]:
        """List the tiers by name."""
        rows = await self._all(select(TIERS).order_by(TIERS.c.name))
        return [_tier(row) for row in rows]

    async def set_tier(self, tier: Tier) -> None:
        """Add a tier, or change the limits of one; those who have it feel it within seconds. Raises `InvalidInput`."""
        _check_text(tier.name, "name of a tier", at_most=_MAX_TIER, param="tier")
        rate = tier.rate
        values = {
            "monthly_embeddings": tier.monthly_embeddings,
            "rate_per_second": rate.per_second if rate else None,
            "burst": rate.burst if rate else None,
        }
        insert = self._insert(TIERS).values(name=tier.name, **values)
        await self._run(insert.on_conflict_do_update(index_elements=["name"], set_=values))

    async def set_user(self, email: str, tier: str, *, now: float) -> User:
        """Add a user, or move one to another tier. Raises `UnknownAccount` for a tier that there is not."""
        email = _checked(email)
        _check_text(tier, "name of a tier", at_most=_MAX_TIER, param="tier")
        insert = self._insert(USERS).values(email=email, tier=tier, created_at=now)
        try:
            await self._run(insert.on_conflict_do_update(index_elements=["email"], set_={"tier": tier}))
        except IntegrityError as error:
            known = ", ".join(tier.name for tier in await self.tiers())
            raise UnknownAccount(f"there is no tier {tier!r} (there are: {known})", param="tier") from error
        return await self.user(email)

    async def user(self, email: str) -> User:
        """Find a user. Raises `UnknownAccount`."""
        rows = await self._all(_users().where(USERS.c.email == _checked(email)))
        if not rows:
            raise UnknownAccount(f"there is no user {email!r}", param="email")
        return _user(rows[0])

    async def users(self) -> list[User]:
        """List the users, the first one first."""
        return [_user(row) for row in await self._all(_users().order_by(USERS.c.id))]

    async def add_key(self, key: ApiKey) -> None:
        """Keep a new key. Raises `InvalidInput` for a name that cannot be shown."""
        _check_text(key.name or "-", "name of a key", at_most=_MAX_NAME, param="name")
        await self._run(
            self._insert(KEYS).values(
                id=key.id,
                prefix=key.prefix,
                hash=key.hash,
                user_id=key.user.id,
                name=key.name,
                scopes=" ".join(sorted(key.scopes)),
                created_at=key.created_at,
                expires_at=key.expires_at,
                revoked_at=key.revoked_at,
            )
        )

    async def find_key(self, key_id: str) -> ApiKey | None:
        """Find a key with its user and tier; None where there is none."""
        rows = await self._all(_keys().where(KEYS.c.id == key_id))
        return _key(rows[0]) if rows else None

    async def keys(self, email: str | None = None) -> list[ApiKey]:
        """List the keys of one user, or all, the oldest first."""
        query = _keys().order_by(KEYS.c.created_at, KEYS.c.id)
        return [_key(row) for row in await self._all(query.where(USERS.c.email == email) if email else query)]

    async def has_keys(self) -> bool:
        """Whether there is any key at all, good or not: from the first one on, calls need one."""
        return bool(await self._all(select(KEYS.c.id).limit(1)))

    async def revoke(self, key_id: str, *, now: float) -> None:
        """End a key now; one that was revoked before stays so. Raises `UnknownAccount`."""
        await self._change(key_id, revoked_at=func.coalesce(KEYS.c.revoked_at, now))

    async def expire(self, key_id: str, *, at: float) -> None:
        """Let a key end at a time, or earlier where it would anyway. Raises `UnknownAccount`."""
        earlier = func.least if self._database.dialect == "postgresql" else func.min
        await self._change(key_id, expires_at=earlier(func.coalesce(KEYS.c.expires_at, at), at))

    async def _change(self, key_id: str, **values: Any) -> None:
        async def work(connection: AsyncConnection) -> int:
            return (await connection.execute(update(KEYS).where(KEYS.c.id == key_id).values(values))).rowcount

        if not await self._database.write(work):
            raise UnknownAccount(f"there is no key {key_id!r}", param="key")

    async def _run(self, statement: Any) -> None:
        await self._database.write(lambda connection: connection.execute(statement))

    async def _all(self, query: Select[Any]) -> Sequence[RowMapping]:
        async def work(connection: AsyncConnection) -> Sequence[RowMapping]:
            rows: Sequence[RowMapping] = (await connection.execute(query)).mappings().all()
            return rows

        return await self._database.read(work)

    def _insert(self, table: Any) -> Any:
        return (postgresql if self._database.dialect == "postgresql" else sqlite).insert(table)


def _checked(email: str) -> str:
    """Write an address as it is compared. Raises `InvalidInput` for what is none."""
    name, _, host = email.strip().lower().rpartition("@")
    if not (name and host) or len(email) > _MAX_EMAIL or any(c.isspace() or not c.isprintable() for c in name + host):
        raise InvalidInput(f"{email!r} is no e-mail address", param="email")
    return f"{name}@{host}"


def _check_text(text: str, what: str, *, at_most: int, param: str) -> None:
    """Refuse what would not fit, or would do something to the terminal that shows it. Raises `InvalidInput`."""
    if not (0 < len(text) <= at_most and text.isprintable()):
        raise InvalidInput(f"{text[:at_most]!r} is no {what}: 1 to {at_most} letters, in one line", param=param)


def _users() -> Select[Any]:
    joined = USERS.join(TIERS, USERS.c.tier == TIERS.c.name)
    return select(USERS.c.id, USERS.c.email, USERS.c.created_at, *TIERS.c).select_from(joined)


def _keys() -> Select[Any]:
    joined = KEYS.join(USERS, KEYS.c.user_id == USERS.c.id).join(TIERS, USERS.c.tier == TIERS.c.name)
    user = (USERS.c.email, USERS.c.created_at.label("user_created_at"))
    limits = (TIERS.c.name.label("tier"), TIERS.c.monthly_embeddings, TIERS.c.rate_per_second, TIERS.c.burst)
    return select(*KEYS.c, *user, *limits).select_from(joined)


def _tier(row: RowMapping, name: str = "name") -> Tier:
    rate = Rate(row["rate_per_second"], row["burst"]) if row["rate_per_second"] is not None else None
    return Tier(row[name], row["monthly_embeddings"], rate)


def _user(row: RowMapping) -> User:
    return User(row["id"], row["email"], _tier(row), row["created_at"])


def _key(row: RowMapping) -> ApiKey:
    return ApiKey(
        id=row["id"],
        prefix=row["prefix"],
        hash=row["hash"],
        user=User(row["user_id"], row["email"], _tier(row, "tier"), row["user_created_at"]),
        name=row["name"],
        scopes=frozenset(row["scopes"].split()),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
    )
