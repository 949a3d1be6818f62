"""The commands that evaluate: a worker, and a request to one. Data goes to stdout, logs to stderr."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Annotated

import typer

from ema_reader import render
from ema_reader.errors import ReaderError
from ema_reader.evaluate import EvaluationWorker
from ema_reader.functions import Evaluate, check_device, import_function
from ema_reader.leases import LEASE_S
from ema_reader.options import Json, Target, Token, Url, exits, log_to_stderr, parse_target
from ema_reader.reader import DEFAULT_URL, Reader

EXIT_ORPHANED = 143  # as after SIGTERM


def evaluate(
    function: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="Takes a state dict, returns metrics.")],
    run: Annotated[str | None, typer.Option("--run", envvar="EMA_RUN", help="The run; all of them without it.")] = None,
    averages: Annotated[str, typer.Option("--averages", help="Names, separated by commas.")] = "all",
    task: Annotated[str, typer.Option("--task", help="Name under which the metrics are reported.")] = "default",
    worker: Annotated[str | None, typer.Option("--worker", help="Name of this worker; default: the host's.")] = None,
    poll_s: Annotated[float, typer.Option("--poll-s", min=0.05, max=3600, help="Seconds between two looks.")] = 1.0,
    every: Annotated[int, typer.Option("--every-versions", min=1, help="Evaluate every so many versions.")] = 1,
    lease_s: Annotated[
        float, typer.Option("--lease-s", min=1, max=900, help="Silent for so long, others take its version over.")
    ] = LEASE_S,
    device: Annotated[str, typer.Option("--device", help="Where the weights are loaded to: cpu, cuda:0, ...")] = "cpu",
    recalibrate_bn: Annotated[
        str | None,
        typer.Option(
            "--recalibrate-bn",
            metavar="MODULE:LOADER",
            help="Recompute BatchNorm statistics first; the loader returns (model, batches).",
        ),
    ] = None,
    until_eof: Annotated[
        bool, typer.Option("--until-stdin-closes", help="End then, as when the process dies that started this one.")
    ] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Evaluate each new version of a run, and what others ask to have validated; ends when the run is finished.

    Exit code 1 when the last version of an average could not be evaluated. Without a run it does not end by itself.
    """
    log_to_stderr()
    signal.signal(signal.SIGTERM, _terminated)
    if until_eof:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    with exits(), Reader(url, token) as reader:
        names = () if averages == "all" else tuple(name.strip() for name in averages.split(","))
        evaluator = _evaluator(function, recalibrate_bn)
        check_device(device)
        evaluation = EvaluationWorker(
            reader,
            evaluator,
            run,
            names,
            task=task,
            worker=worker,
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
    task: Annotated[str, typer.Option("--task", help="The task of the worker that is to do it.")] = "default",
    again: Annotated[bool, typer.Option("--again", help="Also if it has metrics for the task already.")] = False,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout-s", min=1, help="Seconds to wait; default: for ever.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Have a version evaluated by the server's worker or another one, and print what comes of it.

    Exit code 1 when the evaluation failed.
    """
    with exits(), Reader(url, token) as reader:
        run, average, rev = parse_target(target)
        found = reader.validate(run, average, rev, task=task, again=again, timeout_s=timeout_s)
        typer.echo(render.as_json(found) if json else render.validation_text(found))
        raise typer.Exit(0 if found.error is None else 1)


def _evaluator(function: str, loader: str | None) -> Evaluate:
    """The user's function; with a loader, it gets the weights with BatchNorm statistics recomputed."""
    evaluator = import_function(function)
    if loader is None:
        return evaluator
    try:
        from ema_reader.batchnorm import recalibrating
    except ImportError as error:
        raise ReaderError("recomputing BatchNorm statistics needs torch: install it") from error
    return recalibrating(evaluator, loader, import_function(loader))


def _terminated(number: int, frame: object) -> None:
    """SIGTERM ends a worker by the way that gives back what it has."""
    raise SystemExit(128 + number)


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(EXIT_ORPHANED)  # at once: whatever the main thread is at, nobody is left to tell
