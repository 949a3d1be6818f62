"""The packet by which a trainer passes its slots to a server on the same machine, beside their file descriptors.

Little-endian: magic 4s, major u8, minor u8, number of slots u16, session 16s, bytes of each slot u64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.limits import MAGIC, SHARED_SLOTS_MAX, VERSION_MAJOR, VERSION_MINOR

_LAYOUT = struct.Struct("<4sBBH16sQ")
SLOT_OFFER_BYTES = _LAYOUT.size


@dataclass(frozen=True, slots=True)
class SlotOffer:
    """`slots` file descriptors come with it, each of memory of `nbytes` bytes, for this session."""

    session: bytes
    slots: int
    nbytes: int

    def encode(self) -> bytes:
        return _LAYOUT.pack(MAGIC, VERSION_MAJOR, VERSION_MINOR, self.slots, self.session, self.nbytes)

    @classmethod
    def decode(cls, packet: bytes) -> SlotOffer:
        """Read a packet.

        Raises:
            RemoteProtocolError: it is no offer of this protocol, or of no slots, or of too many.
        """
        if len(packet) != SLOT_OFFER_BYTES:
            text = f"an offer of slots has {len(packet)} bytes, not {SLOT_OFFER_BYTES}"
            raise RemoteProtocolError(RejectCode.BAD_FRAME, text)
        magic, major, _, slots, session, nbytes = _LAYOUT.unpack(packet)
        if magic != MAGIC or major != VERSION_MAJOR:
            text = f"an offer of slots starts with {packet[:5]!r}, not {MAGIC!r} and version {VERSION_MAJOR}"
            raise RemoteProtocolError(RejectCode.BAD_FRAME, text)
        if not 1 <= slots <= SHARED_SLOTS_MAX or not nbytes:
            text = f"{slots} slots of {nbytes} bytes are offered: 1 to {SHARED_SLOTS_MAX} that are not empty can be"
            raise RemoteProtocolError(RejectCode.BAD_FRAME, text)
        return cls(session, slots, nbytes)
