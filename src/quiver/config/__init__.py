"""The one frozen tree of settings, and the one place where their sources are put in order.

    defaults  <  preset  <  file (quiver.toml)  <  environment  <  flags

A field's name is unique in the whole tree, so `port` is `port` in the file's `[server]` table, `QUIVER_PORT` in the
environment and `--port` on the command line; its help text is the text of `--help` and of docs/configuration.md.
Beside these stand the names that other systems give it (`tree.py` lists them with the field). An unknown key is an error that names the nearest valid one.
"""

from quiver.config.accounts import AccountsConfig, Auth
from quiver.config.cache import CacheConfig, Scope
from quiver.config.fields import FIELDS, SWITCH, Alias, Field, in_our_words
from quiver.config.jobs import JobsConfig
from quiver.config.scale import ScaleConfig
from quiver.config.setting import Secret
from quiver.config.shares import divided, divisions, portions
from quiver.config.sources import PRESETS, RESERVED_ENV, describe, load, secrets
from quiver.config.tls import TlsConfig
from quiver.config.tree import (
    ANY,
    DEFAULT_MODEL,
    BackendName,
    Config,
    Dtype,
    EngineConfig,
    MetricsFamily,
    ModelsConfig,
    ModelSettings,
    PoolingName,
    ServerConfig,
)

__all__ = [
    "ANY",
    "DEFAULT_MODEL",
    "FIELDS",
    "PRESETS",
    "RESERVED_ENV",
    "SWITCH",
    "AccountsConfig",
    "Alias",
    "Auth",
    "BackendName",
    "CacheConfig",
    "Config",
    "Dtype",
    "EngineConfig",
    "Field",
    "JobsConfig",
    "MetricsFamily",
    "ModelSettings",
    "ModelsConfig",
    "PoolingName",
    "ScaleConfig",
    "Scope",
    "Secret",
    "ServerConfig",
    "TlsConfig",
    "describe",
    "divided",
    "divisions",
    "in_our_words",
    "load",
    "portions",
    "secrets",
]
