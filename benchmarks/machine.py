"""Describes the machine as a Markdown list, divides its cores into sets, and makes temporary folders in memory."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import zmq

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (only a fresh folder in it)


def description(*, quick: bool) -> str:
    """`facts` as a Markdown list."""
    lines = [f"{name}: {value}" for name, value in facts().items()]
    if quick:
        lines.append("**smoke sizes: these figures mean nothing**")
    return "\n".join(f"- {line}" for line in lines)


def facts() -> dict[str, str]:
    """Machine, GPU if there is one, versions, date and load."""
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    gpu = {"GPU": f"{torch.cuda.get_device_name()}, driver {_driver()}"} if torch.cuda.is_available() else {}
    return {
        "machine": f"{_processor()}, {len(all_cores())} cores, {gib:.0f} GiB, {platform.system()}",
        **gpu,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, {_numba()}, "
        f"pyzmq {zmq.pyzmq_version()}, libzmq {zmq.zmq_version()}",
        "date": f"{today}; load when it began: {os.getloadavg()[0]:.2f}",
    }


def all_cores() -> frozenset[int]:
    """The cores that this process may use."""
    return frozenset(os.sched_getaffinity(0))


def halves() -> tuple[frozenset[int], frozenset[int]]:
    """The cores in two halves; both the same where there is only one."""
    cores = sorted(all_cores())
    middle = len(cores) // 2
    return frozenset(cores[:middle] or cores), frozenset(cores[middle:])


@contextmanager
def pinned(cores: frozenset[int]) -> Iterator[None]:
    """Bind the calling thread, and all threads and processes that it starts meanwhile, to `cores`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def folder_in_memory(nbytes: int) -> Iterator[Path]:
    """A temporary folder, on tmpfs if that has space for `nbytes`."""
    in_memory = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > nbytes
    with tempfile.TemporaryDirectory(prefix="ema-bench-", dir=_SHARED_MEMORY if in_memory else None) as folder:
        yield Path(folder)


def _numba() -> str:
    try:
        return f"numba {version('numba')}"
    except PackageNotFoundError:
        return "no numba"


def _driver() -> str:
    """The version of NVIDIA's driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return found.stdout.partition("\n")[0].strip() or "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
