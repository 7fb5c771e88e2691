"""What is found where a server listens: every API at the port and at rest.sock, one thing at each other socket.

port, rest.sock    every API, and the dashboard under /admin where it is on; keys as the settings say
rpc.sock           JSON-RPC and health; keys as the settings say
admin.sock         the dashboard and health; nobody is asked for a key, the mode of the file is the guard

Behind each of them are the same models and accounts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quiver.admin import Office, admin_dialect, by_file
from quiver.admission import Admission
from quiver.api import listeners, secure
from quiver.api.call import Dialect
from quiver.api.dispatch import Api
from quiver.api.edge import Edge
from quiver.api.replies import Replies, Room
from quiver.api.router import Router
from quiver.api.server import Entrance
from quiver.config import Config
from quiver.gate import Gate, OpenGate
from quiver.service import Service
from quiver.stores import Stores


@dataclass(frozen=True, slots=True)
class Building:
    """What all entrances lead to."""

    config: Config
    service: Service
    admission: Admission
    stores: Stores

    def entrance(self, router: Router, gate: Gate, replies: Replies | None = None) -> Entrance:
        """Make an entrance; without `replies`, every request is answered anew."""
        limits, observer = self.config.server, self.service.observer
        api = Api(router, self.service, gate, observer, self.admission, timeout_seconds=limits.timeout_seconds)
        at_port = limits if replies else replace(limits, cors_origins=())  # a browser is nowhere else
        edge = Edge(router, gate, self.admission, observer, at_port, secure.every_reply(self.config.tls))
        none = Replies(gate, self.service.billing, observer, Room(0, 0), age=lambda: 0)
        return Entrance(api, edge, replies or none)

    def sockets(self, gate: Gate, rpc: Dialect, office: Office, health: Dialect) -> Mapping[str, Entrance]:
        """Make the entrances of those sockets that have one of their own."""
        at_its_root = replace(rpc, routes=[*rpc.routes, *(replace(route, path="/") for route in rpc.routes)])
        dashboard = admin_dialect(office, by_file, health, at_root=True)
        own = OpenGate(self.stores.register, self.stores.limiter)
        return {
            listeners.RPC: self.entrance(Router((at_its_root, health), {}), gate),
            listeners.ADMIN: self.entrance(Router((dashboard, health), {}), own),
        }


def work_of(dialects: Sequence[Dialect]) -> frozenset[str]:
    """Return the paths of those routes that compute while their client waits, and do nothing else by another method."""
    routes = [route for dialect in dialects for route in dialect.routes]
    others = {r.path for r in routes if r.method != "POST" or r.is_queued or r.is_upload}
    return frozenset(r.path for r in routes) - others
