"""A Ray cluster: joined, or started on this machine, with nothing open that need not be."""

import os
import re
import socket
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

from quiver.config import Config
from quiver.engine.cache import load_secret
from quiver.errors import ConfigError, MissingExtra
from quiver.remote import RemoteDown
from quiver.scale import plan
from quiver.stores import Stores

RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "quiver.scale.proxy:middlewares",
    # Nothing of ours blocks an event loop, so that one is enough where Ray takes three by itself.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",  # ten times a second takes a core's twentieth, and replicas start in seconds
}
"""What every process of a cluster is told."""
OLDEST = (2, 54)
"""Older ones have holes that are closed, and no custom metrics for the number of replicas."""
CONNECT_SECONDS = 5.0
NAMESPACE = "quiver"


def check_installed() -> None:
    """Raise `MissingExtra`, or `ConfigError` for a Ray that is too old; it is not imported yet."""
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError as error:
        raise MissingExtra("ray", "a cluster") from error
    check_version(version)


def check_version(version: str) -> None:
    """Raise `ConfigError` for a Ray that is too old."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(f"Ray {version} is too old: pip install 'ray[serve]>={oldest}'")


def join(config: Config) -> None:
    """Join the cluster of `ray_address`, or start one of this machine alone. Raises `ConfigError` or `MissingExtra`."""
    check_installed()
    os.environ.update(settings_for_ray(config))  # Ray takes these from nowhere else, and reads them when it is imported
    import ray  # noqa: PLC0415  see above

    address = config.scale.ray_address
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning", "namespace": NAMESPACE}
    if not address:
        ray.init(
            address="local",  # without it, Ray would join whatever it finds on this machine
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=config.scale.ray_object_store_bytes,
            **quiet,
        )
        return
    check_address(address)
    try:
        ray.init(address=address, **quiet)
    except Exception as error:  # Ray has many for this, and changes them
        raise ConfigError(_why_not(address, error)) from error


def settings_for_ray(config: Config) -> Mapping[str, str]:
    """Return what is set for Ray: it tells nobody that it is used, asks for a token, and leaves the cores to the models."""
    scale = config.scale
    if scale.ray_token:
        return RAY_SETTINGS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": scale.ray_token.reveal()}
    if scale.ray_address:
        return RAY_SETTINGS
    token = load_secret(config.models.data_dir / "ray.token").hex()
    return RAY_SETTINGS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def check_address(address: str) -> None:
    """Raise `ConfigError` for what is no address of a cluster, or one where nobody listens."""
    if where := _place_of(address):
        _reach(*where)


def _place_of(address: str) -> tuple[str, int] | None:
    """Return where an address leads, if it names a place. Raises `ConfigError`."""
    if address in ("auto", "local"):
        return None
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        if parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ConfigError(f"ray_address {address!r} is no address of a cluster: HOST:6379, ray://HOST:10001, or auto")


def _reach(host: str, port: int) -> None:
    """Raise `ConfigError` where nobody listens: Ray itself would try for a minute."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(
            f"no Ray cluster answers at {host}:{port} ({why}): start its head there (ray start --head --port={port}), or "
            "leave ray_address empty for one on this machine"
        ) from error


def _why_not(address: str, error: Exception) -> str:
    """Say why a cluster whose port answers cannot be joined: Ray tells a wrong token in its log alone."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return (
        f"the cluster at {address} does not let this process in ({first}): set ray_token to what its head has as "
        "RAY_AUTH_TOKEN, and use the same version of Ray"
    )


def check_room(config: Config) -> None:
    """Raise `ConfigError` where the cluster that was joined has no room for the models."""
    if config.scale.ray_grows:
        return
    import ray  # noqa: PLC0415  see above

    nodes: Sequence[Mapping[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    plan.check_fits(list(plan.needs_of(config)), nodes)


async def check_stores(config: Config) -> None:
    """Raise `ConfigError`, `DatabaseError` or `MissingExtra` where what all processes share does not answer."""
    async with Stores(plan.for_ingress(config)) as stores:
        if stores.remote is None:
            return
        try:
            await stores.remote.warm_up()
        except RemoteDown as error:
            raise ConfigError(f"Redis does not answer at {stores.remote.name}: start it, or mend redis_url") from error
