"""Tells an address something by POST. What is connected to is what was checked: a name is resolved once.

Whoever may submit a job chooses where the server connects to; private addresses are therefore out of bounds, unless the
operator allows them, and nothing of the reply but its status is read.
"""

import asyncio
import http.client
import ipaddress
import socket
import ssl
from urllib.parse import SplitResult, urlsplit

from quiver.errors import InvalidInput

TIMEOUT_SECONDS = 10.0
_PORTS = {"http": 80, "https": 443}


def check_address(url: str) -> None:
    """Refuse what is no address that can be told anything. Raises `InvalidInput`."""
    try:
        parts = urlsplit(url)
        is_fine = parts.scheme in _PORTS and bool(parts.hostname) and parts.port != 0 and url.isascii()
    except ValueError:
        is_fine = False
    if not is_fine or any(c.isspace() for c in url):
        raise InvalidInput("webhook is no URL: it begins with https:// or http://", param="webhook")


async def post(url: str, body: bytes, *, allow_private: bool) -> bool:
    """Send JSON to an address; tells whether it was taken, with a status of 200 to 299."""
    try:
        return await asyncio.to_thread(_post, urlsplit(url), body, allow_private)
    except (OSError, http.client.HTTPException, ValueError):
        return False


def _post(url: SplitResult, body: bytes, allow_private: bool) -> bool:  # noqa: FBT001  to_thread has no keywords here
    host, port = url.hostname or "", url.port or _PORTS[url.scheme]
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    sock = _connect(host, port, allow_private=allow_private)
    try:
        if url.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        connection.sock = sock
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.request("POST", path, body, {"Content-Type": "application/json", "User-Agent": "quiver"})
        return http.client.OK <= connection.getresponse().status < http.client.MULTIPLE_CHOICES
    finally:
        connection.close()
        sock.close()


def _connect(host: str, port: int, *, allow_private: bool) -> socket.socket:
    """Connect to one of a name's addresses that may be called."""
    last: OSError = ConnectionRefusedError(f"{host} has no address that may be called")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not (allow_private or is_public(str(address[0]))):
            continue
        sock = socket.socket(family, kind, protocol)
        sock.settimeout(TIMEOUT_SECONDS)
        try:
            sock.connect(address)
        except OSError as error:
            sock.close()
            last = error
        else:
            return sock
    raise last


def is_public(address: str) -> bool:
    """Tell whether an address is anybody's to reach: no private, local or special one, nor one inside another."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64: an IPv4 address in the last 32 bits
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast
