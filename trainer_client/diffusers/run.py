"""Runs a script as Python would, with diffusers' `EMAModel` replaced by `RemoteEMAModel`, and finishes its runs.

diffusers' files are not changed: the names are rebound in this process only.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer_client import script
from trainer_client.diffusers.remote import RemoteEMAModel
from trainer_client.errors import EmaClientError
from trainer_client.ranks import rank_of

_FILE, _CLASS = "diffusers.training_utils", "EMAModel"


class UnknownDiffusers(EmaClientError):
    """This diffusers, or this script, averages in an unknown way; the text says what is different."""


def run_script(path: Path, arguments: Sequence[str]) -> None:
    """Run the script with these arguments; its averages are kept by the server.

    Raises:
        UnknownDiffusers: its average cannot be replaced, or the script made none.
        OSError: the script cannot be read.
        SystemExit: the script ended so.
    """
    original, version = _original()
    made: list[RemoteEMAModel] = []
    places = script.places_of(original, "diffusers")
    for module, name in places:
        setattr(module, name, _class(made))
    script.say(f"diffusers {version}: {script.names_of(places)} replaced by RemoteEMAModel")
    script.run(path, arguments, made)
    if not made and rank_of(None, os.environ) == 0:  # LeRobot makes one on rank 0 only
        raise UnknownDiffusers(
            f"{path} has made no {_CLASS} of {_FILE}: nothing was averaged. Is --use_ema among its arguments?"
        )


def _class(made: list[RemoteEMAModel]) -> type[RemoteEMAModel]:
    class OutOfProcess(RemoteEMAModel):
        """diffusers' average, kept by the server."""

        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **given)
            made.append(self)
            if self.run is not None:
                script.say(f"the average is kept by the server: {self.run}/{self.average}")

    return OutOfProcess


def _original() -> tuple[type[Any], str]:
    """The class to be replaced, and the version of diffusers.

    Raises:
        UnknownDiffusers: there is none, or its interface is another.
    """
    try:
        diffusers = importlib.import_module("diffusers")
        original = getattr(importlib.import_module(_FILE), _CLASS, None)
    except ImportError as error:
        raise UnknownDiffusers(f"diffusers cannot be imported ({error}): install it") from None
    version = getattr(diffusers, "__version__", "of unknown version")
    if not isinstance(original, type):
        raise UnknownDiffusers(f"diffusers {version} has no {_FILE}.{_CLASS}")
    strange = [name for name in _public(original) if not hasattr(RemoteEMAModel, name)]
    strange += [name for name in _parameters(original) if name not in _parameters(RemoteEMAModel)]
    if strange:
        raise UnknownDiffusers(
            f"{_CLASS} of diffusers {version} is not the one that we know: {', '.join(strange)} differ. "
            "Use RemoteEMAModel in a script of your own, or diffusers 0.35 to 0.42"
        )
    return original, version


def _public(kind: type[Any]) -> list[str]:
    return [name for name, value in vars(kind).items() if not name.startswith("_") and callable(value)]


def _parameters(kind: type[Any]) -> list[str]:
    return [
        name
        for name, each in inspect.signature(kind).parameters.items()
        if each.kind is not inspect.Parameter.VAR_KEYWORD
    ]
