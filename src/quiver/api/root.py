"""The one table of collisions: whose call it is, where several APIs live at one path of the root.

Facts of their clients: each body below is what the client of that API sends, and no other's does.
"""

from collections.abc import Callable

from quiver.api.call import Call
from quiver.api.router import Choice, Keys, Shared

Condition = Callable[[Call, Keys], bool]


def has(*names: str) -> Condition:
    """Tell by a field of the body, whatever its value."""
    return lambda _, keys: any(name in keys for name in names)


SHARED: Shared = {
    ("GET", "/health"): (Choice("health"),),
}
"""By method and path; the order of the choices is the order in which they are tried."""
