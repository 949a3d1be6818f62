"""The few file operations that durability is built from. Paths and bytes in, durable files out; no meaning of either.

Every function lets `OSError` through: who calls knows what a full disk means for its work.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
from collections.abc import Iterable
from pathlib import Path

_OPEN_FILES = 1 << 16
_COPY_BYTES = 1 << 20  # large enough for full speed, small enough to be no memory to speak of


def allow_open_files() -> None:
    """Let this process have as many files open as the system lets it, up to 65,536.

    A generation's files are written side by side, and a window has one for each of up to 256 snapshots; the usual limit
    is 1,024, for the sake of programs that use select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def pwrite_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at byte `offset` of an open file."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written


def pread_into(fd: int, into: memoryview, offset: int) -> None:
    """Fill `into` from byte `offset` of an open file.

    Raises:
        EOFError: the file ends before that.
    """
    while into:
        count = os.preadv(fd, [into], offset)
        if not count:
            raise EOFError(f"the file ends at byte {offset}")
        into, offset = into[count:], offset + count


def copy_within(fd: int, source: int, target: int, nbytes: int) -> None:
    """Copy `nbytes` of an open file from byte `source` to byte `target`, which do not overlap."""
    for done in range(0, nbytes, _COPY_BYTES):
        count = min(_COPY_BYTES, nbytes - done)
        pwrite_all(fd, os.pread(fd, count, source + done), target + done)


def write_durably(path: Path, data: bytes) -> None:
    """Create a file and bring its bytes to the disk. Its name is durable only after `sync_folders`."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Write a small file so that after a crash either the old or the new one is there."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)
    write_durably(temporary, data)
    temporary.rename(path)
    sync_folders([path.parent])


def sync_folders(folders: Iterable[Path]) -> None:
    """Bring the names in these folders to the disk."""
    for folder in folders:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def sha256(path: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; where the file system has no links, a durable copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        fd = os.open(target, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
