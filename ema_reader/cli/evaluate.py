"""The commands that evaluate: `evaluate` is a worker, `validate` asks a worker, `recalibrate` recomputes BatchNorm."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.options import (
    Json,
    Target,
    Token,
    Url,
    check_label,
    exits,
    log_to_stderr,
    parse_averages,
    terminated,
)
from ema_reader.errors import ReaderError, RecalibrationFailed
from ema_reader.evaluation.user_function import Evaluate, check_device, import_function
from ema_reader.evaluation.worker import EvaluationWorker
from ema_reader.leases import LEASE_S
from ema_reader.reader import DEFAULT_URL, Reader
from ema_reader.targets import named, parse_target

if TYPE_CHECKING:
    from torch import Tensor

    from ema_reader.evaluation.batchnorm import Loader

EXIT_ORPHANED = 143  # as after SIGTERM

log = logging.getLogger(__name__)


def evaluate(
    function: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="Takes a state dict, returns metrics.")],
    run: Annotated[
        str | None, typer.Option("--run", envvar="EMA_RUN", help="The run; default: every run with a trainer.")
    ] = None,
    averages: Annotated[str, typer.Option("--averages", help="Names, separated by commas.")] = "all",
    task: Annotated[str, typer.Option("--task", help="Name under which the metrics are reported.")] = "default",
    worker: Annotated[str | None, typer.Option("--worker", help="Name of this worker; default: the host's.")] = None,
    poll_s: Annotated[float, typer.Option("--poll-s", min=0.05, max=3600, help="Seconds between two requests.")] = 1.0,
    every: Annotated[int, typer.Option("--every-versions", min=1, help="Evaluate every Nth version.")] = 1,
    lease_s: Annotated[
        float,
        typer.Option(
            "--lease-s", min=1, max=900, help="Seconds without a sign of life after which another worker takes over."
        ),
    ] = LEASE_S,
    device: Annotated[str, typer.Option("--device", help="Where weights are loaded: cpu, cuda:0, ...")] = "cpu",
    recalibrate_bn: Annotated[
        str | None,
        typer.Option(
            "--recalibrate-bn",
            metavar="MODULE:LOADER",
            help="Recompute BatchNorm statistics first; the loader returns (model, batches).",
        ),
    ] = None,
    until_eof: Annotated[bool, typer.Option("--until-stdin-closes", help="End when the parent process ends.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Evaluate each new version of a run, and requested validations; ends when the run is finished.

    A run that does not exist yet is waited for. Exit code 1 when the last version of an average could not be evaluated.
    Without --run it does not end by itself.
    """
    log_to_stderr()
    signal.signal(signal.SIGTERM, terminated)
    if until_eof:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    with exits(), Reader(url, token) as reader:
        names = parse_averages(averages)
        evaluator = evaluator_of(function, recalibrate_bn)
        check_device(device)
        evaluation = EvaluationWorker(
            reader,
            evaluator,
            run if run is None else named("run", run),
            names,
            task=check_label("--task", task),
            worker=worker if worker is None else check_label("--worker", worker),
            poll_s=poll_s,
            every=every,
            lease_s=lease_s,
            device=device,
        )
        for outcome in evaluation.outcomes():
            typer.echo(render.as_json(outcome) if json else render.outcome_text(outcome))
        if evaluation.failures:
            last = ", ".join(str(outcome.version) for outcome in evaluation.failures)
            raise ReaderError(f"the run is finished, but these last versions could not be evaluated: {last}")


def validate(
    target: Target,
    task: Annotated[str, typer.Option("--task", help="Evaluate it with a worker of this task.")] = "default",
    again: Annotated[bool, typer.Option("--again", help="Evaluate it even if it has metrics for the task.")] = False,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout-s", min=1, help="Seconds to wait; default: no limit.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Have a version evaluated by the server's worker or another one, and print the result.

    Exit code 1 when the evaluation failed.
    """
    with exits(), Reader(url, token) as reader:
        run, average, rev = parse_target(target)
        found = reader.validate(run, average, rev, task=check_label("--task", task), again=again, timeout_s=timeout_s)
        typer.echo(render.as_json(found) if json else render.validation_text(found))
        raise typer.Exit(0 if found.error is None else 1)


def recalibrate(
    target: Target,
    loader: Annotated[str, typer.Option("--bn", metavar="MODULE:LOADER", help="Returns (model, batches).")],
    device: Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda:0, ...")] = "cpu",
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Recompute a version's BatchNorm statistics and write them as a new version, RUN/AVERAGE-bn. Prints its id."""
    log_to_stderr()
    with exits(), Reader(url, token) as reader:
        batches = import_function(loader)
        check_device(device)
        base = reader.version(*parse_target(target))
        version = reader.derived.recalibrate(base, _recomputed(reader.load(base, device), loader, batches))
        typer.echo(render.as_json({"version": version}) if json else version.id)


def evaluator_of(function: str, loader: str | None) -> Evaluate:
    """The user's function; with a loader, BatchNorm statistics are recomputed before it is called.

    Raises:
        UsageError: a function cannot be imported.
        ReaderError: recomputing needs torch, which is not installed.
    """
    evaluator = import_function(function)
    if loader is None:
        return evaluator
    if importlib.util.find_spec("torch") is None:
        raise ReaderError("recomputing BatchNorm statistics needs torch: install it")
    from ema_reader.evaluation.batchnorm import recalibrating

    return recalibrating(evaluator, loader, import_function(loader))


def _recomputed(state: dict[str, Tensor], name: str, loader: Loader) -> dict[str, Tensor]:
    """The statistics; an error of the user's code is logged with its traceback."""
    from ema_reader.evaluation.batchnorm import recomputed

    try:
        return recomputed(state, name, loader)
    except RecalibrationFailed as failure:
        log.error("%s could not be used", name, exc_info=failure.__cause__)
        raise


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(EXIT_ORPHANED)  # at once, whatever the main thread does: the parent is gone
