"""A module as a program in a network namespace: python in_namespace.py NAMESPACE MODULE ARGUMENT..."""

from __future__ import annotations

import ctypes
import runpy
import sys
from pathlib import Path

_CLONE_NEWNET = 0x40000000


def enter_namespace(name: str) -> None:
    """Have the sockets that this thread and its later threads make belong to a network namespace."""
    with Path(f"/var/run/netns/{name}").open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")


if __name__ == "__main__":
    enter_namespace(sys.argv[1])
    module = sys.argv[2]
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
