"""How much memory this process may still take before the kernel kills something. Reads the kernel's own files.

Linux promises more memory than there is and kills a process when the promise is called in: a run that does not fit must
be refused before its pages are touched, or every other run dies with it.
"""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # as a container sees its own limit (version 2)


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Bytes that can be had without swapping, of the machine and of this container; None where nobody says."""
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
    # Files that were read or written are counted against the limit, and dropped when memory is needed.
    droppable = [line.split()[1] for line in _lines(cgroup / "memory.stat") if line.startswith("inactive_file ")]
    return max(int(limit[0]) - int(current[0]) + sum(map(int, droppable)), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
