"""The addresses behind an endpoint, and what listens there if it is not an ema server."""

from __future__ import annotations

import re
import socket

_TCP = re.compile(r"tcp://(?P<host>.+):(?P<port>\d+)")
_IDENTIFY_S = 1.0
_FIRST_BYTES = 16


def resolve(endpoint: str) -> list[str]:
    """The endpoint with each numeric address of its host, in the resolver's order; other transports as they are.

    Raises:
        OSError: the host name does not resolve.
    """
    match = _TCP.fullmatch(endpoint)
    if match is None:
        return [endpoint]
    host, port = match["host"].strip("[]"), match["port"]
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(error.errno, f"the host name {host!r} does not resolve ({error.strerror})") from None
    addresses = []
    for family, _, _, _, place in found:
        if family == socket.AF_INET:
            addresses.append(f"tcp://{place[0]}:{port}")
        elif family == socket.AF_INET6:
            scope = f"%{place[3]}" if len(place) == 4 and place[3] else ""
            addresses.append(f"tcp://[{str(place[0]).partition('%')[0]}{scope}]:{port}")
    return list(dict.fromkeys(addresses))


def first_bytes(endpoint: str) -> bytes:
    """What a TCP endpoint answers to an HTTP request, empty if it says nothing. Takes up to 2 s."""
    match = _TCP.fullmatch(endpoint)
    if match is None:
        return b""
    try:
        with socket.create_connection((match["host"].strip("[]"), int(match["port"])), _IDENTIFY_S) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return connection.recv(_FIRST_BYTES)
    except OSError:
        return b""


def is_http(first: bytes) -> bool:
    """Whether an HTTP server answers with these first bytes."""
    return first.startswith(b"HTTP/")


def described(endpoint: str, first: bytes) -> str:
    """What listens at an endpoint that did not answer as an ema server does, by its first bytes."""
    if is_http(first):
        return f"{endpoint} is the address of an HTTP server, not of ema serve's trainer port"
    if first.startswith(b"\xff"):
        return f"a ZeroMQ socket listens at {endpoint}, but it does not answer as an ema server"
    if first:
        return f"something other than an ema server listens at {endpoint} (it says {first!r})"
    return f"no ema server answered at {endpoint}"
