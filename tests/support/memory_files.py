"""Which processes have the shared slots of a trainer: their memory is returned to the system when none has."""

from __future__ import annotations

import os
from pathlib import Path

_NAME = "memfd:ema-slot"


def slots_of(pid: int | None = None) -> set[int]:
    """The inodes of the slots that a process (this one by default) has mapped or open."""
    folder = Path("/proc") / str(os.getpid() if pid is None else pid)
    return _mapped(folder) | _open(folder)


def held() -> set[int]:
    """The inodes of all slots that a process of this machine has; of other users' processes only root sees any."""
    return set().union(*(slots_of(int(folder.name)) for folder in Path("/proc").iterdir() if folder.name.isdigit()))


def _mapped(folder: Path) -> set[int]:
    try:
        lines = (folder / "maps").read_text(errors="replace").splitlines()
    except OSError:  # it has ended, or is another user's
        return set()
    return {int(line.split()[4]) for line in lines if _NAME in line}


def _open(folder: Path) -> set[int]:
    found = set()
    try:
        for link in (folder / "fd").iterdir():
            if _NAME in str(link.readlink()):
                found.add(link.stat().st_ino)
    except OSError:
        return found
    return found
