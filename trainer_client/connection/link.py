"""The DEALER socket: the only file of the trainer's side that knows ZeroMQ. One thread may use a link.

Comes in: frames to write, without copying payloads. Goes out: frames read, and what became of the connection. A socket
is never reused after its connection broke: a DEALER keeps its queue across reconnections, and stale frames with it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
from dataclasses import dataclass

import zmq
import zmq.utils.garbage  # loaded now, so that its exit function, which ends sending, runs after that of any client
from zmq.utils.monitor import recv_monitor_message

from ema_proto.limits import CREDIT_WINDOW_CHUNKS, FRAME_BYTES_MAX

_CONNECT_RETRY_MS = 100
_CONNECT_RETRY_MAX_MS = 1000
_FAREWELL_MS = 200  # how long a BYE may take to leave the process
_KEEPALIVE_IDLE_S = 30  # finds half-open connections of hosts that vanished

_links: weakref.WeakSet[Link] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Received:
    """What one wait brought: whole messages, and whether the connection broke or was refused meanwhile."""

    messages: tuple[list[bytes], ...] = ()
    broken: bool = False


class Link:
    """One connection at a time to `endpoint`; `wake` ends a wait from any thread."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.refused = False
        self._reached = False
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._descriptors: set[int] = set()
        self._trackers: dict[int, list[zmq.MessageTracker]] = {}
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        _links.add(self)

    def open(self) -> None:
        """Start connecting on a fresh socket.

        Raises:
            OSError: the endpoint cannot be used.
        """
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.IMMEDIATE, 1)  # without it an absent server swallows messages, then blocks for ever
        dealer.setsockopt(zmq.SNDHWM, 2 * CREDIT_WINDOW_CHUNKS)  # a sanity check only: credit is the flow control
        dealer.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        dealer.setsockopt(zmq.RECONNECT_IVL, _CONNECT_RETRY_MS)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, _CONNECT_RETRY_MAX_MS)
        dealer.setsockopt(zmq.TCP_KEEPALIVE, 1)
        dealer.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_IDLE_S)
        events = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
        self._monitor = dealer.get_monitor_socket(events)
        self._socket = dealer
        try:
            dealer.connect(self.endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"{self.endpoint}: {error.strerror}") from None

    def close(self, *, farewell: bool = False) -> None:
        """Close the connection; with `farewell`, what was written last gets a moment to leave."""
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=_FAREWELL_MS if farewell else 0)
        if self._monitor is not None:
            self._monitor.close(linger=0)
        self._socket = self._monitor = None
        self._descriptors.clear()

    def terminate(self) -> None:
        """Close everything, for good. Bounded by the farewell."""
        self.close(farewell=True)
        self._context.term()
        self._wake_reader.close()
        self._wake_writer.close()

    def send(self, header: bytes, body: bytes) -> bool:
        """Write a message if the socket takes it now; False when it does not."""
        if self._socket is None:
            return False
        try:
            self._socket.send_multipart((header, body), flags=zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def send_payload(self, header: bytes, payload: memoryview, slot: int) -> bool:
        """Write a message whose body is sent from where it lies: the slot must not change while it is `in_flight`."""
        if self._socket is None:
            return False
        try:
            tracker = self._socket.send_multipart((header, payload), flags=zmq.NOBLOCK, copy=False, track=True)
        except zmq.Again:
            return False
        if tracker is not None:
            self._trackers.setdefault(slot, []).append(tracker)
        return True

    def in_flight(self, slot: int) -> bool:
        """Whether ZeroMQ still reads the slot. "Done" means that the memory was released, not that it arrived."""
        unfinished = [tracker for tracker in self._trackers.get(slot, ()) if not tracker.done]
        self._trackers[slot] = unfinished
        return bool(unfinished)

    def wait(self, timeout_s: float, *, writable: bool) -> Received:
        """Wait for messages, for room to write (`writable`), for the connection to break, or for `wake`."""
        poller = zmq.Poller()
        poller.register(self._wake_reader, zmq.POLLIN)
        if self._socket is not None and self._monitor is not None:
            poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if writable else 0))
            poller.register(self._monitor, zmq.POLLIN)
        poller.poll(max(0, round(timeout_s * 1000)))
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)
        return Received(tuple(self._read()), self._is_broken())

    def wake(self) -> None:
        """End a `wait`, now or the next one. Any thread may call it."""
        # A full pipe means that a wake is pending already; a closed one that nobody waits any more.
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_writer.send(b"\0")

    def leave_to_parent(self) -> None:
        """Close this process's copies of the connection's descriptors: a forked child must not keep it open."""
        for descriptor in tuple(self._descriptors):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _read(self) -> list[list[bytes]]:
        messages: list[list[bytes]] = []
        while self._socket is not None:
            try:
                messages.append(self._socket.recv_multipart(flags=zmq.NOBLOCK))
            except zmq.Again:
                break
        return messages

    def _is_broken(self) -> bool:
        broken = False
        while self._monitor is not None and self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            if event["event"] == zmq.EVENT_CONNECTED:
                self.refused, self._reached = False, True
                self._descriptors.add(int(event["value"]))
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                self._descriptors.discard(int(event["value"]))
                broken = True
            else:
                self.refused = not self._reached  # a stranger that hangs up is retried too, but something listens
        return broken


def _leave_all_to_parent() -> None:
    for link in tuple(_links):
        link.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)
