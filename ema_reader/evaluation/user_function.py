"""The user's functions. Comes in: `module:function`; goes out: a callable, and what it measured as plain floats."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema_reader.errors import UsageError

_SAMPLES = "samples"

Evaluate = Callable[[dict[str, Any]], Mapping[str, Any]]


def import_function(target: str) -> Callable[..., Any]:
    """Import `module:function`; modules in the current directory are found too.

    Raises:
        UsageError: it is not written so, the module cannot be imported, or has no such function.
    """
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise UsageError(f"{target!r} is not module:function, for example my_evaluation:evaluate")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"cannot import {module_name!r} (also not from {here}): {error}") from error
    except (Exception, SystemExit) as error:  # the user's module may raise anything, a script at its end too
        raise UsageError(f"module {module_name!r} fails while it is imported: {error!r}") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"module {module_name!r} has no function {name!r}")
    function: Callable[..., Any] = found
    return function


def check_device(device: str) -> None:
    """See that torch has a device; `cpu` needs no torch.

    Raises:
        UsageError: it has none of this name, or cannot use it.
    """
    if device == "cpu":
        return
    try:
        import torch

        torch.empty(1, device=device)
    except (ImportError, RuntimeError, AssertionError) as error:  # a build without CUDA raises the last one
        reason = str(error).partition("\n")[0]
        raise UsageError(f"device {device!r} cannot be used: {reason}") from error


@dataclass(frozen=True, slots=True)
class Measured:
    """What a function found: metrics by name, and how many samples it looked at if it said so."""

    metrics: dict[str, float]
    samples: int | None = None


def measured(result: object) -> Measured:
    """What the function returned. The name `samples` is no metric: it says how many samples were evaluated.

    Raises:
        ValueError: as `plain_metrics` says, or `samples` is not a whole number from 0 on.
    """
    metrics = plain_metrics(result)
    samples = metrics.pop(_SAMPLES, None)
    if samples is None:
        return Measured(metrics)
    if samples < 0 or samples != int(samples):
        raise ValueError(f"{_SAMPLES!r} is {samples:g}: it says how many samples were evaluated, a whole number")
    if not metrics:
        raise ValueError(f"the function returned {_SAMPLES!r} and no metric")
    return Measured(metrics, int(samples))


def plain_metrics(result: object) -> dict[str, float]:
    """What the function returned as names and finite floats; numbers of numpy and torch are taken as well.

    Raises:
        ValueError: it is not a mapping of names to finite numbers; the text says what was found.
    """
    if not isinstance(result, Mapping) or not result:
        raise ValueError(f"the function returned {_shown(result)}, not a dict of metrics such as {{'accuracy': 0.9}}")
    metrics = {}
    for name, value in result.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"metric {name!r} is {_shown(value)}, not a number") from None
        if not isinstance(name, str) or not math.isfinite(number):
            raise ValueError(f"metric {name!r} is {number}: names are strings, values finite numbers")
        metrics[name] = number
    return metrics


def _shown(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
