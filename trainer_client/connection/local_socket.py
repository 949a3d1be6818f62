"""The unix socket of a server on the same machine, by which it gets the slots of this trainer.

Nothing here waits for the server: if the server does not take them, snapshots go through the ZeroMQ socket.
"""

from __future__ import annotations

import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from ema_proto.limits import TEXT_CHARS_MAX
from ema_proto.wire.slot_offer import SlotOffer
from trainer_client.staging.slots import Slot

_SHORT_S = 0.2  # the kernel takes a connection and a packet at once, unless the server is far behind with both


class LocalSocket:
    """Passes the slots of one session to the server, once for each connection.

    Attributes:
        problem: why the server has not got them, as far as is known; None if nothing is.
    """

    def __init__(self, session: bytes) -> None:
        self.problem: str | None = None
        self._session = session
        self._socket: socket.socket | None = None

    def offer(self, path: str, slots: Sequence[Slot]) -> None:
        """Send the descriptors of `slots`, which are shared, to the server that listens at `path`."""
        self.close()
        self.problem = None
        descriptors = [slot.descriptor for slot in slots if slot.descriptor is not None]
        packet = SlotOffer(self._session, len(descriptors), len(slots[0].view)).encode()
        try:
            self._socket = connect(path)
            socket.send_fds(self._socket, [packet], descriptors)
        except OSError as error:
            self.problem = _text(path, error)

    def read_problem(self) -> str:
        """Why the server did not take the slots. Call it once the server has said that it did not."""
        if self._socket is not None:
            self._socket.setblocking(False)
            try:
                self.problem = self._socket.recv(TEXT_CHARS_MAX).decode(errors="replace")
            except OSError as error:
                self.problem = f"the server has not answered on its local socket: {error.strerror}"
        return self.problem or "the server has not said why"

    def close(self) -> None:
        """Close the connection; the server keeps what it got."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def why_unreachable(path: str) -> str | None:
    """Why no server can be reached at this path; None if one can."""
    try:
        connect(path).close()
    except OSError as error:
        return _text(path, error)
    return None


def connect(path: str) -> socket.socket:
    """A connection to the server at `path`.

    Raises:
        OSError: nothing listens there that could be trusted with the weights.
    """
    folder = Path(path).parent
    if stat.S_IMODE(folder.stat().st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(0, f"other users can write to {folder}")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_SHORT_S)
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def _text(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no {path} here: the server is on another machine, or its folder is not shared with this one"
    return f"{path}: {error.strerror or error}"
