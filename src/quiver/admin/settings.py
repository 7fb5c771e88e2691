"""The settings as they are in force."""

from collections.abc import Callable

import msgspec

from quiver import config
from quiver.admin.office import Office, written
from quiver.api.call import Call, Reply
from quiver.service import Service
from quiver.telemetry.redaction import redactor


class SettingRow(msgspec.Struct):
    """One setting; a secret's value is `***`."""

    name: str
    value: str
    default: str
    is_changed: bool
    help: str
    env: str


class SectionRow(msgspec.Struct):
    """The settings that one part of the server reads."""

    name: str
    settings: list[SettingRow]


async def show_settings(office: Office, service: Service, call: Call) -> Reply:
    """Show every setting with its value and its default."""
    del service, call
    values, defaults = config.describe(office.config), config.describe(config.Config())
    redact = redactor(config.secrets(office.config))  # a password may stand in an address, too
    sections = {
        name: SectionRow(name, [_row(key, values[name][key], defaults[name][key], redact) for key in values[name]])
        for name in values
    }
    return written(list(sections.values()))


def _row(name: str, value: object, default: object, redact: Callable[[str], str]) -> SettingRow:
    field = config.FIELDS[name]
    return SettingRow(name, redact(_text(value)), _text(default), value != default, field.help, field.env_names[0])


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)
