"""Rows of usage that stand for several requests."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column; what is there stands for one request each."""
    op.add_column("usage", sa.Column("requests", sa.Integer, nullable=False, server_default="1"))
