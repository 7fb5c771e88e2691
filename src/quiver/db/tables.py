"""The tables as the newest migration leaves them; `tests/test_db.py` holds the two together. Times are Unix seconds."""

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, MetaData, String, Table, Text

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
    Index(None, "created_at"),
)
"""One row for each answered request: what was applied already is known by its id. No foreign keys: what happened is
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
