"""A TCP forwarder in front of a server, which stands for a network link that can be cut and restored."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

_BUFFER_BYTES = 1 << 16


class Forwarder:
    """Forwards connections to a port of the loopback. `port` is its own, and stays the same."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._sockets: list[socket.socket] = []
        self.port = 0
        self.restore()

    def restore(self) -> None:
        """Accept connections, at first or after `cut`."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        self._sockets.append(listener)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Close all connections, and refuse others."""
        for each in self._sockets:
            with contextlib.suppress(OSError):  # one that its peer has closed
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # `cut` closes the listener
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += (client, server)
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=_copy, args=(source, sink), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):  # `cut` closes both
        while chunk := source.recv(_BUFFER_BYTES):
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_WR)
