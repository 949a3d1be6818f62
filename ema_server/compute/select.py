"""Chooses the averaging kernel: compiled loops where they are available, else torch."""

from __future__ import annotations

import logging

import torch

from ema_server.compute.arithmetic import BY_TORCH, Arithmetic

logger = logging.getLogger(__name__)


class KernelUnavailableError(Exception):
    """The requested kernel is not available; the text says why, and what to do."""


def choose(setting: str, device: torch.device) -> Arithmetic:
    """The arithmetic for the setting `auto`, `torch` or `compiled`, and averages on `device`.

    `auto` prefers the compiled loops, and uses torch where these are not available.

    Raises:
        KernelUnavailableError: `compiled` was asked for and is not available.
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
                f"the compiled kernel is not available ({error}): in a clone of ema-sidecar, pip install '.[fast]', "
                "or use --kernel auto"
            ) from None
        why = f"the compiled kernel is not available: {error}"
        return _chosen(BY_TORCH, f"{why}; it is optional, in the extra fast, and gives the same averages sooner")


def _by_loops() -> Arithmetic:
    from ema_server.compute.compiled import ByLoops  # needs numba, which is optional and takes half a second to import

    return ByLoops()


def _chosen(arithmetic: Arithmetic, why: str) -> Arithmetic:
    logger.info("averaging kernel: %s (%s)", arithmetic.name, why)
    return arithmetic
