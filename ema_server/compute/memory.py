"""The bytes of an average, on whichever device they are, and host memory as torch tensor and memoryview at once.

Goes out: zeroed bytes that the kernel updates as a tensor, that files are written from and read into. Of host memory
both see the same bytes, with no copy between. It does not know what the bytes mean.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from ema_server.compute.headroom import available_bytes

_WRITABLE = 0x200  # PyBUF_WRITE of Python's C API

Piece: TypeAlias = Callable[[memoryview, int], None]
"""Is called with bytes in host memory, and with the number of the first of them."""


class Memory(Protocol):
    """Bytes that a device computes with, and that the host can read and write piece by piece."""

    @property
    def data(self) -> torch.Tensor:
        """The bytes where they are: uint8, 1-D."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""

    def show(self, begin: int, end: int, take: Piece) -> None:
        """Give bytes `begin` to `end` to `take`, in pieces, in order; a piece is valid during the call alone.

        Each piece begins a multiple of 8 bytes after `begin`. What `take` raises comes through.
        """

    def fill(self, begin: int, end: int, give: Piece) -> None:
        """Have `give` write bytes `begin` to `end`, in pieces as `show` has them. What it raises comes through."""


@dataclass(frozen=True, slots=True, eq=False)
class HostMemory:
    """The same bytes twice: `data`, uint8, 1-D, and `view`."""

    data: torch.Tensor
    view: memoryview

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return len(self.view)

    def show(self, begin: int, end: int, take: Piece) -> None:
        """All of them at once, not copied; see `Memory.show`."""
        take(self.view[begin:end], begin)

    def fill(self, begin: int, end: int, give: Piece) -> None:
        """All of them at once, in place; see `Memory.fill`."""
        give(self.view[begin:end], begin)


def allocate(nbytes: int, *, touch: bool = False) -> HostMemory:
    """Map `nbytes` of private anonymous memory, in huge pages where the kernel has them.

    Huge pages made a pass over 87 million float32 elements 1.4 times as fast here: fewer TLB misses.

    Args:
        nbytes: how much.
        touch: have every page mapped now, which may take a second for a gigabyte, instead of at its first use.

    Raises:
        MemoryError: the system has not so much.
    """
    available = available_bytes() if touch else None
    if available is not None and nbytes > available:
        raise MemoryError(f"{nbytes} bytes of memory are not to be had: {available} are left")
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"{nbytes} bytes of memory are not to be had: {error}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _ask_for_huge_pages(pages)
    data = torch.frombuffer(pages, dtype=torch.uint8)
    return HostMemory(data.zero_() if touch else data, memoryview(pages))


def host_memory(data: torch.Tensor) -> HostMemory:
    """A tensor of torch's (uint8, 1-D, in host memory) with a view of it, which is valid as long as the tensor is."""
    view_of = ctypes.pythonapi.PyMemoryView_FromMemory
    view_of.restype, view_of.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
    view: memoryview = view_of(data.data_ptr(), data.numel(), _WRITABLE)
    return HostMemory(data, view)


def _ask_for_huge_pages(pages: mmap.mmap) -> None:
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return  # a kernel built without them: slower, not wrong
