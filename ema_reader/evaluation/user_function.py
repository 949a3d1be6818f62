"""The user's functions: imports `module:function`, and converts the result to plain finite floats."""

from __future__ import annotations

import importlib
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ema_reader.errors import UsageError

NAME_CHARS_MAX = 200  # of a metric; this and the next are the server's limits
METRICS_MAX = 1000

_SAMPLES = "samples"
_BEYOND = "(other metrics)"
_FRAMES_SHOWN = 3
_INSTALL = {  # what a training script may need that is imported for evaluation only
    "ema_server": "in a clone of ema-sidecar, pip install '.[server]'",
    "trainer_client": "in a clone of ema-sidecar, pip install '.[trainer]'",
    "sklearn": "pip install scikit-learn",
    "torch": "install the build made for this machine",
    "zmq": "in a clone of ema-sidecar, pip install '.[trainer]'",
}

Evaluate = Callable[[dict[str, Any]], Mapping[str, Any]]


def import_function(target: str) -> Callable[..., Any]:
    """Import `module:function`; modules in the current directory are found too.

    Raises:
        UsageError: the target is malformed, the module cannot be imported, or it has no such function.
    """
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise UsageError(f"{target!r} is not module:function, for example my_evaluation:evaluate")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise anything; a script ends with SystemExit
        raise UsageError(_import_failure(module_name, here, error)) from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"module {module_name!r} has no function {name!r}")
    function: Callable[..., Any] = found
    return function


def _import_failure(module_name: str, here: str, error: BaseException) -> str:
    """In one line: the module, the lines that led to the error, the error, and what to install."""
    first = error  # the original error, where a module raises another one from it
    while first.__cause__ is not None:
        first = first.__cause__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    chain = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-_FRAMES_SHOWN:])
    where = f" (at {'... > ' if len(frames) > _FRAMES_SHOWN else ''}{chain})" if chain else ""
    text = f"{type(error).__name__}: {error}" if str(error) else repr(error)
    if first is not error:
        text += f", caused by {type(first).__name__}: {first}"
    text = " ".join(text.split())
    if not isinstance(first, ModuleNotFoundError) or first.name is None:
        return f"module {module_name!r} fails while it is imported{where}: {text}"
    missing = first.name.partition(".")[0]
    if missing == module_name.partition(".")[0]:
        return f"cannot import {module_name!r}: there is no such module, also not in {here}"
    advice = _INSTALL.get(missing, f"install what provides {missing!r} for {sys.executable}")
    return f"cannot import {module_name!r}{where}: {text}; {advice}"


def _is_users(filename: str) -> bool:
    return filename != __file__ and not filename.startswith("<frozen ") and Path(filename).parent.name != "importlib"


def check_device(device: str) -> None:
    """Check that torch can use a device; `cpu` is accepted without torch.

    Raises:
        UsageError: torch has no device of this name, or cannot use it.
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
    """Result of a function: metrics by name, and the number of samples if it returned one.

    `missing` has the metrics without a finite value, each with the reason: `nan`, `inf`, `-inf`, or what was found.
    """

    metrics: dict[str, float]
    samples: int | None = None
    missing: dict[str, str] = field(default_factory=dict)


def measured(result: object) -> Measured:
    """Convert a function's result: numbers of numpy and torch become floats, `samples` is the number of samples.

    A metric that is not a finite number, or whose name the server cannot store, is missing; the others count.

    Raises:
        ValueError: the result is not a mapping of names to at least one number, or `samples` is not a whole number from
            0 on; the text says what was found.
    """
    if not isinstance(result, Mapping) or not result:
        raise ValueError(f"the function returned {_shown(result)}, not a dict of metrics such as {{'accuracy': 0.9}}")
    metrics, missing, numbers = dict[str, float](), dict[str, str](), 0
    for name, value in result.items():
        if not isinstance(name, str):
            raise ValueError(f"metric {name!r} is named by {_shown(name)}: names are strings")
        number = _number(value)
        numbers += number is not None
        unusable = _unusable_name(name)
        if unusable is not None:
            missing[_short(name)] = unusable
        elif name != _SAMPLES and len(metrics) + len(missing) >= METRICS_MAX:
            missing[_BEYOND] = f"more than {METRICS_MAX} metrics: the first ones count"
        elif number is None:
            missing[name] = f"{_shown(value)}, not a number"
        elif math.isfinite(number):
            metrics[name] = number
        else:
            missing[name] = str(number)
    if not numbers:
        raise ValueError("; ".join(f"metric {name!r} is {reason}" for name, reason in missing.items()))
    samples = metrics.pop(_SAMPLES, None)
    if samples is None:
        return Measured(metrics, None, missing)
    if samples < 0 or samples != int(samples):
        raise ValueError(f"{_SAMPLES!r} is {samples:g}: it says how many samples were evaluated, a whole number")
    if not metrics and not missing:
        raise ValueError(f"the function returned {_SAMPLES!r} and no metric")
    return Measured(metrics, int(samples), missing)


def _unusable_name(name: str) -> str | None:
    """Why the server cannot store a metric of this name; None if it can."""
    if not name:
        return "its name is empty"
    if len(name) > NAME_CHARS_MAX:
        return f"its name has {len(name)} characters, of which {NAME_CHARS_MAX} are allowed"
    return "its name is not valid Unicode" if _short(name) != name else None


def _short(name: str) -> str:
    """The name in a form that the server can store."""
    valid = name.encode(errors="backslashreplace").decode() or "(no name)"
    return valid if len(valid) <= NAME_CHARS_MAX else f"{valid[: NAME_CHARS_MAX - 3]}..."


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch raises the third for several elements
        return None


def _shown(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
