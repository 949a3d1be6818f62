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


def identify(endpoint: str) -> str:
    """What listens at an endpoint that did not answer as an ema server does, by its first bytes. Takes up to 2 s."""
    unknown = "no ema server answered"
    match = _TCP.fullmatch(endpoint)
    if match is None:
        return unknown
    try:
        with socket.create_connection((match["host"].strip("[]"), int(match["port"])), _IDENTIFY_S) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            first = connection.recv(_FIRST_BYTES)
    except OSError:
        return unknown
    if first.startswith(b"HTTP/"):
        return "an HTTP server listens, which is no address for trainers,"
    if first.startswith(b"\xff"):
        return "a ZeroMQ socket listens that did not answer as an ema server"
    return f"something else than an ema server listens (it says {first!r})" if first else unknown
