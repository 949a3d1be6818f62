"""The DEALER socket: the only file of the trainer's side that imports ZeroMQ.

One thread at a time may use a link; `wake` may be called by any, and `wait` while another thread uses it.

Payloads are sent from where they are, without a copy. A socket is not reused after its connection broke: a DEALER keeps
its queue across reconnections, and stale frames with it.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import time
import weakref
from collections.abc import Mapping
from typing import Any

import zmq
import zmq.utils.garbage  # loaded now, so that its exit function, which ends sending, runs after that of any client
from zmq.utils.monitor import recv_monitor_message

from ema_proto.limits import CREDIT_WINDOW_CHUNKS, FRAME_BYTES_MAX
from trainer_client.connection.addresses import resolve

_CONNECT_RETRY_MS = 100
_CONNECT_RETRY_MAX_MS = 1000
_CONNECT_TIMEOUT_MS = 2000  # of one address among several: one that drops packets must not hold up the others
_ROTATE_S = 0.5  # between attempts at the addresses of a host, once each was tried
_FAREWELL_MS = 200  # how long a BYE may take to leave the process
_KEEPALIVE_IDLE_S = 30  # finds half-open connections of hosts that vanished

# Plain integers, because operations on pyzmq's enumerations take longer than the calls themselves.
_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _POLLIN, _POLLOUT = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.POLLOUT)

_links: weakref.WeakSet[Link] = weakref.WeakSet()


class Link:
    """One connection at a time to `endpoint`; `wake` ends a wait from any thread.

    A host with several addresses (both families, for example) is tried at each in turn.

    Attributes:
        endpoint: as given.
        refused: every attempt so far was refused: nothing listens there.
        unresolved: why the host name cannot be resolved, None if it can.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.refused = False
        self.unresolved: str | None = None
        self._addresses: list[str] = []
        self._attempts = 0  # at the addresses, the current one included
        self._address = ""
        self._preferred = ""
        self._rotated_at = 0.0
        self._reached = False
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._signals: tuple[int, ...] = ()  # readable when a socket may have something; closed with it
        self._descriptors: set[int] = set()
        self._trackers: dict[int, list[zmq.MessageTracker]] = {}
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        _links.add(self)

    def open(self) -> None:
        """Start connecting on a fresh socket.

        Raises:
            OSError: the endpoint cannot be used; the text says why.
        """
        try:
            self._addresses = resolve(self.endpoint)
        except OSError as error:
            self.unresolved = error.strerror
            raise
        self.unresolved = None
        preferred = self._preferred if self._preferred in self._addresses else None
        self._connect(preferred or self._addresses[self._attempts % len(self._addresses)])

    def prefer(self) -> None:
        """The server answered at the current address: begin with it from now on."""
        self._preferred = self._address

    def _connect(self, address: str) -> None:
        self._attempts += 1
        self._address, self._rotated_at = address, time.monotonic()
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.IMMEDIATE, 1)  # without it an absent server swallows messages, then blocks for ever
        dealer.setsockopt(zmq.SNDHWM, 2 * CREDIT_WINDOW_CHUNKS)  # a sanity check only: credit is the flow control
        dealer.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        dealer.setsockopt(zmq.RECONNECT_IVL, _CONNECT_RETRY_MS)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, _CONNECT_RETRY_MAX_MS)
        dealer.setsockopt(zmq.TCP_KEEPALIVE, 1)
        dealer.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_IDLE_S)
        dealer.setsockopt(zmq.IPV6, "[" in address)
        if len(self._addresses) > 1:
            dealer.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_TIMEOUT_MS)
        events = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
        self._monitor = dealer.get_monitor_socket(events)
        self._socket = dealer
        self._signals = (int(dealer.getsockopt(zmq.FD)), int(self._monitor.getsockopt(zmq.FD)))
        try:
            dealer.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"{address} cannot be used: {error.strerror}") from None

    def close(self, *, farewell: bool = False) -> None:
        """Close the connection; with `farewell`, what was written last gets a moment to leave."""
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=_FAREWELL_MS if farewell else 0)
        if self._monitor is not None:
            self._monitor.close(linger=0)
        self._socket = self._monitor = None
        self._signals = ()
        self._descriptors.clear()

    def terminate(self) -> None:
        """Close everything, for good. Bounded by the farewell."""
        self.close(farewell=True)
        self._context.term()
        self._wake_reader.close()
        self._wake_writer.close()

    def send(self, header: bytes, body: bytes | memoryview) -> bool:
        """Write a message if the socket takes it now; False when it does not."""
        if self._socket is None:
            return False
        try:
            self._socket.send(header, _MORE)
            self._socket.send(body, _NOBLOCK)
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

    def wait(self, timeout_s: float, *, only_wake: bool = False) -> None:
        """Wait until something may have come, room to write included, or until `wake`; no socket is used meanwhile.

        Args:
            timeout_s: for how long at most.
            only_wake: end at nothing but `wake`.
        """
        poller = select.poll()
        poller.register(self._wake_reader, select.POLLIN)
        for descriptor in () if only_wake else self._signals:
            poller.register(descriptor, select.POLLIN)
        poller.poll(max(0, math.ceil(timeout_s * 1000)))
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)

    def receive(self) -> list[list[bytes]]:
        """The messages that have come. `wait` reports later ones only after this has returned none."""
        messages: list[list[bytes]] = []
        while self._socket is not None and self._is_ready(_POLLIN):
            messages.append(self._socket.recv_multipart(_NOBLOCK))
        return messages

    def can_write(self) -> bool:
        """Whether the socket takes a message now."""
        return self._is_ready(_POLLOUT)

    def wake(self) -> None:
        """End a `wait`, now or the next one. Any thread may call it."""
        # A full pipe means that a wake is pending already; a closed one, that the thread has ended.
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_writer.send(b"\0")

    def leave_to_parent(self) -> None:
        """Close this process's copies of the connection's descriptors: a forked child must not keep it open."""
        for descriptor in tuple(self._descriptors):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _is_ready(self, event: int) -> bool:
        # An exception for each empty queue would cost more than this question.
        return self._socket is not None and bool(int(self._socket.getsockopt(_EVENTS)) & event)

    def is_broken(self) -> bool:
        """Whether the connection broke since the last call; one that was refused is tried at the next address."""
        broken, retrying = False, False
        while (event := self._next_event()) is not None:
            if event["event"] == zmq.EVENT_CONNECTED:
                self.refused, self._reached, retrying = False, True, False
                self._descriptors.add(int(event["value"]))
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                self._descriptors.discard(int(event["value"]))
                broken = True
            else:
                self.refused = not self._reached  # a peer that hangs up is retried too, but something listens
                retrying = True
        if retrying and not broken:
            self._try_next_address()
        return broken

    def _next_event(self) -> Mapping[str, Any] | None:
        if self._monitor is None:
            return None
        try:
            return recv_monitor_message(self._monitor, flags=zmq.NOBLOCK)
        except zmq.Again:
            return None

    def _try_next_address(self) -> None:
        """The current address refused: go on to the next one, at once in the first round, and then at intervals."""
        count = len(self._addresses)
        if count > 1 and (self._attempts < count or time.monotonic() - self._rotated_at >= _ROTATE_S):
            self.close()
            self._connect(self._addresses[self._attempts % count])


def _leave_all_to_parent() -> None:
    for link in tuple(_links):
        link.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)
