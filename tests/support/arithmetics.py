"""Both kernels by name, for tests that apply to each; tests of the compiled one are skipped without numba."""

from __future__ import annotations

from functools import cache

import pytest

from ema_server.compute.arithmetic import BY_TORCH, Arithmetic

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
