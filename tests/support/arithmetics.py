"""Both kernels by name, for tests that apply to each; tests of the compiled one are skipped without numba.

`check_in_the_pass` has small snapshots checked as large ones are.
"""

from __future__ import annotations

from functools import cache

import pytest

from ema_server.compute.arithmetic import BY_TORCH, Arithmetic
from ema_server.compute.device import Host
from ema_server.compute.memory import HostMemory, allocate
from ema_server.runs import run

NAMES = ("torch", "compiled")
WITHOUT_NUMBA = "numba is not installed: pip install '.[fast]'"


@cache
def arithmetic(name: str) -> Arithmetic:
    """The one arithmetic of that name."""
    if name == "torch":
        return BY_TORCH
    pytest.importorskip("numba", reason=WITHOUT_NUMBA)
    from ema_server.compute.compiled import ByLoops

    return ByLoops()


def check_in_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, unchecked snapshots of any size are checked while they are averaged, where the kernel can."""

    def spare(_: Host, nbytes: int) -> HostMemory:
        return allocate(nbytes)

    monkeypatch.setattr(run, "SPARE_FROM_BYTES", 0)
    monkeypatch.setattr(Host, "spare", spare)
