"""A real browser before a real server: Debian's Chromium without a window, and a dashboard to open in it."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from desk import Desk
from faults.servers import STUB, importable
from hub_server import Fault, Hub, Repository, tiny
from quiver import db
from quiver.accounts import SCOPES
from server_process import ServerProcess, serving

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP *.example 127.0.0.1"]
"""Names that end so lead to this machine, as an attacker's would."""
PATIENCE_MS = 20_000
LARGE = 24 << 20
ALL_SCOPES = frozenset(SCOPES)
FAILING = "acme/nowhere"
HELD = "acme/held"
"""A model on a hub that gives half of a file, and the rest when it is told to."""
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
KEY = "quiver-key"
"""Where the page keeps it."""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser; where there is none a test is skipped, but in continuous integration it fails."""
    if not CHROMIUM:
        reason = "no chromium: `apt-get install chromium` (Debian) brings one"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        expect.set_options(timeout=PATIENCE_MS)
        yield browser
        browser.close()


@dataclass
class Stage:
    """A server that runs with the dashboard, keys for it, and a hub that it fetches models from."""

    url: str
    folder: Path
    hub: Hub
    server: ServerProcess
    keys: dict[str, str]
    """`operator` may do everything, `caller` all but open the dashboard."""

    def client(self, who: str = "operator") -> httpx.Client:
        """Return a client of the server's other APIs."""
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {self.keys[who]}"}, timeout=20)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """Run a stub with two models, another that cannot be loaded, and one that takes its time to come."""
    desk = Desk(db.sqlite_url(folder))
    scopes = {"operator": ALL_SCOPES, "caller": ALL_SCOPES - {"admin"}}
    with ThreadPoolExecutor(1) as aside:  # in this thread the browser's own loop runs
        keys = {
            who: aside.submit(asyncio.run, desk.key(email=f"{who}@b.c", name=who, scopes=each)).result()
            for who, each in scopes.items()
        }
    files = tiny() | {"model.safetensors": bytes(LARGE)}
    held = Repository(files, faults={"model.safetensors": Fault.HELD})
    with Hub({HELD: held}) as hub:
        settings = {
            "data_dir": folder, "auth": "required", "dashboard": "true", "cache_entries": 100, "hub_token": "hf_hidden", "stall_seconds": 300,
            "allow_models": f"{FAILING},{HELD}", "hub_endpoint": hub.url, "hub_cache": folder / "cache",
            "socket_dir": folder / "sockets",
        }  # fmt: skip
        given = [f"--set={name}={value}" for name, value in settings.items()]
        environment = {"PYTHONPATH": importable(), "NO_PROXY": "*"}
        with serving("--models=2", *given, command=STUB, **environment) as server:
            yield Stage(server.ready_url(), folder, hub, server, keys)
            hub.gate.set()


@dataclass
class Seen:
    """A page of the dashboard, and all that went wrong in it."""

    page: Page
    faults: list[str] = field(default_factory=list)

    def watch(self, origin: str) -> None:
        """Note what a page complains of, and what it asks of somebody else."""
        self.page.on("console", lambda said: self.note(said.type, said.text))
        self.page.on("pageerror", lambda error: self.faults.append(f"{error}"))
        self.page.on("request", lambda request: self.check(request.url, origin))

    def note(self, kind: str, text: str) -> None:
        """Keep errors and warnings; that a reply was a refusal is not one of the page's."""
        if kind in ("error", "warning") and "Failed to load resource" not in text:
            self.faults.append(text)

    def check(self, url: str, origin: str) -> None:
        """Keep the address of anybody else."""
        if not url.startswith((origin, "data:", "blob:")):
            self.faults.append(f"it asks {url}")


@contextlib.contextmanager
def opened(browser: Browser, url: str, key: str = "", **options: object) -> Iterator[Page]:
    """Open a dashboard in a tab of its own, with a key; at the end nothing may have gone wrong in it."""
    context = context_for(browser, key, **options)
    with tab(context, url) as page:
        yield page
    context.close()


def context_for(browser: Browser, key: str = "", **options: object) -> BrowserContext:
    """Make a browser's profile, in which every tab holds a key."""
    context = browser.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce", **options})
    context.set_default_timeout(PATIENCE_MS)
    if key:
        context.add_init_script(f"sessionStorage.setItem({json.dumps(KEY)}, {json.dumps(key)})")
    return context


@contextlib.contextmanager
def tab(context: BrowserContext, url: str) -> Iterator[Page]:
    """Open a dashboard in a tab; at the end nothing may have gone wrong in it."""
    seen = Seen(context.new_page())
    seen.watch(url.partition("/admin")[0])
    seen.page.goto(url)
    yield seen.page
    seen.page.close()
    assert seen.faults == []


@contextlib.contextmanager
def tunnel(path: Path) -> Iterator[str]:
    """Let a port of this machine lead to a unix socket, as `ssh -L` does; yields its URL."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def join(client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(str(path))
            back = threading.Thread(target=copy, args=(server, client))
            back.start()
            copy(client, server)
            back.join()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=join, args=(listener.accept()[0],)))
                threads[-1].start()

    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
    for thread in threads:
        thread.join()
