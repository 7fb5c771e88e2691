"""Accounts as an operator types them: a key's whole life by the real command, over SQLite and a real PostgreSQL."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from quiver import db
from quiver.accounts import DEFAULT_SCOPES, Tier, UsageEntry
from quiver.cli import cli
from quiver.db import Accounts, Database, Ledger
from quiver.errors import Unauthorized, UnknownAccount
from quiver.keyring import Keyring
from server_process import clean_environment, run
from stores import database_url, opened

EX_DATA = 65
EX_CONFIG = 78
KEY = re.compile(r"(?P<prefix>[a-z]{2,8})_(?P<id>[0-9A-Za-z]{12})_(?P<secret>[0-9A-Za-z]{43})_[0-9A-Za-z]{6}\n")
NOW = 1_782_950_400.0  # 2026-07-02
UNREACHABLE = "postgresql://quiver:s3cret@127.0.0.1:1/name?password=s3cret"
EVERY_COMMAND = (
    ("keys", "create", "--email", "ann@b.c"),
    ("keys", "list"),
    ("keys", "revoke", "a" * 12),
    ("keys", "rotate", "a" * 12),
    ("users", "list"),
    ("users", "set", "ann@b.c", "--tier", "pro"),
    ("tiers", "list"),
    ("tiers", "set", "pro", "--monthly", "1"),
    ("usage",),
    ("db", "upgrade"),
    ("db", "status"),
)
ASKING = tuple(words for words in EVERY_COMMAND if not {"create", "set", "upgrade"} & set(words))
"""Those that make no database."""


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """Name an empty database of each kind."""
    async with database_url(request.param, tmp_path) as url:
        yield url


async def typed(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command itself, as a process."""
    return await asyncio.to_thread(run, *words, DATABASE_URL=url)


def type_in(url: str, *words: str) -> Any:
    """Run a command in this process; what it raises is raised here."""
    return CliRunner(env={"DATABASE_URL": url}).invoke(cli, words, catch_exceptions=False)


async def done(url: str, *words: str) -> str:
    """Run a command beside this event loop, and return what it printed; it must work."""
    ended = await asyncio.to_thread(type_in, url, *words)
    assert ended.exit_code == 0, ended.stderr
    return ended.stdout


async def listed(url: str, *words: str) -> list[Any]:
    """Return what a command prints with `--json`."""
    return [json.loads(line) for line in (await done(url, *words, "--json")).splitlines()]


async def identified(url: str, key: str) -> Any:
    """Return what a server finds out about a key."""
    async with Database(url) as database, Keyring(Accounts(database).find_key) as ring:
        return await ring.identify(key.strip())


async def everything_in(url: str) -> bytes:
    """Return all that a database has written."""
    if file := db.file_of(url):
        return b"".join(path.read_bytes() for path in file.parent.glob(f"{file.name}*"))
    async with Database(url) as database:
        tables = "tiers", "users", "keys", "usage", "usage_totals"
        rows = [await database.read(lambda c, t=t: c.execute(text(f"SELECT * FROM {t}"))) for t in tables]  # noqa: S608
        return repr([list(found) for found in rows]).encode()


# Keys


async def test_a_key_lives(url):
    """It is made with its user and the database, printed once, good, rotated with a grace, and ends when it is revoked."""
    made = await typed(url, "keys", "create", "--email", "Ann@B.c", "--tier", "pro", "--scopes", "embed, rerank")
    assert made.returncode == 0, made.stderr
    key = KEY.fullmatch(made.stdout)
    assert key, made.stdout
    for said in ("ran 0001", f"Key {key['id']} of ann@b.c", "tier pro: 100,000", "embed, rerank", "not shown again"):
        assert said in made.stderr
    assert key["secret"] not in made.stderr
    found = await identified(url, made.stdout)
    assert (found.id, found.user.tier.name, found.scopes) == (key["id"], "pro", {"embed", "rerank"})

    renewed = KEY.fullmatch((await typed(url, "keys", "rotate", key["id"], "--grace", "1h")).stdout)
    assert renewed
    newer = await identified(url, renewed.string)
    assert (newer.user, newer.scopes, newer.expires_at) == (found.user, found.scopes, None)
    older = await identified(url, made.stdout)
    assert older.expires_at - newer.created_at == pytest.approx(3600, abs=1)

    assert (await typed(url, "keys", "revoke", f"qv_{key['id']}")).returncode == 0
    with pytest.raises(Unauthorized):
        await identified(url, made.stdout)
    lines = await listed(url, "keys", "list", "--email", "ANN@b.c")
    assert [(line["key"], line["state"]) for line in lines] == [
        (f"qv_{key['id']}", "revoked"),
        (f"qv_{renewed['id']}", "good"),
    ]
    assert await identified(url, renewed.string)


async def test_a_secret_is_kept_nowhere(url):
    """A database that was stolen opens nothing; the id that stands beside it is found there, so the search works."""
    key = KEY.fullmatch(await done(url, "keys", "create", "--email", "ann@b.c"))
    assert key
    written = await everything_in(url)
    assert key["id"].encode() in written
    assert key["secret"].encode() not in written
    assert key["secret"] not in str(await listed(url, "keys", "list"))


async def test_a_rotation_without_grace_ends_the_old_key_at_once(url):
    """What leaked is good no more, and the whole key may be given to say which."""
    old = await done(url, "keys", "create", "--email", "ann@b.c", "--expires", "90d", "--name", "laptop")
    ended = await asyncio.to_thread(type_in, url, "keys", "rotate", old.strip(), "--grace", "0s")
    assert "is revoked" in ended.stderr
    with pytest.raises(Unauthorized):
        await identified(url, old)
    first, second = await listed(url, "keys", "list")
    assert (first["state"], second["state"]) == ("revoked", "good")
    assert (second["name"], second["expires"]) == ("laptop", first["expires"])

    with pytest.raises(UnknownAccount, match="that is still good"):
        await done(url, "keys", "rotate", first["id"])


def test_settings_say_how_a_key_begins_and_what_it_is_good_for_by_default(tmp_path):
    """The prefix is a setting, and no scope that was not asked for opens the administration."""
    url = db.sqlite_url(tmp_path)
    made = KEY.fullmatch(type_in(url, "keys", "create", "--email", "a@b.c", "--key-prefix", "fe").stdout)
    assert made
    assert made["prefix"] == "fe"
    (line,) = parsed(type_in(url, "keys", "list", "--json").stdout)
    assert set(line["scopes"]) == DEFAULT_SCOPES
    assert (line["tier"], line["expires"], line["revoked"]) == ("free", None, None)


def parsed(stdout: str) -> list[Any]:
    """Read one JSON object a line."""
    return [json.loads(line) for line in stdout.splitlines()]


def test_the_first_key_is_said_to_close_the_doors(tmp_path):
    """From the first one on servers ask for keys, which its maker should know; the second changes nothing."""
    url = db.sqlite_url(tmp_path)
    said = [type_in(url, "keys", "create", "--email", "a@b.c").stderr for _ in range(2)]
    assert ["first key" in words for words in said] == [True, False]


def test_a_users_tier_stays_unless_it_is_named(tmp_path):
    """A second key of a user moves nobody, unless it is told to."""
    url = db.sqlite_url(tmp_path)
    for more, wanted, moved in (
        (["--tier", "scale"], "scale", False),
        ([], "scale", False),
        (["--tier", "pro"], "pro", True),
    ):
        said = type_in(url, "keys", "create", "--email", "a@b.c", *more).stderr
        assert ("moved from tier scale to pro" in said) == moved
        assert [line["tier"] for line in parsed(type_in(url, "users", "list", "--json").stdout)] == [wanted]


def test_a_table_shows_what_was_written_and_cuts_no_key(tmp_path):
    """A name that looks like markup stays as it is, and a key's id is whole in a file and at a narrow terminal."""
    url = db.sqlite_url(tmp_path)
    key = KEY.fullmatch(type_in(url, "keys", "create", "--email", "a@b.c", "--name", "[/red] :smile:").stdout)
    assert key
    for env in ({}, {"FORCE_COLOR": "1", "COLUMNS": "40"}):
        shown = CliRunner(env={"DATABASE_URL": url, **env}).invoke(cli, ["keys", "list"]).stdout
        assert f"qv_{key['id']}" in shown
        assert key["secret"] not in shown
    assert "[/red] :smile:" in type_in(url, "keys", "list").stdout


# Tiers and usage


async def test_tiers_and_users_are_set(url):
    """What is given changes, what is not stays, and a user moves with all the keys."""
    await done(url, "tiers", "set", "pro", "--monthly", "500000")
    await done(url, "tiers", "set", "gold", "--monthly", "none", "--rate", "2.5", "--burst", "5")
    await done(url, "users", "set", "ann@b.c", "--tier", "gold")
    assert {"tier": "pro", "monthly": 500_000, "rate": 40, "burst": 80} in await listed(url, "tiers", "list")
    assert {"tier": "gold", "monthly": None, "rate": 2.5, "burst": 5} in await listed(url, "tiers", "list")
    assert [(line["user"], line["tier"]) for line in await listed(url, "users", "list")] == [("ann@b.c", "gold")]


async def test_usage_is_summed_up_beside_the_quota(url):
    """Each month, user, key and model has its sums, and a user's month the part of its quota."""
    async with opened(url) as database:
        for email, tier in (("ann@b.c", "free"), ("bob@b.c", "pro")):
            await Accounts(database).set_user(email, tier, now=NOW)
        await Accounts(database).set_tier(Tier("pro"))
        facts = [(1, "m", 4000), (1, "n", 5000), (2, "m", 7)]
        entries = [
            UsageEntry(request_id=m + str(u), user_id=u, key_id="a" * 12, model=m, embeddings=n, created_at=NOW)
            for u, m, n in facts
        ]
        await Ledger(database).apply(entries)

    lines = await listed(url, "usage", "--period", "2026-07")
    assert [(line["user"], line["model"], line["embeddings"], line["quota_used"], line["quota"]) for line in lines] == [
        ("ann@b.c", "m", 4000, 9000, 20_000),
        ("ann@b.c", "n", 5000, 9000, 20_000),
        ("bob@b.c", "m", 7, 7, None),
    ]
    table = await done(url, "usage")
    assert table.count("####...... 45% of 20,000") == 1
    assert "7, no quota" in table
    assert await listed(url, "usage", "--email", "BOB@b.c") == lines[2:]
    assert await listed(url, "usage", "--period", "2026-08") == []


# Bad input


BAD = [
    (["keys", "create", "--email", "nobody"], "no e-mail address"),
    (["keys", "create", "--email", "a@b.c", "--tier", "golf"], "no tier 'golf' (there are: free, pro, scale)"),
    (["keys", "create", "--email", "a@b.c", "--scopes", "embed,fly"], "no scope 'fly'"),
    (["keys", "create", "--email", "a@b.c", "--expires", "soon"], "'soon' is no duration"),
    (["keys", "create", "--email", "a@b.c", "--name", "\x1b[2J"], "no name of a key"),
    (["keys", "create", "--email", "a@b.c", "--name", "x" * 201], "no name of a key"),
    (["keys", "list", "--email", "no@b.c"], "no user 'no@b.c'"),
    (["keys", "revoke", "nobody"], "12 letters"),
    (["keys", "revoke", "a" * 12], "no key 'aaaaaaaaaaaa'"),
    (["keys", "rotate", "a" * 12, "--grace", "later"], "'later' is no duration"),
    (["tiers", "set", "pro"], "say what to set"),
    (["tiers", "set", "own", "--rate", "3"], "a rate has two parts"),
    (["tiers", "set", "x" * 65, "--rate", "none"], "no name of a tier"),
    (["users", "set", "a@b.c", "--tier", "\udcff"], "no name of a tier"),
    (["usage", "--period", "2026-13"], "'2026-13' is no month"),
    (["usage", "--email", "no@b.c"], "no user 'no@b.c'"),
]


@pytest.mark.parametrize(
    ("words", "wanted"), BAD, ids=lambda part: " ".join(part[:2]) if isinstance(part, list) else ""
)
async def test_bad_input_is_said(url, words, wanted):
    """It is refused as the caller's mistake on both kinds of database, and no key comes of it."""
    async with opened(url):
        pass
    with pytest.raises(Exception, match=re.escape(wanted)) as caught:
        await asyncio.to_thread(type_in, url, *words)
    assert caught.type.__module__ == "quiver.errors"
    async with Database(url) as database:
        assert await Accounts(database).keys() == []


def test_bad_input_is_one_line_with_65(tmp_path):
    """Nothing is on standard output where a script would take it for a key."""
    ended = run("keys", "create", "--email", "x", DATABASE_URL=db.sqlite_url(tmp_path))
    assert (ended.returncode, ended.stdout) == (EX_DATA, "")
    assert ended.stderr.endswith("quiver: 'x' is no e-mail address\n")


# The database


async def test_the_database_is_made_and_told(url):
    """`upgrade` says what ran, a second one that nothing was missing, and `status` where it is, without a password."""
    assert "ran 0001" in await done(url, "db", "upgrade")
    assert "is at 0003: nothing was missing" in await done(url, "db", "upgrade")
    assert "is at 0003: nothing is missing" in await done(url, "db", "status")
    assert ":quiver@" not in await done(url, "db", "status")


async def test_what_only_asks_changes_no_database(tmp_path):
    """Where there is none it makes none, and where tables are missing it says what makes them."""
    url, file = db.sqlite_url(tmp_path / "new"), tmp_path / "new" / "quiver.db"
    for words in ASKING:
        with pytest.raises(Exception, match="there is no database"):
            await asyncio.to_thread(type_in, url, *words)
    assert not file.parent.exists()

    file.parent.mkdir()
    file.touch()
    assert (await typed(url, "db", "status")).returncode == 1
    with pytest.raises(Exception, match="lacks 0001, 0002, 0003: run `quiver db upgrade`"):
        await asyncio.to_thread(type_in, url, "keys", "list")


async def test_a_newer_database_is_refused_by_every_command(url):
    """None touches tables that it does not know; the exit code is EX_CONFIG."""
    async with opened(url) as database:
        await database.write(lambda c: c.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    for words in EVERY_COMMAND:
        with pytest.raises(Exception, match="belongs to a newer version of Quiver"):
            await asyncio.to_thread(type_in, url, *words)
    assert (await typed(url, "keys", "list")).returncode == EX_CONFIG


def test_an_unreachable_database_is_named_without_its_password():
    """Each command says in one line where it should be; the exit code is EX_CONFIG."""
    ended = run("keys", "create", "--email", "a@b.c", DATABASE_URL=UNREACHABLE)
    assert (ended.returncode, ended.stdout) == (EX_CONFIG, "")
    assert re.fullmatch(r"quiver: postgresql://quiver:\*\*\*@127\.0\.0\.1:1/name failed: [^\n]+\n", ended.stderr), (
        ended.stderr
    )
    for words in EVERY_COMMAND:
        with pytest.raises(Exception, match=r"quiver:\*\*\*@127\.0\.0\.1:1/name failed") as caught:
            type_in(UNREACHABLE, *words)
        assert "s3cret" not in str(caught.value)


def test_other_commands_do_not_wait_for_the_databases_packages():
    """The commands are there before SQLAlchemy and bcrypt are, which take a while to import."""
    program = "import sys, quiver.cli_accounts; print({'sqlalchemy', 'alembic', 'bcrypt'} & set(sys.modules))"
    ended = subprocess.run(  # noqa: S603  our own words
        [sys.executable, "-c", program], capture_output=True, text=True, env=clean_environment(), check=True
    )
    assert ended.stdout == "set()\n"
