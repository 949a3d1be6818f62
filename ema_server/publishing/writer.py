"""Writes the files of a draft, block by block, before the pool's pass changes each block.

Nothing is durable until the publisher completes it. A disk that fails must not stop the averaging: the first error is
kept, and later blocks are ignored.
"""

from __future__ import annotations

import os
import shutil
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ema_server.compute.memory import HostMemory, Memory, allocate
from ema_server.storage.disk import copy_within, pwrite_all
from ema_server.tensors.dtypes import view
from ema_server.tensors.file_plan import Span, TensorFile

_NARROW_ELEMENTS = 64 << 10  # 256 KiB of float32 scratch, for float64 averages alone


@dataclass(frozen=True, slots=True)
class DraftAverage:
    """Memory to write, of an average or of one of its snapshots, and the files under `folder` to write it to."""

    folder: Path
    memory: Memory
    files: tuple[TensorFile, ...]


@dataclass(frozen=True, slots=True)
class _OpenFile:
    file: TensorFile
    path: Path
    fd: int
    begins: list[int]


class GenerationWriter:
    """Files of a generation before it is committed. Several threads may call `write`, for different blocks.

    Args:
        folder: temporary folder to build it in; must not exist.
        averages: what to write, in the order of the pool's targets.
    """

    def __init__(self, folder: Path, averages: tuple[DraftAverage, ...]) -> None:
        self.folder = folder
        self.error: OSError | None = None
        self._averages = averages
        self._open: list[list[_OpenFile]] = []
        self._scratch: HostMemory | None = None
        self._narrowing = threading.Lock()
        try:
            self._create()
        except OSError as error:
            self.error = error

    def write(self, index: int, begin: int, end: int) -> None:
        """Write bytes `begin` to `end` of average number `index` as they are now."""
        if self.error is not None:
            return
        try:
            for opened in self._open[index]:
                for span, first, last in _overlaps(opened, begin, end):
                    self._store(opened.fd, self._averages[index].memory, span, first, last)
        except OSError as error:
            self.error = error

    def complete(self) -> None:
        """Write the copies of tied tensors, and sync every file to the disk.

        Raises:
            OSError: now or at any earlier write.
        """
        if self.error is not None:
            raise self.error
        for opened in self._all():
            for copy in opened.file.copies:
                copy_within(opened.fd, copy.source, copy.target, copy.nbytes)
            os.fsync(opened.fd)

    def close(self) -> None:
        """Close the files."""
        for opened in self._all():
            os.close(opened.fd)
        self._open.clear()

    def discard(self) -> None:
        """Close the files and delete the folder; what the disk does not delete is swept at the next start."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _create(self) -> None:
        self.folder.mkdir()
        for average in self._averages:
            files: list[_OpenFile] = []
            self._open.append(files)
            for file in average.files:
                average.folder.mkdir(parents=True, exist_ok=True)
                path = average.folder / file.name
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                files.append(_OpenFile(file, path, fd, [span.begin for span in file.spans]))
                pwrite_all(fd, file.header, 0)

    def _store(self, fd: int, memory: Memory, span: Span, first: int, last: int) -> None:
        if not span.narrows:
            memory.show(first, last, lambda data, at: pwrite_all(fd, data, span.file_offset + at - span.begin))
            return
        with self._narrowing:
            memory.show(first, last, lambda data, at: self._narrow(fd, data, span.file_offset + (at - span.begin) // 2))

    def _narrow(self, fd: int, data: memoryview, offset: int) -> None:
        """Write float64 as float32."""
        if self._scratch is None:
            self._scratch = allocate(_NARROW_ELEMENTS * 4)
        wide = torch.frombuffer(data, dtype=torch.float64)
        for begin in range(0, len(wide), _NARROW_ELEMENTS):
            count = min(_NARROW_ELEMENTS, len(wide) - begin)
            view(self._scratch.data, "F32", 0, count).copy_(wide.narrow(0, begin, count))
            pwrite_all(fd, self._scratch.view[: count * 4], offset + begin * 4)

    def _all(self) -> Iterator[_OpenFile]:
        return (opened for files in self._open for opened in files)


def _overlaps(opened: _OpenFile, begin: int, end: int) -> Iterator[tuple[Span, int, int]]:
    """The spans that overlap `begin` to `end`, each with the bytes that do."""
    spans = opened.file.spans
    for index in range(max(bisect_right(opened.begins, begin) - 1, 0), len(spans)):
        span = spans[index]
        if span.begin >= end:
            return
        first, last = max(begin, span.begin), min(end, span.end)
        if first < last:
            yield span, first, last
