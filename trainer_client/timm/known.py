"""Finds timm's averaging class and every name that it has in timm's modules, and checks that it can be replaced.

The interface is inspected, not the version number. Nothing is replaced here.
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from trainer_client.errors import EmaClientError
from trainer_client.script import names_of, places_of
from trainer_client.timm.remote import RemoteModelEma

_CLASS = "ModelEmaV3"
_FILE = "timm.utils.model_ema"
_CALLS = {"update": ("model", "step"), "set": ("model",)}
_TASK_CALL = re.compile(r"\.setup_ema\(")
_OWN_CALL = re.compile(rf"\b{_CLASS}\b")


class UnknownTimm(EmaClientError):
    """This timm, or this script, averages in an unknown way; the text says what is different."""


@dataclass(frozen=True, slots=True)
class Known:
    """The class to be replaced, and the modules that contain it with its name in each."""

    original: type[Any]
    places: tuple[tuple[ModuleType, str], ...]
    version: str

    @property
    def names(self) -> str:
        return names_of(self.places)


def find_known(script: str) -> Known:
    """Inspect the installed timm and the source of the script.

    Raises:
        UnknownTimm: timm is missing, its averaging class is unknown, or the script does not use it.
    """
    try:
        timm = importlib.import_module("timm")
        home = importlib.import_module(_FILE)
    except ImportError as error:
        raise UnknownTimm(
            f"timm cannot be imported ({error}): install it, with torchvision, as its script needs"
        ) from None
    tasks = _load_tasks()
    original = getattr(home, _CLASS, None)
    if not isinstance(original, type):
        raise UnknownTimm(f"{_where(timm)} has no {_FILE}.{_CLASS}: timm 1.0 or newer is needed")
    _check_calls(timm, original)
    known = Known(original, places_of(original, "timm"), getattr(timm, "__version__", "of unknown version"))
    by_task = bool(_TASK_CALL.search(script)) and tasks is not None and (tasks, _CLASS) in known.places
    if not by_task and not _OWN_CALL.search(script):
        raise UnknownTimm(
            f"the script neither uses {_CLASS} nor calls setup_ema of a timm.task that does ({_where(timm)}): "
            "its average cannot be replaced. Use RemoteModelEma in the script instead"
        )
    return known


def _load_tasks() -> ModuleType | None:
    """The module whose `setup_ema` makes the average in newer scripts; None in a timm that has none."""
    try:
        return importlib.import_module("timm.task.task")
    except ImportError:
        return None


def _check_calls(timm: ModuleType, original: type[Any]) -> None:
    ours = set(inspect.signature(RemoteModelEma).parameters)
    strange = [name for name in inspect.signature(original).parameters if name not in ours]
    for name, wanted in _CALLS.items():
        method = getattr(original, name, None)
        if method is None or tuple(inspect.signature(method).parameters)[1:] != wanted:
            strange.append(f"{name}()")
    if strange:
        raise UnknownTimm(
            f"{_CLASS} of {_where(timm)} is not the one that we know: {', '.join(strange)} differ. "
            "Use RemoteModelEma in a script of your own, or a timm from 1.0.29 on that has not changed this"
        )


def _where(timm: ModuleType) -> str:
    return f"timm {getattr(timm, '__version__', '')} in {', '.join(timm.__path__)}"
