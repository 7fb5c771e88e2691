"""The dashboard: a page of static files, and the JSON that it reads and sends, as routes of a dialect of its own."""

from quiver.admin.dialect import admin_dialect, by_file, by_key
from quiver.admin.office import Office

__all__ = ["Office", "admin_dialect", "by_file", "by_key"]
