"""One process of several as its supervisor sets it up: its place, and the few words between the two.

supervisor ──> process    CONNECTION + a socket    someone has connected, at the port or at the socket that is named: serve them
                          LEAVE                    another has taken your place: answer whom you have, then end
                          (the end)                there is no supervisor any more: stop
process ──> supervisor    SERVING                  connections may come
                          READY                    the models are loaded
"""

import socket as sockets
from pathlib import Path
from socket import socket
from typing import Self

import msgspec

CONNECTION = b"c"
LEAVE = b"l"
SERVING = b"s"
READY = b"r"
STOPPING = b"e"
VARIABLE = "QUIVER_PLACE"
"""Where in the environment a process finds its place."""
MAX_BYTES = 16


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is told before it does anything."""

    number: int
    count: int
    control: int
    """The descriptor of its end of the control socket."""
    port: int | None
    """The descriptor of its listening socket, where there is a port."""
    directory: str
    """Where the processes of one server find each other; nobody else may look into it."""
    waits: bool
    """Others serve already: it takes connections once it is ready, and not before."""

    @classmethod
    def read(cls, text: str) -> Self:
        """Read what a supervisor has written."""
        return msgspec.json.decode(text, type=cls)

    def written(self) -> str:
        """Return it as text, for a variable of the environment."""
        return msgspec.json.encode(self).decode()

    @property
    def folder(self) -> Path:
        """The directory as a path."""
        return Path(self.directory)


def control_pair() -> tuple[socket, socket]:
    """Make both ends of a control socket: words stay apart, and each side sees the other's end."""
    pair = sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
    for end in pair:
        end.setblocking(False)
    return pair


def hand_over(control: socket, client: socket, name: str) -> bool:
    """Give a process someone who has connected, at the port or at a socket of that name; tells whether it could take them."""
    word = CONNECTION + name.encode()
    try:
        sockets.send_fds(control, [word], [client.fileno()])
    except OSError:  # it has too many to take already, or it is gone
        return False
    return True


def hear(control: socket) -> tuple[bytes, list[socket]]:
    """Return the next word, b"" at the end, and the sockets that came with it. Raises `BlockingIOError` if there is none."""
    word, descriptors, _, _ = sockets.recv_fds(control, MAX_BYTES, 1)
    return word, [socket(fileno=descriptor) for descriptor in descriptors]
