"""From a version to a verified folder. Comes in: a version and a destination; goes out: its files, whole or not at all.

Each file grows as `.{name}.{digest}.partial` beside its final name. The digest in the name makes it safe to resume in
another process: bytes of two versions can never meet in one partial file. Knows nothing of terminals.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from io import BufferedRandom
from pathlib import Path
from typing import Protocol

from ema_reader.errors import NotFound, ReaderError, Unreachable, VerificationFailed
from ema_reader.transport import Transport, path_of
from ema_reader.values import File, Version

_PIECE_BYTES = 1 << 20
ATTEMPTS = 5  # in a row without one new byte
_PAUSE_S = 0.5
_LAST = "version.json"  # put in place after all others: a folder that has it is whole
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})  # file systems that cannot lock


class Progress(Protocol):
    """Where the download stands, for whoever shows it."""

    def start(self, name: str, size: int, done: int) -> None:
        """A file begins (or begins anew) with `done` of `size` bytes already there."""

    def advance(self, count: int) -> None:
        """`count` more bytes are there."""


class Silent:
    """Shows nothing."""

    def start(self, name: str, size: int, done: int) -> None:
        """Nothing."""

    def advance(self, count: int) -> None:
        """Nothing."""


def download_version(transport: Transport, version: Version, folder: Path, progress: Progress) -> Path:
    """Download all files of `version` into `folder` and return it; files that are there already are kept.

    Raises:
        VerificationFailed: a file does not have its sha256; nothing was put in place.
        ReaderError: the version is gone, the server stays away, the disk refuses, or another download is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ready = [(_fetch(transport, version, item, folder, progress), folder / item.name) for item in version.files]
        _put_in_place(ready, folder)
    except NotFound:
        for item in version.files:
            _partial(folder, item).unlink(missing_ok=True)  # nobody can complete them any more
        raise
    except OSError as error:
        raise ReaderError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error
    return folder


def _fetch(transport: Transport, version: Version, item: File, folder: Path, progress: Progress) -> Path:
    """The path of a verified copy of `item`: the file in place if it is the same, else a complete partial file."""
    final = folder / item.name
    if final.is_file() and final.stat().st_size == item.size and _sha256(final) == item.sha256:
        progress.start(item.name, item.size, item.size)
        return final
    partial = _partial(folder, item)
    path = path_of("runs", version.run, "averages", version.average, "versions", version.id, "files", item.name)
    with _exclusive(partial) as file:
        _complete(transport, path, item, file, progress)
        file.flush()
        os.fsync(file.fileno())
        _verify(file, item, partial)
    return partial


def _complete(transport: Transport, path: str, item: File, file: BufferedRandom, progress: Progress) -> None:
    """Append until the file has its size, over as many connections as it takes."""
    failures = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        if before > item.size:
            before = file.truncate(0)
        progress.start(item.name, item.size, before)
        try:
            _append(transport, path, item, file, before, progress)
            return
        except Unreachable:
            failures = 0 if file.seek(0, os.SEEK_END) > before else failures + 1
            if failures == ATTEMPTS:
                raise
            time.sleep(_PAUSE_S * failures)


def _append(transport: Transport, path: str, item: File, file: BufferedRandom, done: int, progress: Progress) -> None:
    if done == item.size:
        return
    headers = {"Accept-Encoding": "identity"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": f'"{item.sha256}"'}
    with transport.stream(path, headers) as response:
        if done and not response.headers.get("content-range", "").startswith(f"bytes {done}-"):
            file.truncate(0)  # the whole file comes
            progress.start(item.name, item.size, 0)
        for piece in response.iter_raw(_PIECE_BYTES):
            file.write(piece)
            progress.advance(len(piece))
    if file.seek(0, os.SEEK_END) < item.size:
        raise Unreachable(f"the connection to {transport.url} ended early")


def _verify(file: BufferedRandom, item: File, partial: Path) -> None:
    """Compare the digest of what lies on the disk. A wrong partial file is removed: the next try starts anew."""
    file.seek(0)
    found = hashlib.file_digest(file, hashlib.sha256).hexdigest()
    if found != item.sha256:
        partial.unlink()
        raise VerificationFailed(
            f"{item.name} has sha256 {found}, the server wrote {item.sha256}: "
            "nothing was put in place; download it again"
        )


def _put_in_place(ready: list[tuple[Path, Path]], folder: Path) -> None:
    """Rename the complete files. The old `version.json` goes first and the new one comes last."""
    moves = sorted(
        ((source, final) for source, final in ready if source != final), key=lambda move: move[1].name == _LAST
    )
    if not moves:
        return
    if any(final.name == _LAST for _, final in moves):
        (folder / _LAST).unlink(missing_ok=True)
    for source, final in moves:
        source.replace(final)


@contextlib.contextmanager
def _exclusive(partial: Path) -> Iterator[BufferedRandom]:
    """The partial file, open for reading and appending, locked against a second download into the same folder."""
    with partial.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ReaderError(f"another download is writing {partial}: wait for it, or choose another folder") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield file


def _partial(folder: Path, item: File) -> Path:
    return folder / f".{item.name}.{item.sha256[:16]}.partial"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.sha256).hexdigest()
