"""`ema demo`: progress bars, then a table of results and the commands that fetch the best weights."""

from __future__ import annotations

import dataclasses
import importlib
import json as jsonlib
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ema_cli.demo.child import ProcessFailed
from ema_reader.errors import ReaderError

if TYPE_CHECKING:
    from ema_cli.demo.run import Report

_RUN = "digits"
_STEPS = 5000
_URL = "http://127.0.0.1:8080"  # where `ema serve` listens by default


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Each demo creates a new folder in it.")] = Path("ema-demo"),
    steps: Annotated[int, typer.Option("--steps", min=10, help="Optimizer steps.")] = _STEPS,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the trainer.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Train on real data with a server and an evaluation worker, and compare the averages."""
    importlib.import_module("sklearn")  # fail now if the trainer cannot import it
    from ema_cli.demo.run import run  # it imports torch, which takes a second

    signal.signal(signal.SIGTERM, _terminated)
    console = Console(stderr=True)
    try:
        place = _new_folder(folder)
        console.print(f"server, trainer and evaluation worker: logs and data are in {place}", highlight=False)
        with _Bars(console, steps) as bars:
            report = run(place, _RUN, steps, seed, bars.show)
    except (ProcessFailed, ReaderError, OSError) as error:
        typer.echo(f"ema: {error}", err=True)
        raise typer.Exit(1) from None
    if json:
        typer.echo(jsonlib.dumps(dataclasses.asdict(report), default=str))
    else:
        Console(highlight=False).print(_table(report))
        typer.echo(_summary(report))


class _Bars:
    """Two progress bars on stderr: steps trained, and the step of the newest evaluated version."""

    def __init__(self, console: Console, steps: int) -> None:
        columns = (TextColumn("{task.description:17}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[detail]}"), console=console)
        names = ("trainer", "evaluation worker")
        self._tasks = {name: self._progress.add_task(name, total=steps, detail="starting") for name in names}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def show(self, name: str, line: dict[str, Any]) -> None:
        if name == "server":
            self._progress.console.print(f"server ready: {line['zmq']} {line['http']}", highlight=False)
        elif name == "trainer" and "step" in line:
            self._progress.update(self._tasks[name], completed=line["step"], detail=f"loss {line['loss']:.2f}")
        elif name == "evaluation worker":
            version = line["version"]
            metrics = ", ".join(f"{key} {value:.3f}" for key, value in line["metrics"].items()) or "failed"
            self._progress.update(
                self._tasks[name], completed=version["step"], detail=f"{version['average']}: {metrics}"
            )


def _new_folder(parent: Path) -> Path:
    """Create the first of `parent/1`, `parent/2`, ... that does not exist."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            (parent / str(number)).mkdir()
            return parent / str(number)
        except FileExistsError:
            number += 1


def _table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("average")
    for heading in ("step", "updates", "gaps", "accuracy", "difference"):
        table.add_column(heading, justify="right")
    for result in report.results:
        name = f"{result.average} (last weights)" if result.average == "raw" else result.average
        numbers = (result.step, result.updates, result.gap_steps)
        texts = (*map(str, numbers), f"{result.accuracy:.1%}", f"{result.difference:.1e}")
        table.add_row(name, *texts, style="bold" if result is report.best else None)
    return table


def _summary(report: Report) -> str:
    best, ema = report.best, _program()
    name = f"{_RUN}/{best.average}@step-{best.step}"
    file = f"v1/runs/{_RUN}/averages/{best.average}/versions/{best.version}/files/model.safetensors"
    return "\n".join(
        (
            f"{report.steps} steps taken, {report.applied} updates applied, {report.gap_steps} gaps; "
            f"{report.versions_evaluated} versions evaluated; {report.seconds:.0f} s.",
            "Accuracy: of the downloaded files, on held-out images. Difference: the largest one between a file and",
            "a float64 replay of its ledger over the trainer's record, relative to the tensor's largest value.",
            "",
            f"The demo's server has ended. To serve its data again and download {name}:",
            f"  {ema} serve --data {shlex.quote(str(report.folder / 'data'))}",
            f"  {ema} download {name} -o best --url {_URL}",
            f"  curl -fO {_URL}/{file}",
            "Its metrics are stored as well; `ema serve --evaluate` and `ema evaluate` compute others:",
            f"  {ema} validate {name} --url {_URL}",
        )
    )


def _program() -> str:
    """The command `ema` for this shell: its name if that finds this program, else its path."""
    called = Path(sys.argv[0])
    if called.name != "ema":
        return "ema"
    found = shutil.which("ema")
    return "ema" if found and Path(found).resolve() == called.resolve() else shlex.quote(str(called))


def _terminated(number: int, frame: object) -> None:
    """On SIGTERM, exit through the context managers that stop the processes."""
    raise SystemExit(128 + number)
