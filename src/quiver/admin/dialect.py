"""The dashboard's routes, and who may call them: at the port by a key, at the socket by the mode of its file."""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from quiver.accounts import ADMIN
from quiver.admin import pages, people, playground, settings, status, work
from quiver.admin.office import Office, Task
from quiver.api.call import TEXT, Call, Dialect, Reply, Route
from quiver.billing import check
from quiver.errors import Forbidden, Unauthorized
from quiver.service import Service

Guard = Callable[[Call], None]
"""Raises why a call is not let in."""


def by_key(call: Call) -> None:
    """Let in who shows a key of an account that is good for it; the server's own key is everybody's."""
    if call.caller.key is None:
        raise Unauthorized(
            "the dashboard takes a key of an account with the scope admin: make one with "
            f"`quiver keys create --email you@example.com --scopes {ADMIN},embed,rerank`"
        )
    check(call.caller, ADMIN)


def by_file(call: Call) -> None:
    """Let in who may connect; but of browsers, which may come by a tunnel, the dashboard's own page alone.

    Without keys, a page of somebody else must be kept from calling: one of another origin, and one whose name was made
    to point to this machine.
    """
    host, origin = call.headers.get("host", ""), call.headers.get("origin")
    if not _is_local(urlsplit(f"//{host}").hostname or ""):
        raise Forbidden(f"{host!r} is no name of this machine: call the socket as localhost")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Forbidden("a page of another origin may not call: open the dashboard at this address")


def _is_local(name: str) -> bool:
    """Whether a name cannot be one that somebody has registered: it is an address, or has no dot."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name
    return True


def admin_dialect(office: Office, guard: Guard, shape: Dialect, *, at_root: bool = False) -> Dialect:
    """Return the routes below /admin, and at the root too where nothing else is; errors are written as another's."""
    routes = [
        Route("GET", "/", pages.show_page, "Show the dashboard", media_type=TEXT, public=True),
        Route("GET", "/static/{file}", pages.show_file, "A file of the dashboard", media_type=TEXT, public=True),
        *(_route(duty, office, guard) for duty in DUTIES),
    ]
    return Dialect(
        name=status.OWN,
        routes=[replace(route, at_root=at_root) for route in routes],
        render_error=shape.render_error,
        error=shape.error,
    )


def _route(duty: "Duty", office: Office, guard: Guard) -> Route:
    async def handle(service: Service, call: Call) -> Reply:
        guard(call)
        return await duty.task(office, service, call)

    return Route(duty.method, duty.path, handle, duty.summary, duty.body, duty.reply, is_queued=duty.is_queued)


@dataclass(frozen=True, slots=True)
class Duty:
    """A route before it has a guard."""

    method: str
    path: str
    task: Task
    summary: str
    reply: Any
    body: Any = None
    is_queued: bool = False


def _change(path: str, task: Task, summary: str, reply: Any, body: Any = None) -> Duty:
    """What an operator changes must be possible when the server has too much to do."""
    return Duty("POST", path, task, summary, reply, body, is_queued=True)


DUTIES = (
    Duty("GET", "/api/status", status.show_status, "Show what the server is doing", status.StatusReply),
    Duty("GET", "/api/settings", settings.show_settings, "Show the settings in force", list[settings.SectionRow]),
    Duty("GET", "/api/keys", people.list_keys, "List the keys", people.KeysReply),
    _change("/api/keys", people.create_key, "Make a key", people.KeyReply, people.NewKey),
    _change("/api/keys/{id}/revoke", people.revoke_key, "End a key", people.KeyRow),
    _change("/api/keys/{id}/rotate", people.rotate_key, "Replace a key", people.KeyReply, people.Grace),
    Duty("GET", "/api/users", people.list_users, "List the users", list[people.UserRow]),
    _change("/api/users", people.set_user, "Add a user, or set its tier", people.UserRow, people.UserBody),
    Duty("GET", "/api/tiers", people.list_tiers, "List the tiers", list[people.TierRow]),
    _change("/api/tiers", people.set_tier, "Add a tier, or change one", people.TierRow, people.TierRow),
    Duty("GET", "/api/usage", people.show_usage, "Sum up a month", list[people.UsageRow]),
    Duty("GET", "/api/jobs", work.list_jobs, "List the jobs", work.JobsReply),
    Duty("GET", "/api/jobs/{id}", work.show_job, "Show a job", work.JobDetail),
    _change("/api/jobs/{id}/cancel", work.cancel_job, "Stop a job", work.JobDetail),
    Duty("POST", "/api/try/embed", playground.embed, "Compare texts", playground.EmbedReply, playground.EmbedBody),
    Duty("POST", "/api/try/rerank", playground.rerank, "Rank documents", playground.RerankReply, playground.RerankBody),
    Duty("POST", "/api/try/benchmark", playground.benchmark, "Measure a step", playground.Step, playground.StepBody),
)
"""What the dashboard reads and sends."""
