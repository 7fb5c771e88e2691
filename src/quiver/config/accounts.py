"""Settings of who may call, how often, and how much."""

from dataclasses import dataclass
from typing import Literal

from quiver.config.setting import Secret, setting

Auth = Literal["auto", "required", "off"]


@dataclass(frozen=True, slots=True)
class AccountsConfig:
    """Keys, rates, quotas, and the database that holds them."""

    auth: Auth = setting(
        "auto",
        "Whether calls need a key: required; off, none is asked for; auto: as soon as `api_key` is set or the database "
        "holds a key.",
    )
    database_url: Secret = setting(
        Secret(""),
        "Where users, keys and usage are kept: postgresql://USER:PASSWORD@HOST/NAME (extra `postgres`), or "
        "sqlite:///FILE; empty: quiver.db in `data_dir`.",
        also=("DATABASE_URL",),
    )
    database_wait_seconds: float = setting(
        0.0, "How long a starting server waits for a database that does not answer yet, in seconds; 0: it ends at once."
    )
    key_prefix: str = setting("qv", "How new keys begin: 2 to 8 lower-case letters.")
    rate_per_second: float = setting(
        0.0,
        "Requests a second that each key (without keys, each address) may make on average, where its tier does not "
        "say; 0: no bound.",
    )
    rate_burst: float = setting(
        50.0, "Requests that may come at once after a rest, where `rate_per_second` bounds them."
    )
    count_cached: bool = setting(True, "Inputs whose results were known before count towards a quota, too.")
    open_metrics: bool = setting(True, "Metrics need no key.")
    usage_first: bool = setting(
        False,
        "Replies wait until what they cost is on the disk, some milliseconds: then a killed process loses none of it. In a "
        "cluster they always do.",
    )
    usage_days: float = setting(90.0, "How long single requests are kept in the ledger, in days; their sums stay.")
