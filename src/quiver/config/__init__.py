"""The one frozen tree of settings, and the one place where their sources are put in order.

    defaults  <  preset  <  file (quiver.toml)  <  environment  <  flags

A field's name is unique in the whole tree, so `port` is `port` in the file's `[server]` table, `QUIVER_PORT` in the
environment and `--port` on the command line; its help text is the text of `--help` and of docs/configuration.md.
An unknown key is an error that names the nearest valid one.
"""

from quiver.config.sources import FIELDS, PRESETS, RESERVED_ENV, Field, describe, load
from quiver.config.tree import (
    DEFAULT_MODEL,
    BackendName,
    Config,
    Dtype,
    EngineConfig,
    ModelsConfig,
    ModelSettings,
    Secret,
    ServerConfig,
)

__all__ = [
    "DEFAULT_MODEL",
    "FIELDS",
    "PRESETS",
    "RESERVED_ENV",
    "BackendName",
    "Config",
    "Dtype",
    "EngineConfig",
    "Field",
    "ModelSettings",
    "ModelsConfig",
    "Secret",
    "ServerConfig",
    "describe",
    "load",
]
