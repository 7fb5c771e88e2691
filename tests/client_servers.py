"""Servers for tests of the client: one that does what a script says, on a thread of its own."""

import contextlib
import json
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

LONG_SECONDS = 20.0


@dataclass
class Got:
    """One request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float

    def json(self) -> Any:
        """Decode the body."""
        return json.loads(self.body)


class Handler(BaseHTTPRequestHandler):
    """Notes a request and does what the script has for it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        length = int(self.headers.get("content-length", 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        got = Got(self.command, self.path, headers, self.rfile.read(length), time.monotonic())
        script: Script = self.server.script
        script.answer(self, got)

    do_POST = do_GET  # noqa: N815  the library asks for this name

    def reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a response."""
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        """Name nobody: a unix socket has no address."""
        return "client"

    def log_message(self, *_: object) -> None:
        """Say nothing."""


Action = Callable[[Handler, Got], None]


@dataclass
class Script:
    """What a server does with one request after another; the last action is for all that come later."""

    actions: list[Action]
    seen: list[Got] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, handler: Handler, got: Got) -> None:
        """Do what is next."""
        with self._lock:
            self.seen.append(got)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            action = self.actions.pop(0) if len(self.actions) > 1 else self.actions[0]
        try:
            action(handler, got)
        finally:
            with self._lock:
                self._now -= 1


def says(status: int, body: Any = None, **headers: str) -> Action:
    """Answer with JSON, or with bytes as they are."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: handler.reply(status, raw, named)


def cuts(handler: Handler, got: Got) -> None:
    """Reset the connection instead of an answer."""
    del got
    handler.close_connection = True
    handler.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def cuts_short(handler: Handler, got: Got) -> None:
    """Close the connection in the middle of the answer."""
    del got
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")


def babbles(handler: Handler, got: Got) -> None:
    """Send what is not HTTP."""
    del got
    handler.close_connection = True
    handler.wfile.write(b"\x00\x17what?\r\n\r\n")


def hangs(handler: Handler, got: Got) -> None:
    """Never answer."""
    del got
    handler.close_connection = True
    handler.server.script.over.wait(LONG_SECONDS)


def drips(handler: Handler, got: Got) -> None:
    """Send one byte of the answer after another, each in time."""
    del got
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    with contextlib.suppress(OSError):
        while not handler.server.script.over.wait(0.05):
            handler.wfile.write(b" ")


class TcpServer(socketserver.ThreadingTCPServer):
    """On a port."""

    daemon_threads = True
    allow_reuse_address = True


class UnixServer(socketserver.ThreadingUnixStreamServer):
    """On a path."""

    daemon_threads = True


@contextlib.contextmanager
def scripted(*actions: Action, socket: str | None = None) -> Iterator[tuple[str, Script]]:
    """Run a server that does one action after another; yields its URL and its script."""
    script = Script(list(actions))
    server = UnixServer(socket, Handler) if socket else TcpServer(("127.0.0.1", 0), Handler)
    server.script = script
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"unix://{socket}" if socket else f"http://127.0.0.1:{server.server_address[1]}", script
    finally:
        script.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
