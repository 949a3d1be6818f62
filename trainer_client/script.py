"""Runs a user's script as Python would, and finishes the runs of the averages that it made.

For the commands that replace a library's averaging class in the process that runs a training script.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from trainer_client.errors import EmaClientError


class Average(Protocol):
    """What a script makes: `RemoteModelEma`, `RemoteEMAModel`."""

    def finish(self) -> bool: ...

    def close(self) -> None: ...


def places_of(original: type[Any], library: str) -> tuple[tuple[ModuleType, str], ...]:
    """Each imported module of the library that has this class, and by which name."""
    modules = [module for name, module in sys.modules.items() if name == library or name.startswith(f"{library}.")]
    return tuple(
        (module, name) for module in modules for name, value in list(vars(module).items()) if value is original
    )


def names_of(places: Collection[tuple[ModuleType, str]]) -> str:
    """The full names of these places."""
    return ", ".join(sorted(f"{module.__name__}.{name}" for module, name in places))


def run(script: Path, arguments: Sequence[str], made: Collection[Average]) -> None:
    """Run the script with these arguments; then finish what is in `made`, unless the script failed.

    Raises:
        OSError: the script cannot be read.
        SystemExit: the script ended so.
    """
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # scripts log the INFO records of all libraries
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    finished = False
    try:
        runpy.run_path(str(script), run_name="__main__")
        finished = True
    except SystemExit as end:
        finished = not end.code
        raise
    finally:
        for average in made:
            if finished:
                average.finish()
            average.close()  # a run that is not finished stays open, to be resumed


def say(text: str) -> None:
    """Print a line to stderr, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ema: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str], usage: str, run_script: Callable[[Path, Sequence[str]], None]) -> int:
    """The command line `SCRIPT [ARGUMENT ...]`; the exit status is 2 if the script cannot be run."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    script = Path(arguments[0])
    if not script.is_file():
        print(f"ema: {script} is no file: give the path of the training script first", file=sys.stderr)
        return 2
    try:
        run_script(script, arguments[1:])
    except EmaClientError as error:
        print(f"ema: {error}", file=sys.stderr)
        return 2
    return 0
