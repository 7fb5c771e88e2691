"""What each of several processes gets of the settings that hold for the whole server."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from quiver.config.tree import Config

T = TypeVar("T")

DIVIDED = (
    "lanes",
    "encoders",
    "max_concurrent_requests",
    "max_inflight_bytes",
    "max_memory_bytes",
    "max_model_bytes",
    "cache_entries",
    "cache_bytes",
    "job_lines",
)
"""Amounts of the whole, of which each process gets its part; 0 says something else and stays."""


def portions(amount: int, count: int) -> tuple[int, ...]:
    """Divide an amount into so many whole parts, none of which is larger than another by more than one."""
    return tuple(amount // count + (number < amount % count) for number in range(count))


def divided(config: Config, count: int, number: int, *, memory_bytes: int = 0) -> Config:
    """Return the settings of one of `count` processes; `memory_bytes` is what all of them may hold if nothing is set.

    The parts of an amount add up to it, but none is 0 where the whole is not, and the largest body fits into each.
    """
    given = _with(config, {"max_memory_bytes": config.server.max_memory_bytes or memory_bytes, "processes": count})
    parts = {name: max(1, portions(value, count)[number]) for name, value in _amounts(given).items() if value}
    if "max_inflight_bytes" in parts:
        least = min(config.server.max_body_bytes, config.server.max_inflight_bytes)
        parts["max_inflight_bytes"] = max(least, parts["max_inflight_bytes"])
    return _with(given, parts)


def divisions(config: Config, count: int) -> dict[str, str]:
    """Say in words what is divided, and what it comes to: `max_concurrent_requests: 100 = 34 + 33 + 33`."""
    parts = [_amounts(divided(config, count, number)) for number in range(count)]
    return {
        name: f"{value} = {_sum([part[name] for part in parts])}" for name, value in _amounts(config).items() if value
    }


def _sum(parts: Sequence[int]) -> str:
    return " + ".join(map(str, parts)) if len(set(parts)) > 1 else f"{len(parts)} x {parts[0]}"


def _amounts(config: Config) -> dict[str, int]:
    sections = (getattr(config, section.name) for section in dataclasses.fields(config))
    return {name: getattr(section, name) for section in sections for name in DIVIDED if hasattr(section, name)}


def _with(config: Config, values: dict[str, Any]) -> Config:
    """Put values in the place of others, wherever in the tree they stand."""
    sections = {section.name: getattr(config, section.name) for section in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: _replaced(section, values) for name, section in sections.items()})


def _replaced(section: T, values: dict[str, Any]) -> T:
    mine = {name: value for name, value in values.items() if hasattr(section, name)}
    return dataclasses.replace(section, **mine) if mine else section  # type: ignore[type-var]
