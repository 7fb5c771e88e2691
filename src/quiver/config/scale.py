"""Settings of a cluster: where it is, and how much of it each model takes."""

from dataclasses import dataclass

from quiver.config.setting import Secret, setting


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    """What `quiver scale serve` and `quiver embed --ray` do with a Ray cluster."""

    ray_address: str = setting(
        "",
        "Ray cluster to join: the HOST:PORT of its head, ray://HOST:10001, or auto for the one that this machine is in; "
        "empty: one of this machine alone is started, and ends with the command.",
        also=("RAY_ADDRESS",),
    )
    ray_token: Secret = setting(
        Secret(""),
        "Token that the cluster asks for; empty: for a cluster of this machine alone, one is made and kept in "
        "`data_dir`; for another, Ray's own ways to find it (~/.ray/auth_token) are left to it.",
        also=("RAY_AUTH_TOKEN",),
    )
    ray_grows: bool = setting(
        False, "The cluster adds machines by itself: what does not fit now is waited for, instead of refused."
    )
    ray_object_store_bytes: int = setting(
        200 << 20, "Shared memory of a cluster that is started here, in bytes; requests hardly use it."
    )
    ray_ingresses: int = setting(
        2, "Processes that read requests and write replies; the loss of one is felt by what was at work in it alone."
    )
    ray_min_replicas: tuple[int, ...] = setting(
        (1,), "Fewest replicas of a model. One for all models, or one for each in their order."
    )
    ray_max_replicas: tuple[int, ...] = setting((4,), "Most replicas of a model. One for all models, or one for each.")
    ray_cpus: tuple[float, ...] = setting(
        (1.0,),
        "CPUs that a replica of a model takes; it has as many lanes, where `lanes` does not say. One for all models, or "
        "one for each.",
    )
    ray_gpus: tuple[float, ...] = setting(
        (0.0,), "GPUs that a replica of a model takes, or a part of one. One for all models, or one for each."
    )
    ray_queue_seconds: float = setting(
        0.5, "Work that may wait for a replica, in seconds, before there is to be another."
    )
    ray_pool_replicas: int = setting(
        1, "Processes that share all models of `allow_models`, which are loaded when they are asked for."
    )
    ray_pool_models: int = setting(
        3, "Most models of `allow_models` in one of these processes; the one that was used longest ago gives way."
    )
