"""The ROUTER socket, the only file of the server that imports ZeroMQ. Only one thread may use it."""

from __future__ import annotations

import contextlib
import socket

import zmq
from zmq.utils.monitor import recv_monitor_message

from ema_proto.limits import CREDIT_WINDOW_CHUNKS, FRAME_BYTES_MAX
from ema_server.addresses import bind_all, bracketed, numeric_hosts
from ema_server.ingest.peers import Happening

_RECEIVE_QUEUE = CREDIT_WINDOW_CHUNKS + 4  # only a safeguard: the credit limits the sender
_KEEPALIVE_IDLE_S = 30  # detects half-open connections of hosts that disappeared


class RouterLink:
    """A listening socket; `wake` ends a wait from any thread.

    Attributes:
        source: the file descriptor of the connection that the last header came from, -1 if it is not known.
    """

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._monitor: zmq.Socket[bytes]  # of the thread that calls `happenings`
        self.source = -1
        self._poller.register(self._wake_reader, zmq.POLLIN)

    def bind(self, endpoint: str) -> str:
        """Listen at `endpoint`, on every address of a host name; returns the first of them with the actual port.

        Raises:
            OSError: the address is in use, or not one of this machine.
        """
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reply to an unknown peer is an error, not a silent loss
        self._router.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE)
        self._router.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        self._router.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._router.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_IDLE_S)
        self._monitor = self._router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        try:
            return self._bind_all(endpoint)
        except OSError as error:
            self._router.disable_monitor()
            self._monitor.close(linger=0)
            why = str(error.strerror).partition(" (addr=")[0]
            raise OSError(error.errno, f"cannot listen at {endpoint}: {why}; choose another --zmq") from None

    def _bind_all(self, endpoint: str) -> str:
        scheme, _, rest = endpoint.partition("://")
        if scheme != "tcp":
            return self._bind(endpoint)
        host, _, port = rest.rpartition(":")
        return bind_all(_numeric_hosts(host), int(port), self._bind_tcp, self._router.unbind)[0]

    def _bind_tcp(self, host: str, port: int) -> tuple[str, int]:
        self._router.setsockopt(zmq.IPV6, ":" in host)
        taken = self._bind(f"tcp://{bracketed(host)}:{port}")
        return taken, int(taken.rpartition(":")[2])

    def _bind(self, endpoint: str) -> str:
        try:
            self._router.bind(endpoint)
        except zmq.ZMQError as error:
            raise OSError(error.errno, error.strerror) from None
        return self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    def happenings(self, timeout_s: float) -> list[Happening] | None:
        """Wait for connections that are accepted or closed. One other thread calls this, once `bind` has returned.

        Returns:
            None once the link is closed.
        """
        found: list[Happening] = []
        try:
            while self._monitor.poll(0 if found else round(timeout_s * 1000)):
                event = recv_monitor_message(self._monitor)
                if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                    break
                found.append(("accepted" if event["event"] == zmq.EVENT_ACCEPTED else "closed", int(event["value"])))
            else:
                return found
        except zmq.ContextTerminated:  # `close` was faster than its event, and waits for this socket
            pass
        self._monitor.close(linger=0)
        return None

    def close(self) -> None:
        """Close the sockets; blocks until `happenings` has returned None."""
        self._router.disable_monitor()
        self._router.close(linger=0)
        self._context.term()
        self._wake_reader.close()
        self._wake_writer.close()

    def wait(self, timeout_s: float) -> None:
        """Wait for a message or for `wake`."""
        self._poller.poll(round(timeout_s * 1000))
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)

    def wake(self) -> None:
        """End a `wait`, now or the next one. Any thread may call it."""
        # If the pipe is full, a wake is pending; if it is closed, no thread waits.
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_writer.send(b"\0")

    def next_header(self) -> tuple[bytes, bytes] | None:
        """Peer and header frame of the next message, or None. Read or drop its body before the next call."""
        try:
            peer = self._router.recv(flags=zmq.NOBLOCK)
        except zmq.Again:
            return None
        self.source = -1
        if not self._has_more():
            return peer, b""
        frame = self._router.recv(copy=False)
        with contextlib.suppress(zmq.ZMQError):  # libzmq does not know it of peers that speak an old ZMTP
            self.source = int(frame.get(zmq.SRCFD))
        # A header has 64 bytes; anything larger is invalid and not worth copying.
        return peer, frame.bytes if len(frame) <= 1024 else b""

    def read_into(self, view: memoryview) -> bool:
        """Receive the body into `view`; False if its length differs, or it is not the last frame."""
        if not self._has_more():
            return False
        received = self._router.recv_into(view)  # returns the frame's full size even if it did not fit
        return not self.drop() and received == len(view)

    def read(self, length: int) -> bytes:
        """Receive the body; empty if its length is not `length`, or it is not the last frame."""
        if not self._has_more():
            return b""
        frame = self._router.recv(copy=False)
        return frame.bytes if not self.drop() and len(frame) == length else b""

    def drop(self) -> bool:
        """Drop the rest of the message; returns whether there was any."""
        dropped = False
        while self._has_more():
            self._router.recv(copy=False)
            dropped = True
        return dropped

    def send(self, peer: bytes, frames: tuple[bytes, bytes]) -> None:
        """Send a reply. It is dropped if the peer is gone or does not read: a peer asks again."""
        with contextlib.suppress(zmq.Again, zmq.ZMQError):
            self._router.send_multipart((peer, *frames), flags=zmq.NOBLOCK)

    def _has_more(self) -> bool:
        return bool(self._router.getsockopt(zmq.RCVMORE))


def _numeric_hosts(host: str) -> tuple[str, ...]:
    """The addresses of a host; `*` and names of interfaces are left to ZeroMQ, which knows them."""
    try:
        return numeric_hosts(host.strip("[]"))
    except OSError:
        return (host,)
