"""The page and its files: the same for everybody, so that they need no key and may be kept."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from quiver.api import secure
from quiver.api.call import Call, Reply
from quiver.errors import UnknownRoute
from quiver.service import Service

FOLDER = Path(__file__).parent / "static"
INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = secure.page(style="")


@dataclass(frozen=True, slots=True)
class File:
    """A file as it is sent; its tag changes with its bytes."""

    body: bytes
    media_type: str
    tag: str


@cache
def files() -> Mapping[str, File]:
    """Read every file, once."""
    return {
        path.name: File(
            body := path.read_bytes(), MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        )
        for path in sorted(FOLDER.iterdir())
        if path.suffix in MEDIA_TYPES
    }


async def show_page(service: Service, call: Call) -> Reply:
    """Show the dashboard."""
    del service
    if not call.path.endswith("/"):  # its files are found beside it, wherever a proxy has put it
        return Reply(307, b"", headers={"location": f"{call.path.rpartition('/')[2]}/"})
    return _sent(INDEX, call)


async def show_file(service: Service, call: Call) -> Reply:
    """Send one of the files that the page is made of."""
    del service
    return _sent(call.params["file"], call)


def _sent(name: str, call: Call) -> Reply:
    file = files().get(name)
    if file is None:
        raise UnknownRoute("the dashboard has no such file")
    headers = {**POLICY, "cache-control": "no-cache", "etag": file.tag}
    if file.tag in call.headers.get("if-none-match", ""):
        return Reply(304, b"", file.media_type, headers)
    return Reply(200, file.body, file.media_type, headers)
