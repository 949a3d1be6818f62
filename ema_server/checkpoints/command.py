"""The command `ema average`: averages of checkpoints on disk, without a server.

Exit codes: 0 done, 1 the checkpoints cannot be averaged or the disk fails, 2 an argument is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ema_proto.averages.specs import parse_averages
from ema_proto.errors import LocalProtocolError
from ema_proto.limits import STEP_MAX
from ema_server.checkpoints.errors import ArgumentError, CheckpointError
from ema_server.storage.disk import megabytes

if TYPE_CHECKING:
    from ema_server.checkpoints.average import Averaged, Progress
    from ema_server.checkpoints.folders import Checkpoint
    from ema_server.checkpoints.weights import Weighing

EXIT_FAILURE = 1
EXIT_USAGE = 2


class DtypeChoice(StrEnum):
    """The dtype of floats in the output."""

    FLOAT32 = "float32"
    SOURCE = "source"


def register(app: typer.Typer) -> None:
    app.command()(average)


def average(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR",
            help="Checkpoints: folders or safetensors files. Or one folder that holds them.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the average; with several, a sub-folder for each.")
    ],
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", help="An averaging rule, for example window:5 or power:sigma_rel=0.1; repeatable."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="Instead: a number for each checkpoint; they are divided by their sum."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", help="Steps of the checkpoints in the order given; default: those in their names."),
    ] = None,
    dtype: Annotated[
        DtypeChoice, typer.Option("--dtype", help="Of floats in the output: float32, or as in the checkpoints.")
    ] = DtypeChoice.FLOAT32,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Average checkpoints that lie on disk: safetensors files of any framework. Needs no server.

    The checkpoints are averaged by the server's rules and kernel, one block of each tensor at a time. Config, tokenizer
    and similar files of the newest checkpoint are copied, and version.json records the weight and the digests of each
    checkpoint. Prints the share of each checkpoint in each average.
    """
    # Imported only now: torch takes a second, which `ema --help` need not.
    from ema_server.checkpoints.average import average as run
    from ema_server.checkpoints.average import warnings_of
    from ema_server.checkpoints.folders import find

    with _exits():
        numbers = None if weights is None else _numbers("--weights", weights, float)
        given = None if steps is None else _numbers("--steps", steps, int)
        checkpoints = find(paths, given, in_order=numbers is not None)
        weighings = _weighings(rule or [], numbers, checkpoints)
        with _progress() as progress:
            made = run(checkpoints, weighings, output, progress, keep_dtype=dtype is DtypeChoice.SOURCE, force=force)
    warnings = warnings_of(weighings)
    for warning in warnings:
        typer.echo(f"ema: warning: {warning}", err=True)
    typer.echo(_as_json(made, warnings) if json else "\n\n".join(map(_as_text, made)))


@contextmanager
def _exits() -> Iterator[None]:
    """Inside a `with` block: an error is one line on stderr and an exit code."""
    try:
        yield
    except ArgumentError as error:
        typer.echo(f"ema average: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    except CheckpointError as error:
        typer.echo(f"ema average: {error}", err=True)
        raise typer.Exit(EXIT_FAILURE) from None


def _numbers(option: str, text: str, kind: type[Any]) -> list[Any]:
    """The numbers in a text, separated by commas."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{option} {text!r} is not a list of numbers: use for example 500,1000") from None
    if kind is int and not 0 <= min(found) <= max(found) <= STEP_MAX:
        raise ArgumentError(f"{option} {text!r} has a step that is not in 0 … 2^53 - 1")
    return found


def _weighings(
    rules: Sequence[str], numbers: Sequence[float] | None, checkpoints: Sequence[Checkpoint]
) -> list[Weighing]:
    from ema_server.checkpoints.weights import weigh, weigh_by

    at = [checkpoint.step for checkpoint in checkpoints]
    if bool(rules) == (numbers is not None):
        raise ArgumentError("give --rule (for example --rule window:5, or --rule swa for the plain mean) or --weights")
    if numbers is not None:
        return [weigh_by(numbers, at)]
    try:
        return [weigh(rule, at) for rule in parse_averages(rules)]
    except LocalProtocolError as error:
        raise ArgumentError(f"--rule: {error}") from None


def _as_json(made: Sequence[Averaged], warnings: Sequence[str]) -> str:
    from ema_server.storage.records import dump

    averages = [{"path": str(each.folder), **each.version} for each in made]
    return dump({"averages": averages, "warnings": list(warnings)}).decode().rstrip()


def _as_text(made: Averaged) -> str:
    """The folder, and a line for each checkpoint with its share."""
    read = made.version["derived"]["checkpoints"]
    nbytes = sum(entry["size"] for entry in made.version["files"])
    lines = [f"{made.folder}: {made.weighing.spec} of {len(read)} checkpoints, {megabytes(nbytes)}"]
    width = max(len(str(each["step"])) for each in read)
    lines += [f"  step {each['step']:>{width}}  {each['share']:7.2%}  {each['path']}" for each in read]
    return "\n".join(lines)


class _Silent:
    """Progress that is not shown."""

    def start(self, nbytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Bar(bars)


class _Bar:
    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task: Any = None

    def start(self, nbytes: int) -> None:
        self._task = self._bars.add_task("", total=nbytes)

    def advance(self, nbytes: int) -> None:
        self._bars.advance(self._task, nbytes)
