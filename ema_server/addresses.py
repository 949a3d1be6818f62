"""Every address of a host name, and one port on all of them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import TypeVar

Bound = TypeVar("Bound")
_TRIES = 20  # a port that is free on the first address may be taken on another
_NOT_HERE = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENODEV})


def numeric_hosts(host: str) -> tuple[str, ...]:
    """The addresses of a host as text, IPv4 first; a link-local one keeps its scope (`fe80::1%eth0`).

    Raises:
        OSError: the name is unknown.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    numeric = [socket.getnameinfo(info[4], socket.NI_NUMERICHOST)[0] for info in sorted(found, key=lambda one: one[0])]
    return tuple(dict.fromkeys(numeric))


def bracketed(host: str) -> str:
    """A host as URLs and endpoints write it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def bind_all(
    hosts: tuple[str, ...], port: int, bind: Callable[[str, int], tuple[Bound, int]], undo: Callable[[Bound], None]
) -> list[Bound]:
    """Bind each of `hosts` at one port.

    Addresses that this machine lacks (a name with both families on a host without IPv6) are left out, unless that
    leaves none.

    Args:
        hosts: numeric addresses.
        port: 0 takes one that is free on all of them.
        bind: binds an address; returns what it made and the port.
        undo: releases what `bind` made.

    Raises:
        OSError: the port is taken on one of them, or none is an address of this machine.
    """
    for _ in range(_TRIES if port == 0 else 0):
        try:
            return _bind_all(hosts, port, bind, undo)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    return _bind_all(hosts, port, bind, undo)


def _bind_all(
    hosts: tuple[str, ...], port: int, bind: Callable[[str, int], tuple[Bound, int]], undo: Callable[[Bound], None]
) -> list[Bound]:
    made: list[Bound] = []
    for index, host in enumerate(hosts):
        try:
            bound, port = bind(host, port)
        except OSError as error:
            others = made or index < len(hosts) - 1
            if error.errno in _NOT_HERE and others:
                continue
            for bound in made:
                undo(bound)
            raise
        made.append(bound)
    return made
