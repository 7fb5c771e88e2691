"""Where settings come from: presets, files, the environment and flags, read into the tree."""

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from quiver.config.fields import FIELDS, SWITCH, Field, sections
from quiver.config.setting import Secret
from quiver.config.tree import ANY, PER_MODEL, Config
from quiver.errors import ConfigError

PRESETS = Path(__file__).parent.parent / "presets"
RESERVED_ENV = frozenset({"QUIVER_CONFIG", "QUIVER_PRESET", "QUIVER_PLACE"})
"""Names that choose a source and are not fields themselves; the last is what a supervisor tells its processes."""
MAX_PORT = 65535


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
    values |= _read_flags(flags)
    return _build(values)


def _build(values: Mapping[str, Any]) -> Config:
    parts = {}
    for section, cls in sections().items():
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
        if section not in sections() or not isinstance(table, dict):
            raise ConfigError(f"{path}: there is no section [{section}]{_nearest(section, sections())}")
        for name, value in table.items():
            field = FIELDS.get(name)
            if field is None or field.section != section:
                raise ConfigError(f"{path}: [{section}] has no key {name!r}{_nearest(name, FIELDS)}")
            values[name] = _convert(field, value, f"{path} [{section}] {name}")
    return _with_any(values)


def _read_env(env: Mapping[str, str]) -> dict[str, Any]:
    """Take each field's first name that is set; a `QUIVER_…` that is nobody's name is an error."""
    ours = {name for field in FIELDS.values() for name in field.env_names} | RESERVED_ENV
    for name in env:
        if name.startswith("QUIVER_") and name not in ours:
            known = [n for n in ours if n.startswith("QUIVER_")]
            raise ConfigError(f"the environment sets {name}, which is no setting{_nearest(name, known)}")
    given = {name: text for name, text in env.items() if name != "HOSTNAME" or _is_address(text)}
    values = {}
    for field in FIELDS.values():
        if found := next(filter(None, (alias.find(given) for alias in field.env)), None):
            name, value = found
            values[field.name] = _convert(field, value, f"environment {name}")
    return _with_any(values)


def _read_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in flags.items() if value is not None and value not in ([], ())}
    return _with_any({name: _convert(FIELDS[name], value, FIELDS[name].flag) for name, value in given.items()})


def _with_any(values: dict[str, Any]) -> dict[str, Any]:
    """Let one source's * among the models mean that any of them may be asked for."""
    models = values.get("model", ())
    if ANY not in models:
        return values
    named = tuple(name for name in models if name != ANY)
    others = {name: value for name, value in values.items() if name != "model"}
    allowed = (*values.get("allow_models", ()), ANY)
    return others | {"allow_models": allowed} | ({"model": named} if named else {})


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
    "url_prefix": (lambda value: bool(re.fullmatch(r"(/[^/?#]+)*/?", value)), "a path such as /v1"),
    "port": (lambda value: 0 <= value <= MAX_PORT, "0 (any free port) to 65535"),
    "processes": (lambda value: value >= 1, "1 or more"),
    "max_concurrent_requests": (lambda value: value >= 0, "0 or more"),
    "queue_seconds": (lambda value: value >= 0, "0 or more"),
    "batch_inputs": (lambda value: all(most > 0 for most in value), "more than 0"),
    "lanes": (lambda value: value >= 0, "0 or more"),
    "encoders": (lambda value: value >= 0, "0 or more"),
    "batch_tokens": (lambda value: value >= 0, "0 or more"),
    "max_body_bytes": (lambda value: value > 0, "more than 0"),
    "max_waiting_tokens": (lambda value: value > 0, "more than 0"),
    "max_waiting_inputs": (lambda value: value >= 0, "0 or more"),
    "max_client_batch_size": (lambda value: value > 0, "more than 0"),
    "timeout_seconds": (lambda value: value > 0, "more than 0"),
    "max_wait_seconds": (lambda value: value >= 0, "0 or more"),
    "max_inflight_bytes": (lambda value: value > 0, "more than 0"),
    "max_memory_bytes": (lambda value: value >= 0, "0 or more"),
    "header_seconds": (lambda value: value > 0, "more than 0"),
    "body_seconds": (lambda value: value > 0, "more than 0"),
    "write_seconds": (lambda value: value > 0, "more than 0"),
    "max_header_bytes": (lambda value: value > 0, "more than 0"),
    "stall_seconds": (lambda value: value > 0, "more than 0"),
    "drain_seconds": (lambda value: value >= 0, "0 or more"),
    "drain_delay_seconds": (lambda value: value >= 0, "0 or more"),
    "max_model_bytes": (lambda value: value >= 0, "0 or more"),
    "model": (lambda value: len(value) > 0, "at least one model"),
    "otlp_endpoint": (
        lambda value: bool(re.fullmatch(r"((https?://)?([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?/?)?", value)),
        "an address such as http://localhost:4317",
    ),
    "otlp_sample_ratio": (lambda value: 0 <= value <= 1, "0 to 1"),
    "cache_entries": (lambda value: value >= 0, "0 or more"),
    "cache_bytes": (lambda value: value >= 0, "0 or more"),
    "cache_ttl_seconds": (lambda value: value > 0, "more than 0"),
    "database_wait_seconds": (lambda value: value >= 0, "0 or more"),
    "key_prefix": (lambda value: bool(re.fullmatch(r"[a-z]{2,8}", value)), "2 to 8 lower-case letters"),
    "rate_per_second": (lambda value: value >= 0, "0 or more"),
    "rate_burst": (lambda value: value >= 1, "1 or more"),
    "usage_days": (lambda value: value > 0, "more than 0"),
    "ray_object_store_bytes": (lambda value: value >= 80 << 20, "80 MiB or more"),
    "ray_ingresses": (lambda value: value >= 1, "1 or more"),
    "ray_min_replicas": (lambda value: all(count >= 1 for count in value), "1 or more"),
    "ray_max_replicas": (lambda value: all(count >= 1 for count in value), "1 or more"),
    "ray_cpus": (lambda value: all(count > 0 for count in value), "more than 0"),
    "ray_gpus": (lambda value: all(count >= 0 for count in value), "0 or more"),
    "ray_queue_seconds": (lambda value: value > 0, "more than 0"),
    "ray_pool_replicas": (lambda value: value >= 1, "1 or more"),
    "ray_pool_models": (lambda value: value >= 1, "1 or more"),
}


_SYNONYMS: dict[str, dict[str, str]] = {
    "backend": {"optimum": "onnx", "ort": "onnx", "ctranslate2": "ct2", "pytorch": "torch"},
    "dtype": {
        "bf16": "bfloat16",
        "f16": "float16",
        "f32": "float32",
        "float": "float32",
        "fp16": "float16",
        "fp32": "float32",
        "fp8": "int8",  # what else has 8 bits
        "half": "float16",
    },
    "log_format": {"pretty": "text"},
    "log_level": {"trace": "debug", "warn": "warning", "critical": "error"},
    "pooling": {"last-token": "last_token"},
    "tls": {word: "on" if is_on else "off" for word, is_on in SWITCH.items()},
}
"""What other systems call a value."""


def _parsed(field: Field, value: Any) -> Any:
    """Take text apart: a list at its commas, a switch and a choice by the word that stands there."""
    if not field.is_list:
        return _word(field, value)
    if isinstance(value, str):
        value = [part.strip() for part in re.split("[,;]", value) if part.strip()]
    return [_word(field, part) for part in (value if isinstance(value, list | tuple) else [value])]


def _word(field: Field, value: Any) -> Any:
    if isinstance(value, bool) and field.choices:
        value = str(value)
    if not isinstance(value, str) or not (field.is_switch or field.choices):
        return value
    word = value.strip().lower()
    return SWITCH.get(word, word) if field.is_switch else _SYNONYMS.get(field.name, {}).get(word, word)


def _convert(field: Field, value: Any, source: str) -> Any:
    """Turn a raw value into the field's type; `source` names it in the error."""
    try:
        converted = msgspec.convert(_parsed(field, value), field.type, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        shown = "***" if isinstance(field.default, Secret) else _shown(value)
        complaint = f"it takes {', '.join(field.choices)}" if field.choices else error
        raise ConfigError(f"{source} = {shown} is not valid: {complaint}") from error
    valid, range_text = _RANGES.get(field.name, (None, ""))
    if valid and not valid(converted):
        raise ConfigError(f"{source} = {_shown(value)} is out of range: it takes {range_text}")
    return converted


def _shown(value: Any) -> str:
    return ", ".join(map(repr, value)) if isinstance(value, list | tuple) and value else repr(value)


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
        for section, part in ((s, getattr(config, s)) for s in sections())
    }


def secrets(config: Config) -> tuple[str, ...]:
    """Return the texts that must not be printed; of a URL, only its password must not."""
    values = (getattr(getattr(config, field.section), field.name) for field in FIELDS.values())
    texts = (value.reveal() for value in values if isinstance(value, Secret))
    return tuple(text for text in texts if text and "://" not in text)


def _printable(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path | Secret) else value
