"""How people write durations, ends and bounds on the command line, and how times, counts and tables look there."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from quiver.accounts import Rate, Tier
from quiver.errors import InvalidInput

NONE = "none"
"""Written where there is no bound."""
MAX_DAYS = 36_500
MAX_NUMBER = 10**15
BAR_WIDTH = 10
FILE_WIDTH = 10_000
"""A table that no terminal shows has all of a row in one line."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


# What people write


def seconds_of(text: str) -> float:
    """Read a duration: 90d, 24h, 30m, 45s, 2w. Raises `InvalidInput`."""
    match = re.fullmatch(r"([0-9]{1,12})([smhdw])", text.strip())
    seconds = int(match[1]) * _SECONDS[match[2]] if match else math.inf
    if seconds > MAX_DAYS * _SECONDS["d"]:
        raise InvalidInput(
            f"{text!r} is no duration: it takes a number and s, m, h, d or w (90d, 24h), up to {MAX_DAYS}d"
        )
    return float(seconds)


def end_of(text: str, now: float) -> float:
    """Read when something ends: after a duration, or with the end of a day (UTC). Raises `InvalidInput`."""
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text.strip()):
        end = _end_of_day(text.strip())
    else:
        end = now + seconds_of(text)
    if end <= now:
        raise InvalidInput(f"{text!r} is over already: name a later day, or a duration such as 90d")
    return end


def _end_of_day(text: str) -> float:
    try:
        day = date.fromisoformat(text)
        return datetime.combine(day + timedelta(days=1), time(), UTC).timestamp()
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"{text!r} is no day: write it like 2027-01-31") from error


def id_of(text: str) -> str:
    """Read the id of a key: alone, with its prefix, or in a whole key, whose secret is not repeated."""
    parts = text.strip().split("_")
    key_id = parts[1] if len(parts) > 1 else parts[0]
    if not re.fullmatch(r"[0-9A-Za-z]{12}", key_id):
        raise InvalidInput("a key's id has 12 letters and digits: `quiver keys list` shows them", param="key")
    return key_id


def period_of(text: str) -> str:
    """Check the name of a month. Raises `InvalidInput`."""
    if not re.fullmatch(r"[0-9]{4}-(0[1-9]|1[0-2])", text):
        raise InvalidInput(f"{text!r} is no month: write it like 2026-07", param="period")
    return text


def changed(tier: Tier, *, monthly: str = "", rate: str = "", burst: str = "") -> Tier:
    """Return a tier with what is given: numbers, or `none` for no bound. Raises `InvalidInput`."""
    quota = tier.monthly_embeddings if not monthly else None if monthly == NONE else int(_number(monthly, "--monthly"))
    return replace(tier, monthly_embeddings=quota, rate=_changed(tier.rate, rate, burst))


def _changed(old: Rate | None, rate: str, burst: str) -> Rate | None:
    if rate == NONE and burst in ("", NONE):
        return None
    if not (rate or burst):
        return old
    if NONE in (rate, burst) or (old is None and not (rate and burst)):
        raise InvalidInput("a rate has two parts: --rate 40 --burst 80; --rate none takes both away")
    per_second = _number(rate, "--rate") if rate or old is None else old.per_second
    at_once = _number(burst, "--burst") if burst or old is None else old.burst
    return Rate(per_second, at_once)


def _number(text: str, option: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= MAX_NUMBER or (option == "--monthly" and number % 1):
        raise InvalidInput(f"{option} = {text!r} is no number that bounds anything; {NONE} is for no bound")
    return number


# What people read


def moment(unix_seconds: float | None) -> datetime | None:
    """Return a time as it is shown; None stays."""
    return None if unix_seconds is None else datetime.fromtimestamp(int(unix_seconds), UTC)


def written(unix_seconds: float) -> str:
    """Write a time for people."""
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def limits(tier: Tier) -> str:
    """Write a tier with its limits."""
    quota = "no quota" if tier.monthly_embeddings is None else f"{tier.monthly_embeddings:,} embeddings a month"
    rate = (
        f"{tier.rate.per_second:g} requests a second, {tier.rate.burst:g} at once"
        if tier.rate
        else "no rate of its own"
    )
    return f"tier {tier.name}: {quota}, {rate}"


def part_of(used: int, quota: int | None) -> str:
    """Draw how much of a quota is used."""
    if quota is None:
        return f"{used:,}, no quota"
    part = used / quota if quota else 1.0
    full = min(BAR_WIDTH, int(part * BAR_WIDTH))
    return f"{'#' * full}{'.' * (BAR_WIDTH - full)} {part:.0%} of {quota:,}"


def show(lines: Sequence[Mapping[str, Any]], *, as_json: bool, hidden: Collection[str] = ()) -> None:
    """Print a table without the hidden columns, or one JSON object a line. Times are in UTC."""
    if as_json:
        for line in lines:
            typer.echo(json.dumps({name: _plain(value) for name, value in line.items()}))
    elif lines:
        _show_table([{name: value for name, value in line.items() if name not in hidden} for line in lines])
    else:
        say("There is nothing yet.")


def _plain(value: Any) -> Any:
    return value.strftime("%Y-%m-%dT%H:%M:%SZ") if isinstance(value, datetime) else value


def _show_table(lines: Sequence[Mapping[str, Any]]) -> None:
    table = Table()
    for name, first in lines[0].items():
        longest_word = max(len(word) for line in lines for word in (name, *_cell(line[name]).split()))
        table.add_column(name, justify="right" if isinstance(first, int | float) else "left", min_width=longest_word)
    for line in lines:
        table.add_row(*map(_cell, line.values()))
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(table, crop=False)  # a key's id is of no use cut short: rather the terminal breaks the line


def _cell(value: Any) -> str:
    match value:
        case None:
            return NONE
        case datetime():
            return value.strftime("%Y-%m-%d %H:%M")
        case list():
            return ", ".join(value)
        case int() | float():
            return f"{value:,.15g}"
    return str(value)


def say(text: str) -> None:
    """Tell a person what happened, beside the output itself."""
    typer.echo(text, err=True)
