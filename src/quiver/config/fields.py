"""Every setting with all its names: what the file, the environment, the command line and the docs call it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from quiver.config.tree import Config
from quiver.errors import ConfigError

SWITCH = dict.fromkeys(("true", "1", "yes", "y", "on", "t"), True) | dict.fromkeys(
    ("false", "0", "no", "n", "off", "f"), False
)
"""What a switch may be set to."""
MILLISECONDS = "ms"


@dataclass(frozen=True, slots=True)
class Alias:
    """What another system calls a setting: a variable of the environment, or a flag with its dashes."""

    names: tuple[str, ...]
    """Several are parts of one list, which are put one after another."""
    unit: str = ""
    stands_for: str = ""
    """It is a switch, and this is the value that it stands for."""
    below: str = ""
    """It is a directory, and this is what is meant of it."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the notation of the tree: NAME, NAME:ms (milliseconds), NAME=value (a switch), NAME/name, or NAME+NAME."""
        text, _, stands_for = text.partition("=")
        text, _, unit = text.partition(":")
        text, _, below = text.partition("/")
        return cls(tuple(text.split("+")), unit, stands_for, below)

    @property
    def is_flag(self) -> bool:
        """Whether it belongs on the command line."""
        return self.names[0].startswith("-")

    def find(self, env: Mapping[str, str]) -> tuple[str, str] | None:
        """Return the name under which the environment sets it, and our own form of the value."""
        found = {name: env[name] for name in self.names if env.get(name)}
        name = " and ".join(found)
        value = self.translate(",".join(found.values()), name)
        return (name, value) if value else None

    def translate(self, text: str, name: str) -> str:
        """Turn a value into our own form; a switch that is off says nothing. Raises `ConfigError`."""
        if text and self.stands_for:
            return self.stands_for if is_on(text, name) else ""
        if self.unit == MILLISECONDS:
            try:
                return str(float(text) / 1000)
            except ValueError:
                return text  # it is refused as what it is
        return f"{text.rstrip('/')}/{self.below}" if text and self.below else text


def is_on(text: str, name: str) -> bool:
    """Tell whether a switch is on; raises `ConfigError` if it is neither on nor off."""
    word = text.strip().lower()
    if word not in SWITCH:
        raise ConfigError(f"{name} = {text!r} is neither true nor false")
    return SWITCH[word]


@dataclass(frozen=True, slots=True)
class Field:
    """One setting, as the file, the environment, the command line and the docs know it."""

    section: str
    name: str
    type: Any
    default: Any
    help: str
    aliases: tuple[Alias, ...]

    @property
    def env(self) -> tuple[Alias, ...]:
        """What the environment may call it, strongest first."""
        return (Alias((f"QUIVER_{self.name.upper()}",)), *(alias for alias in self.aliases if not alias.is_flag))

    @property
    def env_names(self) -> tuple[str, ...]:
        """Names in the environment, strongest first."""
        return tuple(name for alias in self.env for name in alias.names)

    @property
    def flag(self) -> str:
        """Name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        """Our own names on the command line: a switch has a second one that turns it off."""
        return (self.flag, f"--no-{self.flag[2:]}") if self.is_switch else (self.flag,)

    @property
    def cli(self) -> tuple[Alias, ...]:
        """What the command line may call it, our own names first."""
        return (*(Alias((name,)) for name in self.flags), *(alias for alias in self.aliases if alias.is_flag))

    @property
    def other_flags(self) -> tuple[str, ...]:
        """What other systems call it on the command line."""
        return tuple(name for alias in self.aliases if alias.is_flag for name in alias.names)

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return isinstance(self.default, tuple)

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return self.type is bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it takes; none: any."""
        kind = get_args(self.type)[0] if self.is_list else self.type
        return get_args(kind) if get_origin(kind) is Literal else ()


def sections() -> dict[str, type]:
    """Return the class of each part of the tree."""
    return {section.name: get_type_hints(Config)[section.name] for section in dataclasses.fields(Config)}


def _fields_of(section: str, cls: type) -> Iterable[Field]:
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        aliases = tuple(map(Alias.parse, f.metadata["also"]))
        yield Field(section, f.name, hints[f.name], f.default, f.metadata["help"], aliases)


FIELDS: dict[str, Field] = {
    field.name: field for section, cls in sections().items() for field in _fields_of(section, cls)
}
"""Every setting by its name."""

_OTHER_FLAGS: Mapping[str, tuple[Field, Alias]] = {
    name: (field, alias)
    for field in FIELDS.values()
    for alias in field.aliases
    if alias.is_flag
    for name in alias.names
}


def in_our_words(words: Sequence[str]) -> list[str]:
    """Put our own flags in the place of other systems': `--model-id X` is `--model=X`. Raises `ConfigError`.

    Their switches may stand alone or with a value behind them: `--auto-truncate false` is `--no-truncate`.
    """
    ours, left = [], list(words)
    while left and left[0] != "--":
        word = left.pop(0)
        name, sign, text = word.partition("=")
        if name not in _OTHER_FLAGS:
            ours.append(word)
            continue
        field, alias = _OTHER_FLAGS[name]
        is_switch = field.is_switch or bool(alias.stands_for)
        value = text if sign else "true" if is_switch else None
        if not sign and left and (not is_switch or left[0].lower() in SWITCH):
            value = left.pop(0)
        ours += _in_our_words(field, alias, name, value)
    return [*ours, *left]


def _in_our_words(field: Field, alias: Alias, name: str, value: str | None) -> Sequence[str]:
    if value is None:
        return [field.flag]  # the command line says what is missing
    if field.is_switch:
        return [field.flags[0 if is_on(value, name) else 1]]
    ours = alias.translate(value, name)
    return [f"{field.flag}={ours}"] if ours or not alias.stands_for else []
