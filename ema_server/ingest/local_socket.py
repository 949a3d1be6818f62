"""The unix socket on which trainers of the same machine pass their slots, which the server then reads in place.

A connection brings one packet with the descriptors of the slots. What is refused is answered by a text; otherwise the
answer is the `lane` of JOINED. Only the ingest thread uses it.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import socket
import stat
import struct
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ema_proto.errors import RemoteProtocolError
from ema_proto.limits import RANKS_WAIT_S, SHARED_SLOTS_MAX, TEXT_CHARS_MAX
from ema_proto.wire.slot_offer import SLOT_OFFER_BYTES, SlotOffer

logger = logging.getLogger("ema")

AUTO, OFF = "auto", "off"

_PACKET_S = 5.0  # from a connection to its packet, which the trainer sends at once
_JOIN_S = 2 * RANKS_WAIT_S  # from the packet to the JOIN of all ranks
_WAITING_MAX = 64  # connections without a packet
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@dataclass(frozen=True, slots=True)
class SharedSlots:
    """The slots of a session, mapped: uint8, 1-D, all of one length."""

    tensors: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of each slot."""
        return self.tensors[0].numel()


@dataclass(frozen=True, slots=True)
class _Peer:
    """A connection whose packet has not come: of a process of user `uid`, and until when it may come."""

    connection: socket.socket
    uid: int
    until: float


class LocalSocket:
    """Takes the slots of trainers whose processes run as this user, as root, or as one of `uids`."""

    def __init__(self, uids: Sequence[int] = ()) -> None:
        self._uids = frozenset((os.geteuid(), 0, *uids))
        self._is_open_to_others = bool(uids)
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self._waiting: list[_Peer] = []
        self._slots: dict[bytes, tuple[SharedSlots, float]] = {}  # by session, with the time until which it may join

    def listen(self, folder: str) -> str | None:
        """Listen in `folder`, or in one of this user's (`auto`); the socket's path, None if that is not possible."""
        if folder == OFF or not hasattr(fcntl, "F_GET_SEALS"):  # other systems than Linux
            return None
        try:
            self._path = self._bind(_own_folder() if folder == AUTO else Path(folder).absolute())
        except OSError as error:
            level = logging.INFO if folder == AUTO else logging.WARNING
            text = "no shared memory with trainers on this machine: %s: %s"
            logger.log(level, text, error.filename or folder, error.strerror or error)
            return None
        return str(self._path)

    def close(self) -> None:
        for peer in self._waiting:
            peer.connection.close()
        self._waiting, self._slots = [], {}
        if self._listener is not None:
            self._listener.close()
        if self._path is not None:
            with suppress(OSError):  # the folder may be gone, or another one
                self._path.unlink()
        self._listener = self._path = None

    def receive(self, now: float) -> None:
        """Take what has arrived. Slots whose session does not join are given up after some time."""
        if self._listener is None:
            return
        with suppress(OSError):  # no more connections wait, or no more descriptors are free
            while True:
                connection, _ = self._listener.accept()
                self._admit(connection, now)
        self._waiting = [peer for peer in self._waiting if not self._take(peer, now)]
        for session in [session for session, (_, until) in self._slots.items() if until < now]:
            del self._slots[session]

    def slots_of(self, session: bytes) -> SharedSlots | None:
        """The slots that a session has passed since the last call, None without any."""
        found, _ = self._slots.pop(session, (None, 0.0))
        return found

    def _bind(self, folder: Path) -> Path:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_folder(folder)
        _sweep(folder)
        name = secrets.token_hex(8)
        hidden, path = folder / f".{name}", folder / f"{name}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(str(hidden))
            if self._is_open_to_others:
                hidden.chmod(0o666)
                folder.chmod(0o711)
            listener.listen()
            listener.setblocking(False)
            hidden.rename(path)  # only now: another server that starts removes sockets on which nothing listens
        except OSError:
            listener.close()
            hidden.unlink(missing_ok=True)
            raise
        self._listener = listener
        return path

    def _admit(self, connection: socket.socket, now: float) -> None:
        connection.setblocking(False)
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(found)
        if len(self._waiting) >= _WAITING_MAX:
            self._waiting.pop(0).connection.close()
        self._waiting.append(_Peer(connection, uid, now + _PACKET_S))

    def _take(self, peer: _Peer, now: float) -> bool:
        """Take the packet of a connection; whether the connection is closed with this."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(peer.connection, SLOT_OFFER_BYTES + 1, SHARED_SLOTS_MAX)
        except BlockingIOError:
            if now < peer.until:
                return False
            packet, descriptors = b"", []
        except OSError:
            packet, descriptors = b"", []
        try:
            if packet:
                self._take_offer(peer, packet, descriptors, now)
        except (RemoteProtocolError, OSError, ValueError) as error:
            text = error.text if isinstance(error, RemoteProtocolError) else str(error)
            logger.warning("the slots of a trainer on this machine are not used: %s", text)
            with suppress(OSError):
                peer.connection.send(text.encode()[:TEXT_CHARS_MAX])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            peer.connection.close()
        return True

    def _take_offer(self, peer: _Peer, packet: bytes, descriptors: Sequence[int], now: float) -> None:
        if peer.uid not in self._uids:
            raise ValueError(f"the trainer runs as user {peer.uid}: name it in the server's --shm-uids")
        offer = SlotOffer.decode(packet)
        self._slots[offer.session] = _map(offer, descriptors), now + _JOIN_S


def _map(offer: SlotOffer, descriptors: Sequence[int]) -> SharedSlots:
    """Map the offered slots.

    Raises:
        ValueError: they are not what is offered, or could be cut off while they are read.
        OSError: the system refuses.
    """
    if len(descriptors) != offer.slots:
        raise ValueError(f"{offer.slots} slots are offered, and {len(descriptors)} came")
    return SharedSlots(tuple(_map_one(descriptor, offer.nbytes) for descriptor in descriptors))


def _map_one(descriptor: int, nbytes: int) -> torch.Tensor:
    required = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        raise ValueError("a slot is no memory file") from None
    # Without these seals, or in reserved huge pages, a read may end this process by SIGBUS.
    if seals & required != required or os.fstatvfs(descriptor).f_bsize != mmap.PAGESIZE:
        raise ValueError("the size of a slot is not sealed, or it has reserved huge pages")
    size = os.fstat(descriptor).st_size
    if size < nbytes:
        raise ValueError(f"a slot has {size} bytes, not {nbytes}")
    return torch.frombuffer(mmap.mmap(descriptor, nbytes), dtype=torch.uint8)


def _own_folder() -> Path:
    """The folder of this user's sockets."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "ema-sidecar"
    return Path(tempfile.gettempdir()) / f"ema-sidecar-{os.geteuid()}"


def _check_folder(folder: Path) -> None:
    """Refuse a folder in which others could put sockets of their own.

    Raises:
        OSError: it is one.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(0, "is not a folder", str(folder))
    if found.st_uid not in (os.geteuid(), 0) or stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(0, "belongs to another user, or others can write to it", str(folder))


def _sweep(folder: Path) -> None:
    """Remove the sockets of servers that were killed."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue
