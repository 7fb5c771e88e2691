"""The commands of a cluster."""

import typer

from quiver import config
from quiver.cli_settings import Command, with_settings
from quiver.config import Config
from quiver.telemetry import logs

scale = typer.Typer(no_args_is_help=True, help="Serve from a Ray cluster of any number of machines.")


@scale.callback()
def _scale() -> None:
    """Serve from a Ray cluster of any number of machines."""


@scale.command("serve", cls=Command)
@with_settings()
def serve(*, settings: Config) -> None:
    """Join a cluster, or start one on this machine, and serve from it until a signal."""
    from quiver.scale import command  # noqa: PLC0415  no other command needs it

    logs.configure(settings.server, secrets=config.secrets(settings))
    command.serve(settings)
