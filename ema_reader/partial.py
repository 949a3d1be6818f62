"""A partial file that grows to a known size and sha256, and is verified when complete.

A thread computes the digest while the next pieces arrive: hashing and receiving take about equally long.
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
_QUEUED_PIECES = 64  # of 64 KiB each: 4 MiB keep the thread busy
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})  # file systems that cannot lock


class Progress(Protocol):
    """Receives the progress of a download, to show it."""

    def start(self, name: str, size: int, done: int) -> None:
        """A file starts (or starts again) with `done` of `size` bytes present."""

    def advance(self, count: int) -> None:
        """`count` more bytes have arrived."""


class Partial:
    """An open partial file of `item`; leaving the context closes it and ends the thread.

    Args:
        path: the partial file; created if it is missing, else continued.
        item: the file that it becomes.
        progress: receives the progress.

    Raises:
        ReaderError: another process is writing it.
    """

    def __init__(self, path: Path, item: File, progress: Progress) -> None:
        self._item = item
        self._path = path
        self._progress = progress
        self._stack = contextlib.ExitStack()
        refusal = f"another download is writing {path}: wait for it, or choose another folder"
        self._file = self._stack.enter_context(exclusive(path, refusal))
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
        return self.size == self._item.size

    def append(self, piece: bytes) -> None:
        self._file.write(piece)
        self._digest.update(piece)
        self.size += len(piece)
        self._progress.advance(len(piece))

    def restart(self) -> None:
        self._file.truncate(0)
        self._digest.close()
        self._digest = self._stack.enter_context(_Digest())
        self.size = 0
        self._progress.start(self._item.name, self._item.size, 0)

    def verify(self) -> None:
        """Flush it to the disk and compare the digest. A wrong file is removed, and the next try starts from zero.

        Raises:
            VerificationFailed: it differs from what the server wrote.
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
        """Digest the bytes of an earlier download; a file that is too long is discarded."""
        self._file.seek(0)
        while piece := self._file.read(_READ_BYTES):
            self._digest.update(piece)
            self.size += len(piece)
        if self.size > self._item.size:
            self.restart()
        else:
            self._progress.start(self._item.name, self._item.size, self.size)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.sha256).hexdigest()


class _Digest:
    """sha256 of pieces, computed in another thread (hashing releases the interpreter's lock)."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_QUEUED_PIECES)
        # A daemon: a download in another thread, whose server hangs, must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def update(self, piece: bytes) -> None:
        self._pieces.put(piece)

    def close(self) -> str:
        """Wait for the remaining pieces and return the digest in hex. Idempotent."""
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()
        return self._hash.hexdigest()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._hash.update(piece)


@contextlib.contextmanager
def exclusive(path: Path, refusal: str) -> Iterator[BufferedRandom]:
    """The file, open for reading and appending, locked against another process.

    Raises:
        ReaderError: another process has it; `refusal` is the text.
    """
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ReaderError(refusal) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield file
