"""The companion files of one joined session on one connection: they arrive in order, part by part, before snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.limits import CREDIT_WINDOW_CHUNKS
from ema_proto.wire import messages as m
from ema_proto.wire.chunks import count_chunks
from ema_proto.wire.files import FileSpec


class FileIntake:
    """The files that were missing at a JOIN.

    At most a window of parts is in the caller's hands, so its memory is bounded.

    Args:
        files: in the order in which they are sent.
        chunk_bytes: the size of every part but a file's last.
        checksum: parts carry a CRC-32 that must match.
    """

    def __init__(self, files: Sequence[FileSpec], *, chunk_bytes: int, checksum: bool) -> None:
        self._files = tuple(files)
        self._chunk_bytes = chunk_bytes
        self._checksum = checksum
        self._place = 0
        self._offset = 0
        self._to_come = sum(max(1, count_chunks(file.nbytes, chunk_bytes)) for file in files)
        self._in_hand = 0

    @property
    def whole(self) -> bool:
        """Whether every part has arrived and is stored."""
        return not self._to_come and not self._in_hand

    @property
    def allowance(self) -> int:
        """Parts that may be sent now."""
        return min(CREDIT_WINDOW_CHUNKS - self._in_hand, self._to_come)

    def expect(self, part: m.File) -> None:
        """Check that a part is the next one.

        Raises:
            RemoteProtocolError: `bad_message`; it is another one.
        """
        if not self._to_come:
            raise RemoteProtocolError(RejectCode.BAD_MESSAGE, "a FILE was sent, and no file is missing")
        length = min(self._chunk_bytes, self._files[self._place].nbytes - self._offset)
        if (part.place, part.offset, part.length) != (self._place, self._offset, length):
            text = f"{part.length} bytes at {part.offset} of file {part.place} were sent"
            next_part = f"{length} bytes at {self._offset} of file {self._place} are next"
            raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"{text}, and {next_part}")

    def take(self, part: m.File, payload: bytes | None) -> FileSpec:
        """Take the payload of the part that was expected, None if its length was wrong; returns its file.

        Raises:
            RemoteProtocolError: `bad_message`; the length or the checksum is wrong.
        """
        self.expect(part)
        file = self._files[self._place]
        if payload is None or len(payload) != part.length:
            text = f"the part at {part.offset} of file {file.name!r} has not {part.length} bytes"
            raise RemoteProtocolError(RejectCode.BAD_MESSAGE, text)
        if self._checksum and part.crc32 != crc32(payload):
            text = f"the part at {part.offset} of file {file.name!r} has another checksum"
            raise RemoteProtocolError(RejectCode.BAD_MESSAGE, text)
        self._to_come -= 1
        self._in_hand += 1
        self._offset += part.length
        if self._offset == file.nbytes:
            self._place, self._offset = self._place + 1, 0
        return file

    def stored(self) -> None:
        """The caller has stored one part."""
        self._in_hand -= 1
