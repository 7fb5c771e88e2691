"""Where settings come from: presets, files, the environment and flags, read into the tree."""

import dataclasses
import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from quiver.config.tree import PER_MODEL, Config, Secret
from quiver.errors import ConfigError

PRESETS = Path(__file__).parent.parent / "presets"
RESERVED_ENV = frozenset({"QUIVER_CONFIG", "QUIVER_PRESET"})
"""Names that choose a source and are not fields themselves."""
MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Field:
    """One setting, as the file, the environment, the command line and the docs know it."""

    section: str
    name: str
    type: Any
    default: Any
    help: str
    aliases: tuple[str, ...]

    @property
    def env_names(self) -> tuple[str, ...]:
        """Names in the environment, strongest first."""
        return (f"QUIVER_{self.name.upper()}", *self.aliases)

    @property
    def flag(self) -> str:
        """Name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return isinstance(self.default, tuple)


def _sections() -> dict[str, type]:
    return {section.name: get_type_hints(Config)[section.name] for section in dataclasses.fields(Config)}


def _fields_of(section: str, cls: type) -> Iterable[Field]:
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        yield Field(section, f.name, hints[f.name], f.default, f.metadata["help"], f.metadata["env"])


FIELDS: dict[str, Field] = {
    field.name: field for section, cls in _sections().items() for field in _fields_of(section, cls)
}
"""Every setting by its name."""


def load(
    *,
    preset: str | None = None,
    file: Path | None = None,
    env: Mapping[str, str],
    flags: Mapping[str, Any],
    presets: Path = PRESETS,
) -> Config:
    """Put the sources in order and return the tree; raises `ConfigError`. A flag of None was not given."""
    preset = preset or env.get("QUIVER_PRESET")
    file = file or (Path(env["QUIVER_CONFIG"]) if env.get("QUIVER_CONFIG") else None)
    values: dict[str, Any] = {}
    if preset:
        values |= _read_toml(_find_preset(preset, presets))
    if file:
        values |= _read_toml(file)
    values |= _read_env(env)
    values |= {name: _convert(FIELDS[name], value, FIELDS[name].flag) for name, value in flags.items() if _given(value)}
    return _build(values)


def _given(flag: Any) -> bool:
    return flag is not None and flag not in ([], ())


def _build(values: Mapping[str, Any]) -> Config:
    parts = {}
    for section, cls in _sections().items():
        mine = {f.name for f in FIELDS.values() if f.section == section}
        parts[section] = cls(**{name: value for name, value in values.items() if name in mine})
    config = Config(**parts)
    for name in PER_MODEL:
        given = getattr(config.models, name)
        if len(given) > 1 and len(given) != len(config.models.model):
            raise ConfigError(
                f"{name} has {len(given)} values for {len(config.models.model)} models: give one for all, or one for each"
            )
    return config


def _find_preset(name: str, presets: Path) -> Path:
    known = {path.stem: path for path in presets.glob("*.toml")}
    if name not in known:
        raise ConfigError(f"there is no preset {name!r}{_nearest(name, known)} (there are: {', '.join(sorted(known))})")
    return known[name]


def _read_toml(path: Path) -> dict[str, Any]:
    """Read `[section]` tables; every key must be a field of that section."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    values = {}
    for section, table in tables.items():
        if section not in _sections() or not isinstance(table, dict):
            raise ConfigError(f"{path}: there is no section [{section}]{_nearest(section, _sections())}")
        for name, value in table.items():
            field = FIELDS.get(name)
            if field is None or field.section != section:
                raise ConfigError(f"{path}: [{section}] has no key {name!r}{_nearest(name, FIELDS)}")
            values[name] = _convert(field, value, f"{path} [{section}] {name}")
    return values


def _read_env(env: Mapping[str, str]) -> dict[str, Any]:
    """Take each field's first name that is set; a `QUIVER_…` that is nobody's name is an error."""
    ours = {name for field in FIELDS.values() for name in field.env_names} | RESERVED_ENV
    for name in env:
        if name.startswith("QUIVER_") and name not in ours:
            known = [n for n in ours if n.startswith("QUIVER_")]
            raise ConfigError(f"the environment sets {name}, which is no setting{_nearest(name, known)}")
    values = {}
    for field in FIELDS.values():
        for name in field.env_names:
            text = env.get(name, "")
            if text and not (name == "HOSTNAME" and not _is_address(text)):
                values[field.name] = _convert(field, text, f"environment {name}")
                break
    return values


def _is_address(text: str) -> bool:
    """HOSTNAME is set by every container to its own name: only an address is meant for us."""
    if text == "localhost":
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "port": (lambda value: 0 <= value <= MAX_PORT, "0 (any free port) to 65535"),
    "lanes": (lambda value: value >= 0, "0 or more"),
    "batch_tokens": (lambda value: value >= 0, "0 or more"),
    "max_body_bytes": (lambda value: value > 0, "more than 0"),
    "max_waiting_tokens": (lambda value: value > 0, "more than 0"),
    "max_client_batch_size": (lambda value: value > 0, "more than 0"),
    "timeout_seconds": (lambda value: value > 0, "more than 0"),
    "drain_seconds": (lambda value: value >= 0, "0 or more"),
    "max_model_bytes": (lambda value: value >= 0, "0 or more"),
    "model": (lambda value: len(value) > 0, "at least one model"),
}


_SYNONYMS: dict[str, dict[str, str]] = {
    "backend": {"optimum": "onnx", "ort": "onnx", "ctranslate2": "ct2", "pytorch": "torch"},
    "dtype": {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "float": "float32"},
}
"""What other systems call a value."""


def _translated(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return re.sub(r"[^,;\s]+", lambda word: names.get(word[0].lower(), word[0]), value)
    return [_translated(part, names) for part in value] if isinstance(value, list | tuple) else value


def _convert(field: Field, value: Any, source: str) -> Any:
    """Turn a raw value into the field's type; `source` names it in the error."""
    if field.name in _SYNONYMS:
        value = _translated(value, _SYNONYMS[field.name])
    if field.is_list and isinstance(value, str):
        value = [part.strip() for part in value.replace(";", ",").split(",") if part.strip()]
    try:
        converted = msgspec.convert(value, field.type, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        shown = "***" if isinstance(field.default, Secret) else repr(value)
        raise ConfigError(f"{source} = {shown} is not valid: {error}") from error
    valid, range_text = _RANGES.get(field.name, (None, ""))
    if valid and not valid(converted):
        raise ConfigError(f"{source} = {value!r} is out of range: it takes {range_text}")
    return converted


def _decode(wanted: type, value: Any) -> Any:
    if not isinstance(value, str | Path):
        raise msgspec.ValidationError(f"Expected text, got `{type(value).__name__}`")
    return wanted(value)


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def describe(config: Config) -> dict[str, dict[str, Any]]:
    """Return the effective tree for printing; secrets show as `***`."""
    return {
        section: {name: _printable(getattr(part, name)) for name in part.__slots__}
        for section, part in ((s, getattr(config, s)) for s in _sections())
    }


def _printable(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path | Secret) else value
