"""Ends connections that send without being understood: before their HELLO is accepted, and in messages without an end.

ZeroMQ bounds a frame, but neither the frames of a message that is not complete, nor the time that a peer may take to
say who it is: until then it holds what it has sent, and a file descriptor. It has no call to close one connection, so
the socket below it is shut down; ZeroMQ then sees a peer that has left.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from ema_proto.limits import CREDIT_WINDOW_CHUNKS, FRAME_BYTES_MAX

logger = logging.getLogger("ema")

GREETING_S: Final = 10.0  # twice the time after which a trainer gives up
GREETING_BYTES_MAX: Final = 256 << 10  # a HELLO and its proof have at most 128 KiB
# What a peer that is understood may have sent since its last message: those that wait in ZeroMQ, and one in the system.
UNREAD_BYTES_MAX: Final = (CREDIT_WINDOW_CHUNKS + 8) * FRAME_BYTES_MAX
_GREETING_POLL_S: Final = 0.01  # a peer on this machine sends 20 MB meanwhile
_POLL_S: Final = 0.25
_TRIMS_S: Final = (0.25, 1.0, 5.0)  # after the end of a connection: ZeroMQ releases what it held a little later
_OWN_DESCRIPTORS: Final = 512  # of the rest of the server
_CONNECTIONS_MIN: Final = 16
_BYTES_RECEIVED: Final = struct.Struct("128xQ")  # its place in Linux's tcp_info
_LOGGED_EVERY_S: Final = 60.0

Happening: TypeAlias = tuple[Literal["accepted", "closed"], int]


def connections_max() -> int:
    """How many connections of trainers leave enough of the process's file descriptors for files and HTTP: half."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(_CONNECTIONS_MIN, (soft - _OWN_DESCRIPTORS) // 2)


@dataclass(slots=True, eq=False)
class _Peer:
    fd: int
    inode: int  # by which a reused descriptor is recognised
    since: float
    greeted: bool = False
    messages: int = 0
    checked: int = 0  # messages at the last check that found new ones
    received: int = 0  # bytes at that check


class Peers:
    """The connections of the ingest socket, by file descriptor. Any thread may call `heard`.

    Args:
        happenings: waits up to the given seconds and returns the connections that were accepted or closed. None ends
            the watch.
    """

    def __init__(self, happenings: Callable[[float], list[Happening] | None]) -> None:
        self._happenings = happenings
        self._peers: dict[int, _Peer] = {}
        self._logged_at = -_LOGGED_EVERY_S
        self._trims: list[float] = []
        self._thread = threading.Thread(target=self._run, name="ingest-peers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def heard(self, fd: int, *, is_greeted: bool) -> None:
        """A whole message of this connection was read, whose HELLO was accepted or not.

        A message may be read before its connection is known here; a trainer sends another one every two seconds.
        """
        peer = self._peers.get(fd)
        if peer is not None:
            peer.messages += 1
            peer.greeted = peer.greeted or is_greeted

    def _run(self) -> None:
        pause_s = _POLL_S
        while (happenings := self._happenings(pause_s)) is not None:
            now = time.monotonic()
            for kind, fd in happenings:
                if kind == "accepted":
                    self._accept(fd, now)
                else:
                    self._peers.pop(fd, None)
            for peer in list(self._peers.values()):
                self._check(peer, now)
            if self._trims and now >= self._trims[0]:
                del self._trims[0]
                _return_memory()
            all_greeted = all(peer.greeted for peer in self._peers.values())
            pause_s = _POLL_S if all_greeted else _GREETING_POLL_S

    def _accept(self, fd: int, now: float) -> None:
        try:
            peer = self._peers[fd] = _Peer(fd, os.fstat(fd).st_ino, now)
        except OSError:
            return  # it is closed already
        if len(self._peers) > connections_max():
            waiting = next((peer for peer in self._peers.values() if not peer.greeted), peer)
            self._end(waiting, f"{connections_max()} connections, the maximum, are open", now)

    def _check(self, peer: _Peer, now: float) -> None:
        received = _bytes_received(peer.fd)
        if peer.greeted:
            if peer.messages != peer.checked:
                peer.checked, peer.received = peer.messages, received
            elif received - peer.received > UNREAD_BYTES_MAX:
                self._end(peer, "it sends a message without an end", now)
        elif now - peer.since > GREETING_S:
            self._end(peer, f"it has not been accepted as a trainer within {GREETING_S:g} s", now)
        elif received > GREETING_BYTES_MAX:
            self._end(peer, f"it has sent {received} bytes before it was accepted as a trainer", now)

    def _end(self, peer: _Peer, why: str, now: float) -> None:
        """Shut the connection down, unless its descriptor belongs to another one by now."""
        self._peers.pop(peer.fd, None)
        try:
            with socket.socket(fileno=os.dup(peer.fd)) as connection:
                if os.fstat(connection.fileno()).st_ino != peer.inode:
                    return
                address = connection.getpeername()
                connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is closed already
        self._trims = [now + after_s for after_s in _TRIMS_S]
        level = logging.WARNING if now - self._logged_at >= _LOGGED_EVERY_S else logging.DEBUG
        self._logged_at = now if level == logging.WARNING else self._logged_at
        logger.log(level, "the connection from %s is closed: %s", address, why)


def _return_memory() -> None:
    """Have the C library return freed memory to the system; it would keep most of what a peer had sent."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _bytes_received(fd: int) -> int:
    """Bytes that the system has received on a TCP connection; 0 for another one."""
    try:
        with socket.socket(fileno=os.dup(fd)) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
            return int(_BYTES_RECEIVED.unpack(info)[0])
    except (OSError, struct.error):
        return 0
