"""The bytes of an average on any device, and host memory as torch tensor and memoryview of the same bytes.

Linux promises more memory than exists and kills a process that uses it. A run that does not fit must be refused before
its pages are touched, or all other runs die with it: `available_bytes` says what is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

_WRITABLE = 0x200  # PyBUF_WRITE of Python's C API
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own limit

Piece: TypeAlias = Callable[[memoryview, int], None]
"""Is called with bytes in host memory, and with the number of the first of them."""


class Memory(Protocol):
    """Bytes that a device computes with, and that the host reads and writes piece by piece."""

    @property
    def data(self) -> torch.Tensor:
        """The bytes where they are: uint8, 1-D."""

    @property
    def nbytes(self) -> int: ...

    def show(self, begin: int, end: int, take: Piece) -> None:
        """Give bytes `begin` to `end` to `take` in order, in pieces that are valid during the call only.

        Each piece begins a multiple of 8 bytes after `begin`. Exceptions of `take` propagate.
        """

    def fill(self, begin: int, end: int, give: Piece) -> None:
        """Have `give` write bytes `begin` to `end`, in pieces as in `show`. Its exceptions propagate."""


@dataclass(frozen=True, slots=True, eq=False)
class HostMemory:
    """The same bytes twice: `data`, uint8, 1-D, and `view`. Nothing is copied to show or fill them."""

    data: torch.Tensor
    view: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.view)

    def show(self, begin: int, end: int, take: Piece) -> None:
        take(self.view[begin:end], begin)

    def fill(self, begin: int, end: int, give: Piece) -> None:
        give(self.view[begin:end], begin)


def allocate(nbytes: int, *, touch: bool = False) -> HostMemory:
    """Map `nbytes` of private, zeroed memory, in huge pages if the kernel has them.

    Huge pages made a pass over 87 million float32 elements 1.4 times as fast: fewer TLB misses.

    `touch` maps every page now, which may take a second per gigabyte, instead of at its first use.

    Raises:
        MemoryError: the system has not enough.
    """
    available = available_bytes() if touch else None
    if available is not None and nbytes > available:
        raise MemoryError(f"cannot allocate {nbytes} bytes: only {available} are available")
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"cannot allocate {nbytes} bytes: {error}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them is slower, not wrong
            pages.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(pages, dtype=torch.uint8)
    return HostMemory(data.zero_() if touch else data, memoryview(pages))


def host_memory(data: torch.Tensor) -> HostMemory:
    """A tensor of torch's (uint8, 1-D, in host memory) with a view of it that is valid as long as the tensor exists."""
    view_of = ctypes.pythonapi.PyMemoryView_FromMemory
    view_of.restype, view_of.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
    view: memoryview = view_of(data.data_ptr(), data.numel(), _WRITABLE)
    return HostMemory(data, view)


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Bytes that the machine and this container have left without swapping; None if neither reports it."""
    limits = [limit for limit in (_of_machine(meminfo), _of_container(cgroup)) if limit is not None]
    return min(limits, default=None)


def _of_machine(meminfo: Path) -> int | None:
    for line in _lines(meminfo):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return None


def _of_container(cgroup: Path) -> int | None:
    limit, current = _lines(cgroup / "memory.max"), _lines(cgroup / "memory.current")
    if not limit or not current or limit[0] == "max":
        return None
    # The page cache counts against the limit and is dropped when memory is needed.
    droppable = [line.split()[1] for line in _lines(cgroup / "memory.stat") if line.startswith("inactive_file ")]
    return max(int(limit[0]) - int(current[0]) + sum(map(int, droppable)), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
