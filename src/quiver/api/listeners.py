"""Where a server listens: a port, with or without TLS, and sockets in a directory for those on the same machine."""

import asyncio
import contextlib
import ctypes
import ipaddress
import os
import socket as sockets
import ssl
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from socket import SOCK_STREAM, socket
from typing import Any

from quiver.config import ServerConfig
from quiver.errors import ConfigError

BACKLOG = 2048
REST, RPC, ADMIN = "rest.sock", "rpc.sock", "admin.sock"
SOCKETS = (REST, RPC, ADMIN)
"""Files in `socket_dir`; each is for one thing."""
MODE = 0o660
"""The owner and the group may connect: on Linux that takes the right to write."""
DIRECTORY_MODE = 0o750
SO_ATTACH_FILTER = 26
"""As Linux numbers it; Python has no name for it."""
NO_SYN = struct.pack("=" + "HBBI" * 4, 0x30, 0, 0, 13, 0x45, 0, 1, 2, 0x06, 0, 0, 0, 0x06, 0, 0, 0xFFFFFFFF)
"""A program for the kernel: load the flags of a TCP segment; drop it if it is a SYN, else take it whole."""
ALIVE_SECONDS = 1.0
"""In which a living server takes a connection; the kernel does it for one that is busy."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that is bound and listens."""

    bound: socket
    tls: ssl.SSLContext | None = None
    path: Path | None = None
    """Its file, where it is a unix socket."""
    file: tuple[int, int] = (0, 0)
    """Device and inode of the file: another server may have put its own there since."""
    is_shared: bool = False
    """Whether another process goes on with it."""

    @property
    def url(self) -> str:
        """Where clients find it."""
        if self.path:
            return f"unix:{self.path}"
        host, port = self.bound.getsockname()[:2]
        scheme = "https" if self.tls else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    @property
    def name(self) -> str:
        """Its file's name; a port has none."""
        return self.path.name if self.path else ""

    @property
    def is_exposed(self) -> bool:
        """Whether what is sent can be read on a network."""
        on_a_network = self.path is None and not ipaddress.ip_address(self.bound.getsockname()[0]).is_loopback
        return on_a_network and self.tls is None

    async def serve(self, connect: Any, config: ServerConfig) -> asyncio.Server:
        """Let the event loop accept connections."""
        loop, options = asyncio.get_running_loop(), _handshake(self.tls, config.header_seconds, config.write_seconds)
        make = loop.create_unix_server if self.path else loop.create_server
        return await make(connect, sock=self.bound, backlog=BACKLOG, **options)

    async def accept_all(self, queue: socket, connect: Any, seconds: float) -> None:
        """Close a listening socket behind those who are connected already; handshakes that take longer are cut."""
        with queue:
            clients = list(connected(queue))
        await asyncio.gather(*(accept(client, self.tls, connect, seconds) for client in clients))

    def close(self) -> None:
        """Listen no more, and leave no file behind; may be called again."""
        if self.path and _file(self.path) == self.file:
            self.path.unlink(missing_ok=True)
        self.bound.close()


async def accept(client: socket, tls: ssl.SSLContext | None, connect: Any, seconds: float) -> None:
    """Serve someone who is connected already; a handshake that takes longer is cut."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(Exception):  # who leaves meanwhile is gone
        await loop.connect_accepted_socket(connect, client, **_handshake(tls, seconds, seconds))


def _handshake(tls: ssl.SSLContext | None, seconds: float, last_seconds: float) -> dict[str, Any]:
    """Return what the loop must know of TLS: how long its first handshake may take, and its last one.

    The last one begins when all is written, and includes that the client takes it.
    """
    if tls is None:
        return {}
    return {"ssl": tls, "ssl_handshake_timeout": seconds, "ssl_shutdown_timeout": last_seconds}


def bind(config: ServerConfig, tls: ssl.SSLContext | None) -> tuple[Listener, ...]:
    """Listen wherever it is configured, the port first. Raises `ConfigError`, and listens nowhere then."""
    if not (config.tcp or config.socket_dir):
        raise ConfigError("there is nothing to listen on: tcp is off, and socket_dir names no directory")
    with contextlib.ExitStack() as made:
        listeners = [_bind_port(config.host, config.port, tls)] if config.tcp else []
        for listener in listeners:
            made.callback(listener.close)
        if config.socket_dir:
            with _alone(config.socket_dir):
                for name in SOCKETS:
                    listeners.append(_bind_file(config.socket_dir / name))
                    made.callback(listeners[-1].close)
        made.pop_all()
    return tuple(listeners)


def bind_together(config: ServerConfig, count: int) -> tuple[tuple[Listener, ...], tuple[Listener, ...]]:
    """Listen for so many processes: a socket of the port for each, and files for all of them together.

    The kernel gives each connection to one of the port's sockets. Raises `ConfigError`, and listens nowhere then.
    """
    with contextlib.ExitStack() as made:
        first, *files = bind(config, None)
        for listener in (first, *files):
            made.callback(listener.close)
        if not config.tcp:
            made.pop_all()
            return (), (first, *files)
        # The first socket had the port for itself while it was made: another server's would have been in the way.
        first.bound.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEPORT, 1)
        ports = [first]
        for _ in range(count - 1):
            ports.append(_bind_port(config.host, first.bound.getsockname()[1], None, shared=True))
            made.callback(ports[-1].close)
        made.pop_all()
    return tuple(ports), tuple(files)


def inherited(descriptor: int | None, tls: ssl.SSLContext | None) -> tuple[Listener, ...]:
    """Take over what another process has bound."""
    return () if descriptor is None else (Listener(socket(fileno=descriptor), tls, is_shared=True),)


def _bind_port(host: str, port: int, tls: ssl.SSLContext | None, *, shared: bool = False) -> Listener:
    with contextlib.ExitStack() as made:
        try:
            found = sockets.getaddrinfo(host, port, type=SOCK_STREAM, flags=sockets.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            # asyncio sends at once only where the protocol says TCP
            bound = made.enter_context(socket(family, kind, protocol))
            bound.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
            if shared:
                bound.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEPORT, 1)
            bound.bind(address)
            bound.listen(BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
        made.pop_all()
    return Listener(bound, tls)


def _bind_file(path: Path) -> Listener:
    """Listen on a unix socket, in the place of one that a dead server left."""
    bound = socket(sockets.AF_UNIX, SOCK_STREAM)
    try:
        _make_room(path)
        before = os.umask(0o777 & ~MODE)  # there is no moment at which others may connect
        try:
            bound.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(MODE)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    except ConfigError:
        bound.close()
        raise
    return Listener(bound, path=path, file=_file(path))


def _make_room(path: Path) -> None:
    """Remove what a dead server left. Raises `ConfigError` where a living one listens, or the file is something else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path} is in the way: it is no socket, and socket_dir must be for sockets alone")
    except FileNotFoundError:
        return
    with socket(sockets.AF_UNIX, SOCK_STREAM) as probe:
        probe.settimeout(ALIVE_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except (TimeoutError, BlockingIOError):
            pass  # its queue is full: it lives
    raise ConfigError(f"another server listens on {path}: stop it, or give this one a socket_dir of its own")


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a directory, made if it is not there: of two servers that start, one must see what the other has done."""
    import fcntl  # noqa: PLC0415  not on every platform, nor are unix sockets

    try:
        directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
        held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"cannot use socket_dir {directory}: {error.strerror}") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _file(path: Path) -> tuple[int, int]:
    try:
        found = path.lstat()
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


def turn_away(bound: socket) -> None:
    """Let nobody begin to connect to a listening port, while those who have begun still end it.

    To accept all and then close would cut whoever connects between the two. Who is turned away gets no answer, tries
    again a second later, as TCP does, and finds the port closed, or another server.
    """
    if bound.family == sockets.AF_UNIX or sys.platform != "linux":
        return
    program = ctypes.create_string_buffer(NO_SYN, len(NO_SYN))
    known = struct.pack("HP", len(NO_SYN) // 8, ctypes.addressof(program))
    with contextlib.suppress(OSError):  # a kernel without filters
        bound.setsockopt(sockets.SOL_SOCKET, SO_ATTACH_FILTER, known)


def connected(queue: socket) -> Iterator[socket]:
    """Yield those who wait at a listening socket."""
    queue.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            yield queue.accept()[0]
