"""A file that grows towards a known digest. Comes in: pieces of bytes; goes out: a file that is what it should be.

The digest is computed by a thread of its own while the next pieces arrive: hashing and receiving take about as long.
Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import threading
from collections.abc import Iterator
from io import BufferedRandom
from pathlib import Path
from typing import Protocol, Self

from ema_reader.errors import ReaderError, VerificationFailed
from ema_reader.values import File

_READ_BYTES = 1 << 20
_QUEUED_PIECES = 64  # of 64 KiB each: enough for the thread never to wait, and no memory to speak of
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})  # file systems that cannot lock


class Progress(Protocol):
    """Where the download stands, for whoever shows it."""

    def start(self, name: str, size: int, done: int) -> None:
        """A file begins (or begins anew) with `done` of `size` bytes already there."""

    def advance(self, count: int) -> None:
        """`count` more bytes are there."""


class Partial:
    """An open partial file of `item`; leaving the context closes it and ends the thread.

    Args:
        path: where it lies; it is made if it is missing, and continued if it is there.
        item: what it is to become.
        progress: who is told.

    Raises:
        ReaderError: another process is writing it.
    """

    def __init__(self, path: Path, item: File, progress: Progress) -> None:
        self._item = item
        self._path = path
        self._progress = progress
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(_exclusive(path))
        self._digest = self._stack.enter_context(_Digest())
        self.size = 0

    def __enter__(self) -> Self:
        try:
            self._read_back()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    @property
    def complete(self) -> bool:
        """Whether it has all its bytes."""
        return self.size == self._item.size

    def append(self, piece: bytes) -> None:
        """Add bytes at the end."""
        self._file.write(piece)
        self._digest.update(piece)
        self.size += len(piece)
        self._progress.advance(len(piece))

    def restart(self) -> None:
        """Throw away what is there."""
        self._file.truncate(0)
        self._digest.close()
        self._digest = self._stack.enter_context(_Digest())
        self.size = 0
        self._progress.start(self._item.name, self._item.size, 0)

    def verify(self) -> None:
        """Bring it to the disk and compare the digest. A wrong file is removed: the next try starts anew.

        Raises:
            VerificationFailed: it is not what the server wrote.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        found = self._digest.close()
        if found != self._item.sha256:
            self._path.unlink()
            raise VerificationFailed(
                f"{self._item.name} has sha256 {found}, the server wrote {self._item.sha256}: "
                "nothing was put in place; download it again"
            )

    def _read_back(self) -> None:
        """Digest what an earlier download left; a file that is too long cannot be a part."""
        self._file.seek(0)
        while piece := self._file.read(_READ_BYTES):
            self._digest.update(piece)
            self.size += len(piece)
        if self.size > self._item.size:
            self.restart()
        else:
            self._progress.start(self._item.name, self._item.size, self.size)


def sha256_of(path: Path) -> str:
    """The digest of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.sha256).hexdigest()


class _Digest:
    """sha256 of the pieces it is given, computed in another thread (hashing does not hold the interpreter's lock)."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_QUEUED_PIECES)
        self._thread = threading.Thread(target=self._run, name="sha256")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def update(self, piece: bytes) -> None:
        self._pieces.put(piece)

    def close(self) -> str:
        """Wait for the rest; the digest in hex. Calling it again changes nothing."""
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()
        return self._hash.hexdigest()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._hash.update(piece)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[BufferedRandom]:
    """The file, open for reading and appending, locked against a second download into the same folder."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ReaderError(f"another download is writing {path}: wait for it, or choose another folder") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield file
