"""Who may call, and how much: the values that the gate, the stores and the command line speak."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache

from quiver.errors import InvalidInput

SCOPES = ("embed", "rerank", "classify", "tokenize", "usage", "metrics", "admin")
"""What a key may be good for."""
ADMIN = "admin"
DEFAULT_SCOPES = frozenset(SCOPES) - {ADMIN}
DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Rate:
    """How often: so many a second on average, and so many at once after a rest."""

    per_second: float
    burst: float

    def __post_init__(self) -> None:
        if not (self.per_second > 0 and self.burst >= 1):
            raise InvalidInput(f"a rate of {self.per_second:g}/s in bursts of {self.burst:g} lets nobody through")


@dataclass(frozen=True, slots=True)
class Tier:
    """A named set of limits."""

    name: str
    monthly_embeddings: int | None = None
    """Most inputs in a calendar month (UTC) of all of a user's keys together; None: no bound."""
    rate: Rate | None = None
    """How often one key may ask; None: as the server's settings say."""


FIRST_TIERS = (
    Tier("free", 20_000, Rate(10, 20)),
    Tier("pro", 100_000, Rate(40, 80)),
    Tier("scale", 2_000_000, Rate(200, 400)),
)
"""What a new database knows."""


@dataclass(frozen=True, slots=True)
class User:
    """Who pays."""

    id: int
    email: str
    tier: Tier
    created_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key as the database knows it: never its secret. Times are Unix seconds."""

    id: str
    prefix: str
    hash: str = field(repr=False)
    """bcrypt of its text."""
    user: User
    name: str = ""
    """What its owner calls it."""
    scopes: frozenset[str] = DEFAULT_SCOPES
    created_at: float = 0.0
    expires_at: float | None = None
    revoked_at: float | None = None

    def is_good(self, now: float) -> bool:
        """Whether it opens anything at that time."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEntry:
    """What one request was worth, or some that were answered alike; `request_id` makes it count once."""

    request_id: str
    user_id: int
    key_id: str
    model: str
    embeddings: int
    """Inputs that count towards the quota."""
    cached: int = 0
    """Inputs that the cache knew."""
    tokens: int = 0
    created_at: float = 0.0
    fingerprint: str = ""
    """Of the request's body, where it came with an idempotency key."""
    requests: int = 1

    @property
    def period(self) -> str:
        """The month that it counts in."""
        return period_of(self.created_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageTotal:
    """What one key has had of one model in one month."""

    period: str
    email: str
    key_id: str
    model: str
    requests: int
    embeddings: int
    cached: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """What makes one request be the same as another: its id, and a fingerprint of its body."""

    id: str
    fingerprint: str = ""


def period_of(unix_seconds: float) -> str:
    """Name the calendar month (UTC) of a time: 2026-07."""
    return _month_of(int(unix_seconds // DAY_SECONDS))


@lru_cache(8)
def _month_of(day: int) -> str:
    return datetime.fromtimestamp(day * DAY_SECONDS, UTC).strftime("%Y-%m")


def end_of_period(unix_seconds: float) -> float:
    """Return when the month of a time is over."""
    then = datetime.fromtimestamp(unix_seconds, UTC)
    year, month = divmod(then.year * 12 + then.month, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


def parse_scopes(names: Sequence[str]) -> frozenset[str]:
    """Check the names of scopes; none are those that every key has unless told otherwise. Raises `InvalidInput`."""
    for name in names:
        if name not in SCOPES:
            raise InvalidInput(f"there is no scope {name!r} (there are: {', '.join(SCOPES)})", param="scopes")
    return frozenset(names) or DEFAULT_SCOPES
