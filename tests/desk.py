"""Where tests make accounts: a database beside a server, used as `quiver keys` does it in a process of its own."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from conftest import assembled
from quiver import db, keyring
from quiver.accounts import DEFAULT_SCOPES, Tier, UsageTotal, period_of
from quiver.api.call import Call, Reply
from quiver.api.server import HttpServer
from quiver.app import App
from quiver.config import AccountsConfig, Secret, ServerConfig
from quiver.keyring import Order
from stores import opened

ROUNDS = 4
FREE = Tier("unbound")
BODY = b'{"input": "a"}'


@dataclass(frozen=True)
class Desk:
    """One database, opened for each thing that is done in it."""

    url: str

    async def key(self, *, email: str = "ann@b.c", tier: Tier = FREE, **order: Any) -> str:
        """Make a key, with its user and tier; returns its text."""
        async with opened(self.url) as database:
            accounts = db.Accounts(database)
            await accounts.set_tier(tier)
            user = await accounts.set_user(email, tier.name, now=time.time())
            wanted = Order(user=user, **{"scopes": DEFAULT_SCOPES, **order})
            return (await keyring.issue(accounts, wanted, now=time.time(), rounds=ROUNDS)).text

    async def revoke(self, key: str) -> None:
        """End a key."""
        async with opened(self.url) as database:
            await db.Accounts(database).revoke(key.split("_")[1], now=time.time())

    async def totals(self) -> list[UsageTotal]:
        """Sum up what was used this month."""
        async with opened(self.url) as database:
            return await db.Ledger(database).totals(period=period_of(time.time()))


@contextlib.asynccontextmanager
async def staffed(
    folder: Path, *, accounts: Mapping[str, Any] | None = None, **more: Any
) -> AsyncIterator[tuple[App, Desk]]:
    """Put a server's parts together that asks for keys; yields them, and where keys are made."""
    url = db.sqlite_url(folder)
    section = AccountsConfig(**{"auth": "required", "database_url": Secret(url), **(accounts or {})})
    async with assembled(accounts=section, models={"data_dir": folder, **more.pop("models", {})}, **more) as parts:
        yield parts, Desk(url)


@contextlib.asynccontextmanager
async def over_http(parts: App) -> AsyncIterator[httpx.AsyncClient]:
    """Serve some parts on a port of this machine; yields a client."""
    config = ServerConfig(port=0, drain_seconds=2.0, drain_delay_seconds=0)
    server = HttpServer(parts.main, config, parts.config.tls)
    running = asyncio.create_task(server.run_until_stopped())
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
            yield client
    finally:
        server.stop()
        await running


async def post(parts: App, path: str, key: str = "", body: bytes = BODY, **headers: str) -> Reply:
    """Make a call with a key."""
    shown = {"authorization": f"Bearer {key}"} if key else {}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await parts.api.receive(Call("POST", path, {**shown, **named}, body))


async def get(parts: App, path: str, key: str = "", **query: str) -> Reply:
    """Ask for something with a key."""
    return await parts.api.receive(Call("GET", path, {"authorization": f"Bearer {key}"} if key else {}, query=query))
