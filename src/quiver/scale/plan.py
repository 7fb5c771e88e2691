"""What of a configuration goes where: a part for the ingress, one for each model, and what each takes of a cluster."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quiver.capacity import Queue
from quiver.config import AccountsConfig, Config, Secret
from quiver.config.tree import PER_MODEL
from quiver.errors import ConfigError
from quiver.models.catalogue import Catalogue

NO_QUEUE = Queue(0, 0, 0, 0.0)
"""Of a model that is not there."""
PER_DEPLOYMENT = ("ray_min_replicas", "ray_max_replicas", "ray_cpus", "ray_gpus")


@dataclass(frozen=True, slots=True)
class Placement:
    """What one replica of a model takes, and how many there may be."""

    name: str
    """What the configuration calls the model."""
    cpus: float
    gpus: float
    min_replicas: int
    max_replicas: int

    @property
    def lanes(self) -> int:
        """Forward passes at a time: one for each CPU; on a GPU the backend knows better."""
        return 0 if self.gpus else math.ceil(self.cpus)

    @property
    def needs(self) -> Mapping[str, float]:
        """What a replica takes, by Ray's names."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def placements(config: Config) -> list[Placement]:
    """Place every configured model. Raises `ConfigError`."""
    for name in PER_DEPLOYMENT:
        given = getattr(config.scale, name)
        if len(given) not in (1, len(config.models.model)):
            raise ConfigError(
                f"{name} has {len(given)} values for {len(config.models.model)} models: give one for all, or one for each"
            )
    return [_placement(config, i) for i in range(len(config.models.model))]


def _placement(config: Config, index: int) -> Placement:
    cpus, gpus, least, most = (
        _of(getattr(config.scale, n), index) for n in ("ray_cpus", "ray_gpus", *PER_DEPLOYMENT[:2])
    )
    name = config.models.model[index]
    if most < least:
        raise ConfigError(f"{name} may have {most} replicas at most, but {least} at least: mend ray_max_replicas")
    return Placement(name, cpus, gpus, least, most)


def _of(values: Sequence[Any], index: int) -> Any:
    return values[index] if len(values) > 1 else values[0]


def for_model(config: Config, placement: Placement) -> Config:
    """Return the settings of the process that holds one model: who may call was asked before."""
    return _serving(config, placement.name, lanes=config.engine.lanes or placement.lanes)


def for_pool(config: Config, name: str) -> Config:
    """Return the settings under which a pool loads one model of `allow_models`."""
    return _serving(config, name, lanes=config.engine.lanes or math.ceil(_of(config.scale.ray_cpus, 0)))


def _serving(config: Config, name: str, *, lanes: int) -> Config:
    index = config.models.model.index(name) if name in config.models.model else None
    own: dict[str, Any] = {setting: _own(getattr(config.models, setting), index) for setting in PER_MODEL}
    models = replace(config.models, model=(name,), allow_models=(), any_model_name=False, **own)
    engine = replace(config.engine, lanes=lanes)
    return replace(config, models=models, engine=engine, accounts=AccountsConfig(auth="off"))


def _own(given: tuple[Any, ...], index: int | None) -> tuple[Any, ...]:
    """Return one model's part of a setting; of one outside the list, what holds for all."""
    if len(given) > 1:
        return (given[index],) if index is not None else ()
    return given


def for_ingress(config: Config) -> Config:
    """Return the settings of an ingress: results are kept where they are computed, and files of one machine are nobody's."""
    database = config.accounts.database_url.reveal()
    shared = replace(config, cache=replace(config.cache, cache_entries=0))
    if database.startswith("postgresql"):
        return replace(shared, accounts=replace(config.accounts, usage_first=True))
    return replace(shared, accounts=replace(config.accounts, auth="off"), jobs=replace(config.jobs, take_jobs=False))


def pooled(config: Config) -> list[str]:
    """Name the models that a pool loads when they are asked for."""
    allowed = config.models.allow_models
    everyone = [spec.id for spec in Catalogue.load()] if "*" in allowed else []
    named = [name for name in allowed if name != "*"]
    return [name for name in dict.fromkeys((*named, *everyone)) if name not in config.models.model]


def check_shared(config: Config, *, has_own_keys: bool) -> None:
    """Refuse what only one process could keep. Raises `ConfigError`.

    `has_own_keys` tells whether there is a database of keys on this machine.
    """
    accounts, database = config.accounts, config.accounts.database_url.reveal()
    if config.tls.is_on:
        raise ConfigError("TLS ends before a cluster: put a proxy with the certificate before it, and set tls=off")
    if (
        accounts.auth != "off"
        and not database.startswith("postgresql")
        and (database or has_own_keys or accounts.auth == "required")
    ):
        raise ConfigError(
            "keys and usage in a file on one machine cannot be shared: set database_url=postgresql://USER:PASSWORD@HOST/NAME, "
            "or auth=off"
        )
    if ((accounts.auth != "off" and database) or accounts.rate_per_second) and not config.cache.redis_url:
        raise ConfigError(
            "rates that several processes keep together need Redis: set redis_url=redis://HOST:6379/0 "
            "(or rate_per_second=0 and auth=off)"
        )
    if config.cache.redis_url and not config.cache.cache_secret:
        raise ConfigError(
            "processes that share results in Redis need one secret: set cache_secret to a long random text"
        )


def check_fits(needs: Sequence[tuple[str, Mapping[str, float]]], nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse what no machine of a cluster has room for, or all of them together have not. Raises `ConfigError`."""
    for name, need in needs:
        for resource, amount in need.items():
            largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
            if amount > largest:
                raise ConfigError(
                    f"a replica of {name} takes {amount:g} {resource}, but the largest machine of the cluster has "
                    f"{largest:g}: take less (ray_cpus, ray_gpus), or add a machine (ray_grows=true waits for one)"
                )
    for resource in sorted({resource for _, need in needs for resource in need}):
        wanted, there = sum(need.get(resource, 0.0) for _, need in needs), sum(n.get(resource, 0.0) for n in nodes)
        if wanted > there:
            names = ", ".join(f"{name} {need[resource]:g}" for name, need in needs if need.get(resource))
            raise ConfigError(
                f"the models take {wanted:g} {resource} together ({names}), but the cluster has {there:g}: take less "
                "(ray_cpus, ray_gpus, ray_min_replicas), or add machines (ray_grows=true waits for them)"
            )


def needs_of(config: Config) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yield what each replica that there must be takes, by the name of its model."""
    for placement in placements(config):
        for _ in range(placement.min_replicas):
            yield placement.name, placement.needs
    if pooled(config):
        for _ in range(config.scale.ray_pool_replicas):
            yield "the pool", {"CPU": _of(config.scale.ray_cpus, 0)}


def secrets_of(config: Config) -> tuple[Secret, ...]:
    """Return what travels to every process of the cluster and must not be read on the way."""
    return tuple(s for s in (config.server.api_key, config.accounts.database_url, config.cache.redis_url) if s)
