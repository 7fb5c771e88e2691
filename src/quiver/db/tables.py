"""The tables as the newest migration leaves them; `tests/test_db.py` holds the two together. Times are Unix seconds."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
)

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

TIERS = Table(
    "tiers",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("monthly_embeddings", BigInteger),
    Column("rate_per_second", Double),
    Column("burst", Double),
)

USERS = Table(
    "users",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("email", String(320), nullable=False, unique=True),
    Column("tier", ForeignKey("tiers.name"), nullable=False),
    Column("created_at", Double, nullable=False),
)

KEYS = Table(
    "keys",
    METADATA,
    Column("id", String(12), primary_key=True),
    Column("prefix", String(8), nullable=False),
    Column("hash", String(60), nullable=False),
    Column("user_id", ForeignKey("users.id"), nullable=False, index=True),
    Column("name", String(200), nullable=False),
    Column("scopes", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
)

USAGE = Table(
    "usage",
    METADATA,
    Column("request_id", String(64), primary_key=True),
    Column("user_id", Integer, nullable=False),
    Column("key_id", String(12), nullable=False),
    Column("model", String(300), nullable=False),
    Column("embeddings", BigInteger, nullable=False),
    Column("cached", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("requests", Integer, nullable=False, server_default="1"),
    Index(None, "created_at"),
)
"""One row for each answered request, or for some that were answered alike: what was applied already is known by its id. No foreign keys: what happened is
written down, whatever became of the user."""

TOTALS = Table(
    "usage_totals",
    METADATA,
    Column("user_id", Integer, primary_key=True),
    Column("period", String(7), primary_key=True),
    Column("key_id", String(12), primary_key=True),
    Column("model", String(300), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("embeddings", BigInteger, nullable=False),
    Column("cached", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)
"""Sums of `usage`, changed in the transaction that adds its rows and in no other."""

JOBS = Table(
    "jobs",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("caller", String(128), nullable=False),
    Column("key_id", String(12)),
    Column("state", String(16), nullable=False),
    Column("about", LargeBinary, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("opened_at", Double),
    Column("closing_at", Double),
    Column("ended_at", Double),
    Column("expires_at", Double, nullable=False),
    Column("keep_seconds", Double, nullable=False),
    Column("keep_until", Double),
    Column("total", BigInteger, nullable=False),
    Column("done", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("retries", Integer, nullable=False),
    Column("runner", String(32)),
    Column("was_streamed", Boolean, nullable=False),
    Column("call_at", Double),
    Column("calls", Integer, nullable=False),
    Index(None, "kind", "owner", "created_at"),
    Index(None, "state"),
    Index(None, "keep_until"),
    Index(None, "call_at"),
)
"""Work that outlasts a request. `runner` reads or closes its lines; `call_at` is when its webhook is due."""

LINES = Table(
    "job_lines",
    METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("job_id", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("custom_id", Text, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("due", Double, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("runner", String(32)),
    Column("started_at", Double),
    Column("request_bytes", BigInteger, nullable=False),
    Column("result_bytes", BigInteger, nullable=False),
    Column("request", LargeBinary, nullable=False),
    Column("result", LargeBinary),
    UniqueConstraint("job_id", "number"),
    Index(None, "state", "due"),
)
"""The lines of jobs, by `due` as they are begun. What is long stands last: nothing before it is read past it."""

RUNNERS = Table(
    "job_runners",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("alive_until", Double, nullable=False),
)
"""Servers that do lines. What one had begun is anybody's once it is not alive any more."""

FILES = Table(
    "files",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("job_id", String(64)),
    Column("line_state", SmallInteger),
    Column("is_whole", Boolean, nullable=False),
    Index(None, "owner", "created_at"),
    Index(None, "expires_at"),
)
"""What was uploaded, in parts, and what the lines of a job gave, which is where those are."""

PARTS = Table(
    "file_parts",
    METADATA,
    Column("file_id", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)
