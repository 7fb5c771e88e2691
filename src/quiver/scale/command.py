"""`quiver scale serve`: a cluster is joined or started, the application runs on it until a signal, and is taken away."""

import asyncio
import signal

import structlog

from quiver.config import Config
from quiver.errors import LoadError
from quiver.scale import cluster, plan

log = structlog.get_logger(__name__)


def serve(config: Config) -> None:
    """Serve on a cluster until a signal. Raises `SetupError` where it cannot."""
    cluster.check_installed()
    plan.check_shared(config, has_own_keys=(config.models.data_dir / "quiver.db").exists())
    plan.placements(config)
    asyncio.run(cluster.check_stores(config))
    cluster.join(config)
    from quiver.scale import ray_serve  # noqa: PLC0415  Ray reads its settings when it is imported

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # Ray has set its own, which ends with an abort
    try:
        cluster.check_room(config)
        _run(config)
        url = f"http://{config.server.host}:{config.server.port}"
        log.info("ready", url=url, models=list(config.models.model), ingresses=config.scale.ray_ingresses)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        log.info("stopping", drain_seconds=config.server.drain_seconds)
    finally:
        ray_serve.stop(whole=not config.scale.ray_address)


def _run(config: Config) -> None:
    """Deploy, and wait until all of it is ready. Raises `LoadError`."""
    from quiver.scale import ray_serve  # noqa: PLC0415  see above

    try:
        ray_serve.run(config)
    except RuntimeError as error:
        raise LoadError(f"the models could not be served: {reason_in(str(error))}") from error


def reason_in(text: str) -> str:
    """Find in a report of Ray's the line that says why: that of our own error, or else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line.partition(": ")[2] for line in lines if line.startswith("quiver.errors.")]
    return (ours or lines or ["Ray does not say why"])[-1]
