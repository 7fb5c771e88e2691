"""What every command is made of: options that are generated from the settings, and the loop that its work runs on."""

import asyncio
import inspect
import os
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from quiver import config
from quiver.place import VARIABLE, Place

T = TypeVar("T")

ConfigFile = Annotated[
    Path | None, typer.Option("--config", envvar="QUIVER_CONFIG", help="Settings file (quiver.toml).")
]
Preset = Annotated[
    str | None, typer.Option("--preset", envvar="QUIVER_PRESET", help="Settings of a known system or size.")
]


class Command(TyperCommand):
    """A command that takes the flags of the systems that Quiver stands in for, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words behind the command."""
        return super().parse_args(ctx, config.in_our_words(args))


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--config`, `--preset` and an option for each setting; it receives the merged tree as `settings`."""
    fields = [config.FIELDS[name] for name in names] if names else list(config.FIELDS.values())

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]

        def run(*, config_file: Path | None = None, preset: str | None = None, **given: Any) -> None:
            flags = {field.name: given.pop(field.name) for field in fields}
            settings = config.load(preset=preset, file=config_file, env=os.environ, flags=flags)
            command(settings=settings, **given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        sources = [
            inspect.Parameter("config_file", keyword, default=None, annotation=ConfigFile),
            inspect.Parameter("preset", keyword, default=None, annotation=Preset),
        ]
        options = [inspect.Parameter(f.name, keyword, default=None, annotation=_option(f)) for f in fields]
        run.__signature__ = inspect.Signature([*own, *sources, *options])  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _option(field: config.Field) -> Any:
    """Return an option of text; `config.load` gives it its type, as it does for every other source."""
    kind = bool | None if field.is_switch else list[str] | None if field.is_list else str | None
    also = f"; also {', '.join(field.other_flags)}" if field.other_flags else ""
    about = f"{field.help} [{field.env_names[0]}; {_default(field)}{also}]"
    return Annotated[kind, typer.Option("/".join(field.flags), help=about)]


def _default(field: config.Field) -> str:
    value = ", ".join(map(str, field.default)) if field.is_list else field.default
    return f"default: {value}" if value not in ("", None) else "not set"


def environment() -> Mapping[str, str]:
    """Return the environment, for a process that is to have the same."""
    return dict(os.environ)


def given_place() -> Place | None:
    """Return the place that a supervisor gives this process, if one does."""
    text = os.environ.get(VARIABLE)
    return Place.read(text) if text else None


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Do a command's work on the fastest event loop that there is, and return what it returns."""
    try:
        import uvloop  # noqa: PLC0415  not on every platform

        runner: Callable[[Coroutine[Any, Any, T]], T] = uvloop.run
    except ImportError:
        runner = asyncio.run
    return runner(work)
