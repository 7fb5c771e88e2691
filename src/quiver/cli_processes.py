"""The command that starts a server, as a supervisor runs it in several processes."""

import sys

from quiver import config, memory
from quiver.cli_settings import environment
from quiver.config import Config
from quiver.place import Place
from quiver.supervisor import Supervisor


def supervise(settings: Config) -> int:
    """Run this very command in several processes until it is told to end -> exit code. Raises `ConfigError`."""
    return Supervisor(settings, [sys.executable, *sys.orig_argv[1:]], environment()).run()


def share_of(settings: Config, place: Place | None) -> Config:
    """Return the settings of a process, which is alone or has a place among others."""
    if place is None:
        return settings
    return config.divided(settings, place.count, place.number, memory_bytes=memory.limit_bytes())
