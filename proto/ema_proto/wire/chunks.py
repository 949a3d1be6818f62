"""Cutting a flat buffer into chunks, and recording which have arrived."""

from __future__ import annotations

from ema_proto.errors import RejectCode, RemoteProtocolError


def count_chunks(nbytes: int, chunk_bytes: int) -> int:
    return -(-nbytes // chunk_bytes)


class Coverage:
    """Which chunks of one snapshot have arrived, in any order; one byte per chunk."""

    def __init__(self, nbytes: int, chunk_bytes: int) -> None:
        self._nbytes = nbytes
        self._chunk_bytes = chunk_bytes
        self._seen = bytearray(count_chunks(nbytes, chunk_bytes))
        self.missing = len(self._seen)

    @property
    def chunks(self) -> int:
        return len(self._seen)

    def holds(self, offset: int, length: int) -> bool:
        """Whether this chunk has arrived.

        Raises:
            RemoteProtocolError: `bad_chunk`; the range is no chunk of this snapshot.
        """
        index, rest = divmod(offset, self._chunk_bytes)
        if rest or index >= len(self._seen) or length != min(self._chunk_bytes, self._nbytes - offset):
            raise RemoteProtocolError(
                RejectCode.BAD_CHUNK,
                f"bytes {offset} to {offset + length} are no chunk of {self._nbytes} bytes cut by {self._chunk_bytes}",
            )
        return bool(self._seen[index])

    def add(self, offset: int) -> None:
        """Record the chunk at `offset`; call `holds` first, which checks it."""
        index = offset // self._chunk_bytes
        if not self._seen[index]:
            self._seen[index] = 1
            self.missing -= 1

    def first_missing(self) -> int:
        """Offset of the first missing chunk; call it only while one is `missing`."""
        return self._seen.index(0) * self._chunk_bytes
