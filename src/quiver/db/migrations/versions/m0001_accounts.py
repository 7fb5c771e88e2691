"""Tiers, users, keys and what they used."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables, and the tiers that every server begins with."""
    tiers = op.create_table(
        "tiers",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("monthly_embeddings", sa.BigInteger),
        sa.Column("rate_per_second", sa.Double),
        sa.Column("burst", sa.Double),
        sa.PrimaryKeyConstraint("name", name="pk_tiers"),
    )
    op.bulk_insert(
        tiers,
        [
            {"name": "free", "monthly_embeddings": 20_000, "rate_per_second": 10, "burst": 20},
            {"name": "pro", "monthly_embeddings": 100_000, "rate_per_second": 40, "burst": 80},
            {"name": "scale", "monthly_embeddings": 2_000_000, "rate_per_second": 200, "burst": 400},
        ],
    )
    op.create_table(
        "users",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("email", sa.String(320), nullable=False),
        sa.Column("tier", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("email", name="uq_users_email"),
        sa.ForeignKeyConstraint(["tier"], ["tiers.name"], name="fk_users_tier"),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(12), nullable=False),
        sa.Column("prefix", sa.String(8), nullable=False),
        sa.Column("hash", sa.String(60), nullable=False),
        sa.Column("user_id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_keys_user_id"),
    )
    op.create_index("ix_keys_user_id", "keys", ["user_id"])
    _create_usage()


def _create_usage() -> None:
    op.create_table(
        "usage",
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("user_id", sa.Integer, nullable=False),
        sa.Column("key_id", sa.String(12), nullable=False),
        sa.Column("model", sa.String(300), nullable=False),
        sa.Column("embeddings", sa.BigInteger, nullable=False),
        sa.Column("cached", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_usage"),
    )
    op.create_index("ix_usage_created_at", "usage", ["created_at"])
    op.create_table(
        "usage_totals",
        sa.Column("user_id", sa.Integer, nullable=False),
        sa.Column("period", sa.String(7), nullable=False),
        sa.Column("key_id", sa.String(12), nullable=False),
        sa.Column("model", sa.String(300), nullable=False),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("embeddings", sa.BigInteger, nullable=False),
        sa.Column("cached", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "period", "key_id", "model", name="pk_usage_totals"),
    )
