"""One HTTP connection within bounds: what a peer may send, and how long it may take to send or to read.

uvicorn reads a request's head without a limit of size or time, and waits for ever for a peer that does not read. Both
would let any peer fill the memory or hold versions on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import http
import resource
import struct
import termios
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_BYTES_MAX = 64 << 10  # of request line and headers; browsers and proxies send less than 16 KiB
HEAD_S = 30.0  # for the head of a request, from its first byte; for the first one, from the connection
STALL_S = 60.0  # for a peer to read some of what waits for it
REST_BYTES_MAX = 32 << 20  # of a body that is still being sent when the answer is complete
REST_S = 30.0
_CONNECTION_DESCRIPTORS = 3  # the socket, and the files of a download
_OWN_DESCRIPTORS = 256  # of the rest of the server
_CONNECTIONS_MIN = 16


def connections_max() -> int:
    """How many connections leave enough of the process's file descriptors for publishing."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(_CONNECTIONS_MIN, (soft - _OWN_DESCRIPTORS) // _CONNECTION_DESCRIPTORS)


class BoundedConnection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol (httptools, else h11), which ends a connection that exceeds a bound.

    A head that is too long is answered by 431, one that does not arrive by 408, and one connection too many by 503.
    These answers are plain text, because no request reaches the application.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._received = 0  # of what is being received: a head, or the rest of a body
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > connections_max():
            self._refuse(503, f"{connections_max()} connections, the maximum, are open: try again later")
            return
        self._expect(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while data and not self.transport.is_closing():
            if self._is_answering():
                super().data_received(data)
                return
            data = self._receive_outside(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = _unread(self.transport)
        self._stalled = self.loop.call_later(STALL_S, self._check_progress)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _is_answering(self) -> bool:
        """Whether a request is with the application, which reads its body as it wants."""
        return self.cycle is not None and not self.cycle.response_complete

    def _receive_outside(self, data: bytes) -> bytes:
        """Receive a part of a head, or of the rest of a body that was answered; returns what follows it in `data`."""
        cycle, is_rest = self.cycle, self.cycle is not None and self.cycle.more_body
        if self._deadline is None:
            self._expect(REST_S if is_rest else HEAD_S)
        part = data[: max(1, (REST_BYTES_MAX if is_rest else HEAD_BYTES_MAX) - self._received)]
        super().data_received(part)
        if self.cycle is not cycle:
            self._received = 0
            self._end_deadline()
            return data[len(part) :]
        self._received += len(part)
        if is_rest and self._received >= REST_BYTES_MAX:
            self.transport.abort()
        elif not is_rest and self._received >= HEAD_BYTES_MAX:
            self._refuse(431, f"request line and headers have more than the {HEAD_BYTES_MAX} bytes allowed")
        return data[len(part) :]

    def _expect(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self._give_up, seconds)

    def _give_up(self, seconds: float) -> None:
        if self._received and not (self.cycle is not None and self.cycle.more_body):
            self._refuse(408, f"the request's headers have not arrived after {seconds:g} s")
        else:
            self.transport.close()

    def _check_progress(self) -> None:
        """Close the connection if its peer has read nothing since the last look."""
        unread = _unread(self.transport)
        if unread >= self._unread:
            self.transport.abort()
            return
        self._unread = unread
        self._stalled = self.loop.call_later(STALL_S, self._check_progress)

    def _refuse(self, status: int, text: str) -> None:
        body = f"{text}\n".encode()
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_timers(self) -> None:
        self._end_deadline()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def _unread(transport: asyncio.Transport) -> int:
    """Bytes that the peer has not acknowledged: ours, and those in the system's buffer.

    The system reports room only once a third of its buffer is free, which may be megabytes.
    """
    queued = 0
    with contextlib.suppress(OSError):  # an end of another kind than a socket, or closed meanwhile
        descriptor = transport.get_extra_info("socket").fileno()
        (queued,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))
    return transport.get_write_buffer_size() + queued
