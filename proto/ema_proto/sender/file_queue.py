"""The companion files that the server lacks, cut into parts. On each connection they go before the snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ema_proto.wire import messages as m
from ema_proto.wire.files import FileSpec, by_digest


@dataclass(frozen=True, slots=True)
class FilePayload:
    """Bytes [offset, offset + length) of the JOIN's file number `file`."""

    file: int
    offset: int
    length: int


class FileQueue:
    """What is left to send of the files that a JOINED has asked for."""

    def __init__(self) -> None:
        self._files: Sequence[FileSpec] = ()
        self._places: tuple[int, ...] = ()
        self._place = 0
        self._offset = 0

    def __bool__(self) -> bool:
        return self._place < len(self._places)

    def begin(self, files: Sequence[FileSpec], missing: Sequence[str]) -> None:
        """Send those of `files` that have these digests, from their first bytes.

        Raises:
            RemoteProtocolError: no file has one of the digests.
        """
        self._files, self._places = files, by_digest(files, missing)
        self._place = self._offset = 0

    def clear(self) -> None:
        """Send nothing more."""
        self.begin((), ())

    def next_part(self, chunk_bytes: int) -> tuple[m.File, FilePayload]:
        """The next part, which counts as sent. Only while something is left; an empty file is one empty part."""
        file, place, offset = self._places[self._place], self._place, self._offset
        left = self._files[file].nbytes - offset
        length = min(chunk_bytes, left)
        if length == left:
            self._place, self._offset = place + 1, 0
        else:
            self._offset += length
        return m.File(place, offset, length), FilePayload(file, offset, length)
