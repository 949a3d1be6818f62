"""Runs a script as Python would, with timm's averaging class replaced by `RemoteModelEma`, and finishes its runs.

timm's files are not changed: the names are rebound in this process only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer_client import script as scripts
from trainer_client.timm.known import Known, UnknownTimm, find_known
from trainer_client.timm.remote import RemoteModelEma

_FORCE_CPU = "--model-ema-force-cpu"
_SHORTEST = "--model-ema-f"  # argparse takes every beginning that no other option has


def run_script(script: Path, arguments: Sequence[str]) -> None:
    """Run the script with these arguments; its averages are kept by the server.

    Raises:
        UnknownTimm: its average cannot be replaced, or the script made none although one was requested.
        OSError: the script cannot be read.
        SystemExit: the script ended so.
    """
    known = find_known(script.read_text())
    made: list[RemoteModelEma] = []
    ours = _class(made)
    for module, name in known.places:
        setattr(module, name, ours)
    passed = [argument for argument in arguments if not _is_force_cpu(argument)]
    _report(known, forced=len(passed) < len(arguments))
    scripts.run(script, passed, made)
    if not made and "--model-ema" in passed:
        raise UnknownTimm(
            f"{script} was given --model-ema and has made no {known.original.__name__}: nothing was averaged"
        )


def _class(made: list[RemoteModelEma]) -> type[RemoteModelEma]:
    """A class with timm's interface, whose module is on the model's device, where it is validated."""

    class OutOfProcess(RemoteModelEma):
        """timm's averaged model, kept by the server."""

        def __init__(self, model: nn.Module, *args: Any, **given: Any) -> None:
            device = _device_of(model)
            super().__init__(model, *args, **(given | {"device": device}))
            made.append(self)
            if self.run is not None:
                scripts.say(f"the average is kept by the server, in run {self.run}; validated on {device}")

    return OutOfProcess


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _is_force_cpu(argument: str) -> bool:
    return argument.startswith(_SHORTEST) and _FORCE_CPU.startswith(argument)


def _report(known: Known, *, forced: bool) -> None:
    scripts.say(f"timm {known.version}: {known.names} replaced by RemoteModelEma")
    if forced:
        scripts.say(f"{_FORCE_CPU} is not passed on: the average is in another process anyway, and it is validated")
