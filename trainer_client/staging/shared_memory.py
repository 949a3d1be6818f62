"""Memory that this process and the server both map: a file without a name, which only a descriptor can reach.

No file system limits its size, and it is gone when no process has it. The size is sealed, so that neither process can
cut the memory off under the other. Forked children (workers of data loaders) have neither mapping nor descriptor: one
that outlives its parent keeps no memory.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14; Python has no name for it
_FAILED = ctypes.c_void_p(-1).value

_mapped: dict[int, tuple[weakref.finalize[Any, Any], int]] = {}  # by address: what unmaps it, and its descriptor


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Writable memory, and the descriptor of its file, which stays open as long as `buffer` exists."""

    buffer: ctypes.Array[ctypes.c_char]
    descriptor: int


def is_available() -> bool:
    """Whether this system has such memory: Linux does."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def map_shared(nbytes: int) -> SharedMemory:
    """Make and map `nbytes` of zeroed memory; its pages take no memory before `make_present`, or before they are used.

    Raises:
        OSError: the system has not enough of it.
    """
    import fcntl  # not on Windows

    descriptor = os.memfd_create("ema-slot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        # Not Python's mmap: it keeps a descriptor of its own, which a forked child could not close.
        address = _libc().mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            raise _error()
    except BaseException:
        os.close(descriptor)
        raise
    buffer = (ctypes.c_char * nbytes).from_address(address)
    release = weakref.finalize(buffer, _unmap, address, nbytes, descriptor)
    release.atexit = False
    _mapped[address] = release, descriptor
    _libc().madvise(address, nbytes, mmap.MADV_DONTFORK)
    _libc().madvise(address, nbytes, mmap.MADV_HUGEPAGE)  # refused where shared memory has none: slower, not wrong
    return SharedMemory(buffer, descriptor)


def make_present(address: int, nbytes: int) -> None:
    """Give memory its pages now: at their first use that would cost as much as copying.

    Raises:
        OSError: the system has not enough.
    """
    if _libc().madvise(address, nbytes, _POPULATE_WRITE) != 0:
        if ctypes.get_errno() != errno.EINVAL:
            raise _error()
        ctypes.memset(address, 0, nbytes)  # an older kernel


def _unmap(address: int, nbytes: int, descriptor: int) -> None:
    del _mapped[address]
    _libc().munmap(address, nbytes)
    os.close(descriptor)


@cache
def _libc() -> ctypes.CDLL:
    """The C library; its calls run without the interpreter's lock."""
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes, libc.mmap.restype = (pointer, size, number, number, number, ctypes.c_long), pointer
    libc.munmap.argtypes = (pointer, size)
    libc.madvise.argtypes = (pointer, size, number)
    return libc


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _leave_to_parent() -> None:
    """A forked child lacks the mappings, and other memory may have their place: they must not be unmapped."""
    for release, descriptor in _mapped.values():
        release.detach()
        with suppress(OSError):
            os.close(descriptor)
    _mapped.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
