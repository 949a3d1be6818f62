"""One checkpoint: where each of its tensors lies, and its files, which are hashed while they are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ema_server.checkpoints.errors import CheckpointError
from ema_server.checkpoints.folders import Checkpoint, weight_map
from ema_server.storage.catalog import FileEntry
from ema_server.storage.disk import pread_into
from ema_server.tensors.safetensors_file import CHUNK_BYTES, BadModelFile, Stored, read_header


class SourceFile:
    """A file that is read at any place, and hashed as far as it has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        self.nbytes = os.fstat(self._fd).st_size
        self._digest = hashlib.sha256()
        self._hashed = 0

    def read(self, into: memoryview, offset: int) -> None:
        """Fill `into` with the bytes at `offset`; those before them are hashed first.

        Raises:
            CheckpointError: the file ends before.
        """
        self._hash_until(offset)
        self._fill(into, offset)
        end = offset + len(into)
        if end > self._hashed:
            self._digest.update(into[self._hashed - offset :])
            self._hashed = end

    def entry(self) -> FileEntry:
        """Name, size and sha256; bytes that were not read yet are read now."""
        self._hash_until(self.nbytes)
        return FileEntry(self.path.name, self.nbytes, self._digest.hexdigest())

    def close(self) -> None:
        os.close(self._fd)

    def _hash_until(self, end: int) -> None:
        while self._hashed < end:
            piece = memoryview(bytearray(min(CHUNK_BYTES, end - self._hashed)))
            self._fill(piece, self._hashed)
            self._digest.update(piece)
            self._hashed += len(piece)

    def _fill(self, into: memoryview, offset: int) -> None:
        try:
            pread_into(self._fd, into, offset)
        except EOFError as error:
            raise CheckpointError(f"{self.path} became shorter while it was read: {error}") from None


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor, and the file that holds it."""

    stored: Stored
    file: SourceFile


class OpenCheckpoint:
    """A checkpoint with its files open, and its tensors by name, in the order of the files.

    Raises:
        CheckpointError: a file is not a safetensors file, or the index disagrees with the files.
        OSError: a file cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.files: tuple[SourceFile, ...] = ()
        try:
            for path in checkpoint.files:
                self.files += (SourceFile(path),)
            self.tensors = dict(self._tensors())
            if checkpoint.index is not None:
                _check_index(checkpoint.index, self.tensors)
        except BaseException:
            self.close()
            raise

    def entries(self) -> tuple[FileEntry, ...]:
        """Names, sizes and digests of the files."""
        return tuple(file.entry() for file in self.files)

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensors(self) -> Iterator[tuple[str, Located]]:
        seen: dict[str, Path] = {}
        for file in self.files:
            for stored in _header(file):
                if stored.name in seen:
                    raise CheckpointError(f"tensor {stored.name!r} is in {seen[stored.name]} and in {file.path}")
                seen[stored.name] = file.path
                yield stored.name, Located(stored, file)


def _header(file: SourceFile) -> tuple[Stored, ...]:
    try:
        found = read_header(file.path)
    except BadModelFile as error:
        raise CheckpointError(str(error)) from None
    for stored in found:
        if stored.offset + stored.nbytes > file.nbytes:
            raise CheckpointError(
                f"{file.path} ends at byte {file.nbytes}, within tensor {stored.name!r}: it was not written completely"
            )
    return found


def _check_index(index: Path, tensors: Mapping[str, Located]) -> None:
    listed = weight_map(index)
    for name, file in listed.items():
        if name not in tensors or tensors[name].file.path.name != file:
            raise CheckpointError(f"{index} says that tensor {name!r} is in {file}, which does not have it")
    for name, located in tensors.items():
        if name not in listed:
            raise CheckpointError(f"{located.file.path} has tensor {name!r}, which {index.name} does not list")
