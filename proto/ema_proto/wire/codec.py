"""Messages to frames and back. A message is two frames: a fixed 64-byte header and a body (JSON, or a chunk's payload).

Header, little-endian: magic 4s, major u8, minor u8, type u8, flags u8, session 16s, epoch u64, step u64, attempt u32,
body length u32, offset u64, crc32 u32, reserved u32 (zero). Payloads are never read here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.limits import (
    CHUNK_BYTES_MAX,
    CONTROL_BODY_BYTES_MAX,
    HEADER_BYTES,
    JOIN_BODY_BYTES_MAX,
    MAGIC,
    STEP_MAX,
    VERSION_MAJOR,
    VERSION_MINOR,
)
from ema_proto.wire import messages as m
from ema_proto.wire.body import decode_body, encode_body

SESSION_BYTES = 16
NO_SESSION = bytes(SESSION_BYTES)

_LAYOUT = struct.Struct("<4sBBBB16sQQIIQII")
_FLAG_CRC32 = 1

CONTROL_MESSAGES: dict[int, type[m.ControlMessage]] = {message.type: message for message in get_args(m.ControlMessage)}


@dataclass(frozen=True, slots=True)
class Header:
    type: int
    session: bytes
    epoch: int
    length: int
    step: int = 0
    attempt: int = 0
    offset: int = 0
    crc32: int | None = None
    major: int = VERSION_MAJOR
    minor: int = VERSION_MINOR


def encode_header(header: Header) -> bytes:
    return _packed(
        header.type,
        header.session,
        header.epoch,
        header.length,
        header.step,
        header.attempt,
        header.offset,
        header.crc32,
        header.major,
        header.minor,
    )


def _packed(
    type: int,
    session: bytes,
    epoch: int,
    length: int,
    step: int = 0,
    attempt: int = 0,
    offset: int = 0,
    crc32: int | None = None,
    major: int = VERSION_MAJOR,
    minor: int = VERSION_MINOR,
) -> bytes:
    flags, crc = (0, 0) if crc32 is None else (_FLAG_CRC32, crc32)
    return _LAYOUT.pack(MAGIC, major, minor, type, flags, session, epoch, step, attempt, length, offset, crc, 0)


def decode_header(frame: bytes) -> Header:
    """Read a header frame. Only HELLO and REJECT may carry a foreign major: they negotiate the version.

    Raises:
        RemoteProtocolError: `bad_frame` for anything that is not a header, `version` for another major.
    """
    if len(frame) != HEADER_BYTES:
        raise RemoteProtocolError(RejectCode.BAD_FRAME, f"the header frame has {len(frame)} bytes, not {HEADER_BYTES}")
    magic, major, minor, kind, flags, session, epoch, step, attempt, length, offset, crc32, _ = _LAYOUT.unpack(frame)
    if magic != MAGIC:
        raise RemoteProtocolError(RejectCode.BAD_FRAME, f"the header starts with {magic!r}, not {MAGIC!r}")
    if major != VERSION_MAJOR and kind not in (m.Hello.type, m.Reject.type):
        raise RemoteProtocolError(
            RejectCode.VERSION, f"protocol version {major} is not spoken here, only {VERSION_MAJOR}"
        )
    if length > body_bytes_max(kind):
        raise RemoteProtocolError(RejectCode.BAD_FRAME, f"a body of {length} bytes is over {body_bytes_max(kind)}")
    return Header(
        type=kind,
        session=session,
        epoch=epoch,
        length=length,
        step=step,
        attempt=attempt,
        offset=offset,
        crc32=crc32 if flags & _FLAG_CRC32 else None,
        major=major,
        minor=minor,
    )


def body_bytes_max(kind: int) -> int:
    if kind in (m.Chunk.type, m.File.type):
        return CHUNK_BYTES_MAX
    return JOIN_BODY_BYTES_MAX if kind == m.Join.type else CONTROL_BODY_BYTES_MAX


def encode(message: m.Message, *, session: bytes, epoch: int) -> tuple[bytes, bytes]:
    """Header and body of a message. The body of a CHUNK or FILE is the payload, which the caller appends: it is empty.

    Raises:
        LocalProtocolError: the body is over the limit of its type (a JOIN with too many, or too long, tensor names).
    """
    body = b"" if isinstance(message, m.Chunk | m.File) else encode_body(message.body())
    if len(body) > body_bytes_max(message.type):
        text = f"{type(message).__name__.upper()} has a body of {len(body)} bytes, over {body_bytes_max(message.type)}"
        raise LocalProtocolError(text)
    fields = {"epoch": epoch, "length": len(body)} | message.header()
    return _packed(message.type, session, **fields), body


def with_crc32(header: bytes, crc32: int) -> bytes:
    """The same header carrying the CRC-32 of its payload."""
    return encode_header(replace(decode_header(header), crc32=crc32))


def decode_chunk(header: Header) -> m.Chunk:
    """The chunk that a header describes; its payload follows.

    Raises:
        RemoteProtocolError: `bad_chunk`; it is empty.
    """
    if header.length == 0:
        raise RemoteProtocolError(RejectCode.BAD_CHUNK, "a chunk is empty")
    return m.Chunk(header.step, header.attempt, header.offset, header.length, header.crc32)


def decode_file(header: Header) -> m.File:
    """The part of a companion file that a header describes; its payload follows."""
    return m.File(header.attempt, header.offset, header.length, header.crc32)


def decode_frames(frames: Sequence[bytes]) -> tuple[Header, m.ControlMessage]:
    """Read a whole control message.

    Raises:
        RemoteProtocolError: see `decode_header` and `decode`; `bad_frame` when there are not two frames.
    """
    if len(frames) != 2:
        raise RemoteProtocolError(RejectCode.BAD_FRAME, f"the message has {len(frames)} frames, not 2")
    header = decode_header(frames[0])
    return header, decode(header, frames[1])


def decode(header: Header, body: bytes) -> m.ControlMessage:
    """Read a control message.

    Raises:
        RemoteProtocolError: the type is unknown, the length differs from the header's, or a field is wrong.
    """
    message = CONTROL_MESSAGES.get(header.type)
    if message is None:
        raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"message type {header.type} is unknown")
    if len(body) != header.length:
        raise RemoteProtocolError(
            RejectCode.BAD_FRAME, f"the body has {len(body)} bytes, the header says {header.length}"
        )
    if header.step > STEP_MAX:
        raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"step {header.step} is over {STEP_MAX}")
    in_header = {"step": header.step, "attempt": header.attempt, "epoch": header.epoch}
    return message.read(decode_body(body), in_header)
