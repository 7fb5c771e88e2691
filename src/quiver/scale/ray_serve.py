"""Ray Serve: a deployment for each model, a pool for those that are seldom asked for, and ingresses before them.

`serve run quiver.scale.ray_serve:app` and `quiver scale serve` run the same application; it is configured as a single
server is. Batches are composed by the engine's lanes: Serve's own batching would add a wait and padding.
"""

import asyncio
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quiver import config as settings
from quiver.api.server import KEEP_ALIVE_SECONDS
from quiver.config import Config
from quiver.errors import LoadFailed, MissingExtra, NotReady, QuiverError
from quiver.scale import plan
from quiver.scale.cores import Cores
from quiver.scale.host import Host, Load, load_configured
from quiver.scale.ingress import Ingress
from quiver.scale.plan import Placement
from quiver.scale.policy import wanted_replicas
from quiver.scale.remote_engine import Crowded, Lost, Wire
from quiver.scale.wire import Answer, Asked, Described, LoadStats

try:
    import ray
    from ray import serve
    from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
    from ray.serve.exceptions import BackPressureError, RayServeException
except ModuleNotFoundError as error:
    raise MissingExtra("ray", "a cluster") from error

APP = "quiver"
POOL = "pool"
QUEUE_SECONDS = "queue_seconds"
AT_ONCE = 10_000
"""Requests that one process may have at work: how many that should be, its queue knows, by their tokens."""
HEALTH_SECONDS = 2.0
PROXY_MARGIN_SECONDS = 5.0
LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError)


class ModelDeployment:
    """One replica of a model."""

    async def __init__(self, config: Config, cpus: float, load: Load) -> None:  # type: ignore[misc]  # Serve awaits it
        self._cores = Cores(math.ceil(cpus))
        self._cores.pin()
        self._host = await Host.open(config, load)
        self._queue_seconds = config.scale.ray_queue_seconds

    async def answer(self, asked: Asked) -> Answer:
        """Do what an ingress asks."""
        return await self._host.answer(asked)

    async def describe(self) -> Described:
        """Tell what the model is."""
        return self._host.describe()

    async def check_health(self) -> None:
        """Raise why it is to be replaced, if so."""
        self._host.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell how busy it is."""
        stats = self._host.load_stats()
        return {name: getattr(stats, name) for name in LoadStats.__slots__} | {QUEUE_SECONDS: self._queue_seconds}


class PoolDeployment:
    """One process of those that share the models that are seldom asked for."""

    def __init__(self, config: Config, load: Load) -> None:
        self._cores = Cores(math.ceil(config.scale.ray_cpus[0]))
        self._cores.pin()

        async def hold(name: str) -> Held:
            return Held(await Host.open(plan.for_pool(config, name), load))

        # Serve keeps no more of them than this; which process has which, it tells those who ask.
        self._held = serve.multiplexed(max_num_models_per_replica=config.scale.ray_pool_models)(hold)

    async def answer(self, asked: Asked) -> Answer:
        """Do what an ingress asks, with a model that is loaded first where it is not."""
        name = serve.get_multiplexed_model_id()
        try:
            held = await self._held(name)
        except QuiverError as error:
            return Answer(LoadFailed(f"{name} could not be loaded: {error.message}"), plan.NO_QUEUE)
        answer: Answer = await held.answer(asked)
        return answer

    async def describe(self) -> Described:
        """Load and describe the model."""
        held: Held = await self._held(serve.get_multiplexed_model_id())
        return held.host.describe()


class Held:
    """A model in a pool; it ends when those who use it have their answers."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._loop = asyncio.get_running_loop()
        self._num_users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        self._is_over = False

    async def answer(self, asked: Asked) -> Answer:
        """Do what is asked, unless it has just given way to another."""
        if self._is_over:
            return Answer(NotReady("the model gave way to another: ask again"), plan.NO_QUEUE)
        self._num_users += 1
        self._unused.clear()
        try:
            return await self.host.answer(asked)
        finally:
            self._num_users -= 1
            if not self._num_users:
                self._unused.set()

    def __del__(self) -> None:
        """Give its memory back: Serve calls this, in a thread, when another takes its place; Python does it again."""
        if not self._is_over:
            self._is_over = True
            asyncio.run_coroutine_threadsafe(self._close(), self._loop)

    async def _close(self) -> None:
        await self._unused.wait()
        await self.host.close()


@dataclass(frozen=True, slots=True)
class Handle:
    """A deployment's handle as a wire."""

    handle: Any

    async def ask(self, asked: Asked) -> Answer:
        """Have a request answered. Raises `Lost` or `Crowded`."""
        answer: Answer = await self._call(self.handle.answer, asked)
        return answer

    async def describe(self) -> Described:
        """Ask what the model is, waiting until a replica is there."""
        described: Described = await self._call(self.handle.describe)
        return described

    async def _call(self, method: Any, *given: Any) -> Any:
        response = method.remote(*given)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # nobody waits for it any more
            raise
        except LOST as error:
            raise Lost(str(error)) from error
        except BackPressureError as error:
            raise Crowded(str(error)) from error
        except RayServeException as error:  # its deployment is not there now
            raise Crowded(str(error)) from error


def wires(config: Config) -> Mapping[str, Wire]:
    """Find the deployments of the models, from within an ingress's process."""
    app_name = serve.get_replica_context().app_name
    own = {name: Handle(serve.get_deployment_handle(_called(name), app_name)) for name in config.models.model}
    rest = plan.pooled(config)
    if not rest:
        return own
    pool = serve.get_deployment_handle(POOL, app_name)
    return own | {name: Handle(pool.options(multiplexed_model_id=name)) for name in rest}


def _called(name: str) -> str:
    """Name the deployment of a model: Ray shows it in paths."""
    return "model-" + "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def application(config: Config, load: Load = load_configured) -> Any:
    """Make the Serve application of a configuration; `load` has an engine load its model. Raises `ConfigError`."""
    plan.check_shared(config, has_own_keys=(config.models.data_dir / "quiver.db").exists())
    models = [_model(config, placement, load) for placement in plan.placements(config)]
    if plan.pooled(config):
        models.append(_pool(config, load))
    ingress = serve.deployment(serve.ingress(Ingress(config, lambda: wires(config)))())
    return ingress.options(
        name="ingress",
        num_replicas=config.scale.ray_ingresses,
        max_replicas_per_node=_most_on_one(config.scale.ray_ingresses),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=AT_ONCE,
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=config.server.drain_seconds,
    ).bind(*models)


def _most_on_one(replicas: int) -> int:
    """Return how many may be on one machine, so that no machine's end takes all of them."""
    machines = sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
    return min(100, math.ceil(replicas / machines))  # Serve takes no more than 100


def _model(config: Config, placement: Placement, load: Load) -> Any:
    scaling: dict[str, Any] = {"num_replicas": placement.min_replicas}
    if placement.max_replicas > placement.min_replicas:
        scaling = {"autoscaling_config": _autoscaling(placement)}
    return (
        serve.deployment(ModelDeployment)
        .options(
            name=_called(placement.name),
            ray_actor_options={"num_cpus": placement.cpus, "num_gpus": placement.gpus},
            max_ongoing_requests=AT_ONCE,
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_timeout_s=config.server.drain_seconds,
            **scaling,
        )
        .bind(plan.for_model(config, placement), placement.cpus, load)
    )


def _pool(config: Config, load: Load) -> Any:
    return (
        serve.deployment(PoolDeployment)
        .options(
            name=POOL,
            num_replicas=config.scale.ray_pool_replicas,
            ray_actor_options={"num_cpus": config.scale.ray_cpus[0]},
            max_ongoing_requests=AT_ONCE,
        )
        .bind(config, load)
    )


def _autoscaling(placement: Placement) -> dict[str, Any]:
    return {
        "min_replicas": placement.min_replicas,
        "max_replicas": placement.max_replicas,
        "initial_replicas": placement.min_replicas,
        "look_back_period_s": 15.0,  # longer than Ray waits between two reports
        "upscale_delay_s": 5.0,
        "downscale_delay_s": 120.0,
        "policy": {"policy_function": "quiver.scale.ray_serve:policy"},
    }


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """Tell Serve how many replicas there should be: by tokens that wait and are computed, not by requests.

    Serve finds it by its name, so that what it must know of the settings is among the numbers of the replicas.
    """
    metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    told = [metrics.get(name, {}) for name in (*LoadStats.__slots__, QUEUE_SECONDS)]
    replicas = set.intersection(*map(set, told))
    if not replicas:
        return context.target_num_replicas, {}
    loads = [LoadStats(**{name: metrics[name][replica] for name in LoadStats.__slots__}) for replica in replicas]
    return wanted_replicas(loads, queue_seconds=max(metrics[QUEUE_SECONDS].values())), {}


def app(given: dict[str, str]) -> Any:
    """Build the application that `serve run quiver.scale.ray_serve:app` runs; its words (`port=9000`) are settings.

    What they do not say is read as `quiver serve` reads it: from the environment, and the file and the preset that it
    names. Raises `ConfigError`.
    """
    flags: dict[str, Any] = dict(given)
    file, preset = flags.pop("config", None), flags.pop("preset", None)
    return application(settings.load(preset=preset, file=Path(file) if file else None, env=os.environ, flags=flags))


def run(config: Config, load: Load = load_configured) -> None:
    """Start Serve's proxies and the application, and wait until it is ready. Raises `RuntimeError`, which says why not."""
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    serve.start(
        proxy_location="EveryNode" if config.scale.ray_address else "HeadOnly",
        http_options={
            "host": config.server.host,
            "port": config.server.port,
            "keep_alive_timeout_s": KEEP_ALIVE_SECONDS,
            # An ingress tells sooner; where there is none, Ray would let a request wait for ever.
            "request_timeout_s": config.server.timeout_seconds + PROXY_MARGIN_SECONDS,
        },
        logging_config=quiet,
    )
    serve.run(application(config, load), name=APP, route_prefix="/", logging_config=quiet)


def stop(*, whole: bool) -> None:
    """Take the application away; with the `whole` cluster, where nobody else has any of it."""
    with suppress(Exception):  # whatever is gone already, is
        if whole:
            serve.shutdown()
        else:
            serve.delete(APP)
    ray.shutdown()
