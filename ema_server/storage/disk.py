"""Durable file operations, and whether a folder has room and can be written.

Every function lets `OSError` propagate: the caller knows what a full disk means for its work.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

_OPEN_FILES = 1 << 16
_COPY_BYTES = 1 << 20  # large enough for full speed


def allow_open_files() -> None:
    """Raise the process's limit of open files to 65,536, as far as the system permits.

    A generation's files are written side by side, and a window has one for each of up to 256 snapshots. The usual limit
    is 1,024, for programs that use select().
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
        EOFError: the file ends before.
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
    """Create a file with durable content. Its name is durable only after `sync_folders`."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Replace a small file; after a crash either the old or the new content is there."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)
    write_durably(temporary, data)
    temporary.rename(path)
    sync_folders([path.parent])


def make_folder(folder: Path) -> None:
    """Create a folder in an existing one if it is missing, and make its name durable.

    The name is synced although the folder exists: a process that was killed may have created it a moment before.
    """
    folder.mkdir(exist_ok=True)
    sync_folders([folder.parent])


def sync_folders(folders: Iterable[Path]) -> None:
    """Make the names in these folders durable."""
    for folder in folders:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def megabytes(nbytes: int) -> str:
    """A size for people: `1,234.5 MB`, below 1 MB in bytes."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1_000_000 else f"{nbytes:,} bytes"


def shortage(folder: Path, needed: int) -> str | None:
    """Why `needed` bytes do not fit on the disk of `folder`; None if they do."""
    free = shutil.disk_usage(folder).free
    return f"{megabytes(free)} are free on the disk, {megabytes(needed)} are needed" if free < needed else None


def probe_write(folder: Path, nbytes: int = 1) -> None:
    """Write a temporary file of `nbytes` durably, and delete it: fails if the folder cannot be written."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(nbytes))
        probe.flush()
        os.fsync(probe.fileno())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file; on a file system without links, make a durable copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        fd = os.open(target, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
