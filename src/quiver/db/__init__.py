"""Users, keys, usage and jobs on disk: SQLite beside the models, or PostgreSQL. The only package that knows SQLAlchemy."""

from quiver.db.accounts import Accounts
from quiver.db.database import WRITE_SECONDS, Database, file_of, sqlite_url
from quiver.db.files import Files
from quiver.db.jobs import JobRows
from quiver.db.ledger import Ledger
from quiver.db.lines import Lines
from quiver.db.migrate import Status, prepare, status, upgrade

__all__ = [
    "WRITE_SECONDS",
    "Accounts",
    "Database",
    "Files",
    "JobRows",
    "Ledger",
    "Lines",
    "Status",
    "file_of",
    "prepare",
    "sqlite_url",
    "status",
    "upgrade",
]
