"""A transport that sends together what is written together.

uvicorn writes a reply's head and its body apart. Each packet wakes the client, which on an idle core of a virtual machine
takes longer than writing the reply does.
"""

import asyncio
from typing import Any

JOINED_BYTES = 32 << 10
"""More than that goes at once: whoever writes it must be told when nobody reads."""


class JoinedTransport(asyncio.Transport):
    """Holds what is written until the event loop's next turn; everything else is the transport's below it."""

    def __init__(self, below: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._below = below
        self._loop = loop
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def write(self, data: Any) -> None:
        """Send soon."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)
        self._num_bytes += len(data)
        if self._num_bytes >= JOINED_BYTES:
            self.flush()

    def write_now(self, data: bytes) -> None:
        """Send what is a reply by itself."""
        self.flush()
        self._below.write(data)

    def flush(self) -> None:
        """Send what is held now: it is whole."""
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            self._num_bytes = 0
            self._below.write(data)

    def close(self) -> None:
        """Send what is held, and end."""
        self.flush()
        self._below.close()

    def abort(self) -> None:
        """End at once."""
        self._parts.clear()
        self._num_bytes = 0
        self._below.abort()

    def get_write_buffer_size(self) -> int:
        """Return the bytes that are not sent yet."""
        return self._num_bytes + self._below.get_write_buffer_size()

    def is_closing(self) -> bool:
        """Whether it has ended or is about to."""
        return self._below.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Tell about the connection."""
        return self._below.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """Receive nothing for now."""
        self._below.pause_reading()

    def resume_reading(self) -> None:
        """Receive again."""
        self._below.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Let another protocol receive."""
        self._below.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return who receives."""
        return self._below.get_protocol()
