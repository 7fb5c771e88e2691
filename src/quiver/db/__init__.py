"""Users, keys and usage on disk: SQLite beside the models, or PostgreSQL. The only package that knows SQLAlchemy."""

from quiver.db.accounts import Accounts
from quiver.db.database import Database, sqlite_url
from quiver.db.ledger import Ledger
from quiver.db.migrate import prepare, upgrade

__all__ = ["Accounts", "Database", "Ledger", "prepare", "sqlite_url", "upgrade"]
