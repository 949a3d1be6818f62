"""Messages to frames and back. A message is two frames: a fixed 64-byte header and a body (JSON, or a chunk's payload).

Header, little-endian: magic 4s, major u8, minor u8, type u8, flags u8, session 16s, epoch u64, step u64, attempt u32,
body length u32, offset u64, crc32 u32, reserved u32 (zero). Payloads are never touched here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from ema_proto import messages as m
from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.fields import Fields, parse_json
from ema_proto.limits import (
    CHUNK_BYTES_MAX,
    CONTROL_BODY_BYTES_MAX,
    HEADER_BYTES,
    JOIN_BODY_BYTES_MAX,
    MAGIC,
    RECENT_STEPS,
    STEP_MAX,
    VERSION_MAJOR,
    VERSION_MINOR,
)

SESSION_BYTES = 16
NO_SESSION = bytes(SESSION_BYTES)

_LAYOUT = struct.Struct("<4sBBBB16sQQIIQII")
_FLAG_CRC32 = 1
_U64 = (1 << 64) - 1
_TEXT_CHARS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a header frame."""

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
    """The 64 bytes of a header."""
    flags, crc32 = (0, 0) if header.crc32 is None else (_FLAG_CRC32, header.crc32)
    return _LAYOUT.pack(
        MAGIC,
        header.major,
        header.minor,
        header.type,
        flags,
        header.session,
        header.epoch,
        header.step,
        header.attempt,
        header.length,
        header.offset,
        crc32,
        0,
    )


def decode_header(frame: bytes) -> Header:
    """Read a header frame. Only HELLO may carry a foreign major, so that both sides can say which they speak.

    Raises:
        RemoteProtocolError: `bad_frame` for anything that is no header, `version` for another major.
    """
    if len(frame) != HEADER_BYTES:
        raise RemoteProtocolError(RejectCode.BAD_FRAME, f"the header frame has {len(frame)} bytes, not {HEADER_BYTES}")
    magic, major, minor, kind, flags, session, epoch, step, attempt, length, offset, crc32, _ = _LAYOUT.unpack(frame)
    if magic != MAGIC:
        raise RemoteProtocolError(RejectCode.BAD_FRAME, f"the header starts with {magic!r}, not {MAGIC!r}")
    if major != VERSION_MAJOR and kind != m.Hello.type:
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
    """Largest body of a message type."""
    if kind == m.Chunk.type:
        return CHUNK_BYTES_MAX
    return JOIN_BODY_BYTES_MAX if kind == m.Join.type else CONTROL_BODY_BYTES_MAX


def encode(message: m.Message, *, session: bytes, epoch: int) -> tuple[bytes, bytes]:
    """Header and body of a message. A chunk's body is its payload, which the caller appends: it comes back empty."""
    step, attempt = getattr(message, "step", None) or 0, getattr(message, "attempt", 0)
    if isinstance(message, m.Chunk):
        header = Header(message.type, session, epoch, message.length, step, attempt, message.offset, message.crc32)
        return encode_header(header), b""
    body = json.dumps(message.body(), separators=(",", ":")).encode()
    in_header = isinstance(message, m.Begin | m.Commit | m.Committed | m.Reject)
    header = Header(message.type, session, epoch, len(body), step if in_header else 0, attempt)
    return encode_header(header), body


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


def decode(header: Header, body: bytes) -> m.Message:
    """Read a control message.

    Raises:
        RemoteProtocolError: the type is unknown, the length differs from the header's, or a field is wrong.
    """
    reader = _READERS.get(header.type)
    if reader is None:
        raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"message type {header.type} is unknown")
    if len(body) != header.length:
        raise RemoteProtocolError(
            RejectCode.BAD_FRAME, f"the body has {len(body)} bytes, the header says {header.length}"
        )
    if header.step > STEP_MAX:
        raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"step {header.step} is over {STEP_MAX}")
    name, read = reader
    return read(header, Fields(name, parse_json(body)))


def _optional_step(fields: Fields, key: str) -> int | None:
    return fields.optional_integer(key, 0, STEP_MAX)


def _request(fields: Fields) -> int:
    return fields.integer("request", 0, STEP_MAX)


def _read_begin(header: Header, fields: Fields) -> m.Begin:
    return m.Begin(header.step, header.attempt, fields.choice("mode", ("update", "set")))


def _read_commit(header: Header, fields: Fields) -> m.Commit:
    return m.Commit(header.step, header.attempt, fields.integer("chunks", 0, _U64), fields.integer("bytes", 0, _U64))


def _read_joined(_: Header, fields: Fields) -> m.Joined:
    recent = fields.items("recent", RECENT_STEPS)
    if not all(type(step) is int for step in recent):
        raise fields.bad("recent")
    return m.Joined(
        last_step=_optional_step(fields, "last_step"),
        published_step=_optional_step(fields, "published_step"),
        recent=tuple(recent),
        continuation=fields.choice("continuation", ("new", "continued", "rewound")),
        credit=fields.integer("credit", 0, _U64),
        lane=fields.text("lane", 16),
    )


def _read_published(_: Header, fields: Fields) -> m.Published:
    return m.Published(
        step=_optional_step(fields, "step"),
        request=fields.optional_integer("request", 0, STEP_MAX),
        error=fields.optional_text("error", _TEXT_CHARS_MAX),
    )


def _read_rewound(_: Header, fields: Fields) -> m.Rewound:
    return m.Rewound(_request(fields), _optional_step(fields, "step"), fields.optional_text("error", _TEXT_CHARS_MAX))


def _read_finished(_: Header, fields: Fields) -> m.Finished:
    return m.Finished(_request(fields), _optional_step(fields, "step"), fields.optional_text("error", _TEXT_CHARS_MAX))


def _read_reject(header: Header, fields: Fields) -> m.Reject:
    code = fields.choice("code", tuple(RejectCode))
    return m.Reject(code, fields.text("text", _TEXT_CHARS_MAX), header.step, header.attempt)


def _read_welcome(header: Header, fields: Fields) -> m.Welcome:
    return m.Welcome(
        epoch=header.epoch,
        chunk_bytes=m.read_chunk_bytes(fields),
        major=fields.integer("major", 0, 255),
        minor=fields.integer("minor", 0, 255),
        capabilities=tuple(str(item)[:64] for item in fields.items("capabilities", 64)),
    )


_READERS: dict[int, tuple[str, Callable[[Header, Fields], m.Message]]] = {
    m.Hello.type: ("HELLO", lambda _, fields: m.Hello.read(fields)),
    m.Join.type: ("JOIN", lambda _, fields: m.Join.read(fields)),
    m.Begin.type: ("BEGIN", _read_begin),
    m.Commit.type: ("COMMIT", _read_commit),
    m.Heartbeat.type: ("HEARTBEAT", lambda _, fields: m.Heartbeat(fields.flag("reply"))),
    m.Publish.type: ("PUBLISH", lambda _, fields: m.Publish(_request(fields), fields.flag("pin"))),
    m.Rewind.type: ("REWIND", lambda _, fields: m.Rewind(_request(fields), fields.integer("step", 0, STEP_MAX))),
    m.Finish.type: ("FINISH", lambda _, fields: m.Finish(_request(fields))),
    m.Bye.type: ("BYE", lambda _, fields: m.Bye()),
    m.Challenge.type: ("CHALLENGE", lambda _, fields: m.Challenge(fields.text("nonce", 128))),
    m.Welcome.type: ("WELCOME", _read_welcome),
    m.Joined.type: ("JOINED", _read_joined),
    m.Credit.type: ("CREDIT", lambda _, fields: m.Credit(fields.integer("limit", 0, _U64))),
    m.Committed.type: ("COMMITTED", lambda header, fields: m.Committed(header.step, header.attempt)),
    m.Published.type: ("PUBLISHED", _read_published),
    m.Rewound.type: ("REWOUND", _read_rewound),
    m.Finished.type: ("FINISHED", _read_finished),
    m.Reject.type: ("REJECT", _read_reject),
}
