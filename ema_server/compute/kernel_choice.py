"""Which arithmetic a server computes with, chosen once at its start. Comes in: the setting, the averages' device.

`auto` takes the compiled loops where they can be had and torch elsewhere; that one of them is missing is no fault.
"""

from __future__ import annotations

import logging

import torch

from ema_server.compute.arithmetic import BY_TORCH, Arithmetic

log = logging.getLogger(__name__)


class KernelUnavailableError(Exception):
    """What was asked for cannot be had here; the text says why, and what to do."""


def choose(setting: str, device: torch.device) -> Arithmetic:
    """The arithmetic for `auto`, `torch` or `compiled`.

    Raises:
        KernelUnavailableError: `compiled` was asked for, and cannot be had.
    """
    if setting == "torch":
        return _chosen(BY_TORCH, "as set")
    if device.type != "cpu":
        if setting == "compiled":
            raise KernelUnavailableError(f"the compiled kernel computes on the CPU, not on {device}: use --kernel auto")
        return _chosen(BY_TORCH, f"the averages are on {device}")
    try:
        return _chosen(_by_loops(), "on the CPU, by numba")
    except (ImportError, OSError, RuntimeError) as error:
        if setting == "compiled":
            raise KernelUnavailableError(
                f"the compiled kernel cannot be had ({error}): pip install 'ema-sidecar[fast]', or use --kernel auto"
            ) from None
        return _chosen(BY_TORCH, f"the compiled one cannot be had: {error}")


def _by_loops() -> Arithmetic:
    from ema_server.compute.compiled import ByLoops  # needs numba, which is optional and takes half a second to import

    return ByLoops()


def _chosen(arithmetic: Arithmetic, why: str) -> Arithmetic:
    log.info("averaging kernel: %s (%s)", arithmetic.name, why)
    return arithmetic
