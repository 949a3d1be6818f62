"""The class `Callback` of Lightning, which exists in two packages that know nothing of each other."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

_PACKAGES: Final[tuple[str, ...]] = ("lightning.pytorch", "pytorch_lightning")


def callback_class() -> type[Any]:
    """The base class of callbacks: that of the package that is imported, or one made of both.

    Where neither is imported, all that are installed are. A callback is then an instance of either's `Callback`.

    Raises:
        ImportError: neither is installed.
    """
    classes = tuple(importlib.import_module(name).Callback for name in _packages())
    return classes[0] if len(classes) == 1 else type("Callback", classes, {})


def isolated_rng() -> AbstractContextManager[None]:
    """A context that leaves the state of all random number generators as it was: torch's, numpy's and Python's."""
    context: AbstractContextManager[None] = importlib.import_module(f"{_packages()[0]}.utilities.seed").isolate_rng()
    return context


def takes_batch_idx(step: Callable[..., Any]) -> bool:
    """Whether a step of a LightningModule has the parameter `batch_idx`, which may be left out."""
    signatures = importlib.import_module(f"{_packages()[0]}.utilities.signature_utils")
    return bool(signatures.is_param_in_hook_signature(step, "batch_idx", min_args=2))


def _packages() -> list[str]:
    packages = [name for name in _PACKAGES if name in sys.modules]
    packages = packages or [name for name in _PACKAGES if _installed(name)]
    if not packages:
        raise ImportError("trainer_client.lightning needs lightning or pytorch_lightning: pip install lightning")
    return packages


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package.partition(".")[0]) is not None
