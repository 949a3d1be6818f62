"""Commands that read: status, versions, download, evaluate, validate, healthcheck.

Data goes to stdout, logs and progress to stderr. Exit codes: 0 done, 1 failure, 2 usage, 3 not found, 4 token, 5 server
unreachable, 6 verification failed, 130 interrupted. What the commands do is elsewhere; here are options and exits.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ema_reader import render
from ema_reader.errors import ReaderError, UsageError
from ema_reader.evaluate import EvaluationWorker
from ema_reader.functions import Evaluate, check_device, import_function
from ema_reader.leases import LEASE_S
from ema_reader.reader import DEFAULT_URL, Reader

EXIT_ORPHANED = 143  # as after SIGTERM

Url = Annotated[str, typer.Option("--url", envvar="EMA_URL", help="Address of the server.")]
Token = Annotated[str | None, typer.Option("--token", envvar="EMA_TOKEN", help="Token of the server, if it has one.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (status, versions, download, evaluate, validate, healthcheck):
        app.command()(command)


def status(
    run: Annotated[str | None, typer.Argument(help="One run; all without it.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show the runs: state, steps, rates, gaps."""
    with _exits(), Reader(url, token) as reader:
        runs = reader.runs() if run is None else (reader.run(run),)
        typer.echo(render.as_json({"runs": runs}) if json else render.status_text(runs))


def versions(
    target: Annotated[str, typer.Argument(metavar="RUN[/AVERAGE]", help="A run, or one of its averages.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """List the versions that can be downloaded, newest first."""
    with _exits(), Reader(url, token) as reader:
        run, slash, average = target.partition("/")
        if not run or "/" in average or (slash and not average):
            raise UsageError(f"{target!r} is not RUN or RUN/AVERAGE, for example resnet34/ema-0.999")
        averages = [average] if average else reader.run(run).average_names
        found = [version for name in averages for version in reader.versions(run, name)]
        typer.echo(render.as_json({"versions": found}) if json else render.versions_text(found))


def download(
    target: Annotated[str, typer.Argument(metavar="RUN/AVERAGE[@REV]", help="REV: 40 hex, step-N or latest.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; default RUN-AVERAGE-step-N.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Download a version, verified; goes on where an earlier download stopped. Prints the folder."""
    with _exits(), Reader(url, token) as reader:
        version = reader.version(*parse_target(target))
        folder = output or Path(f"{version.run}-{version.average}-step-{version.step}")
        path = reader.download(version, folder)
        typer.echo(render.as_json({"path": str(path), "version": version}) if json else str(path))


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
    _log_to_stderr()
    signal.signal(signal.SIGTERM, _terminated)
    if until_eof:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    with _exits(), Reader(url, token) as reader:
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
    target: Annotated[str, typer.Argument(metavar="RUN/AVERAGE[@REV]", help="REV: 40 hex, step-N or latest.")],
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
    with _exits(), Reader(url, token) as reader:
        run, average, rev = parse_target(target)
        found = reader.validate(run, average, rev, task=task, again=again, timeout_s=timeout_s)
        typer.echo(render.as_json(found) if json else render.validation_text(found))
        raise typer.Exit(0 if found.error is None else 1)


def healthcheck(url: Url = DEFAULT_URL, json: Json = False) -> None:
    """Exit 0 when the server is ready, 1 when it is not or does not answer. Needs no token."""
    with _exits(code=1), Reader(url) as reader:
        ready, checks = reader.ready()
        typer.echo(render.as_json({"ready": ready, "checks": checks}) if json else render.health_text(ready, checks))
        raise typer.Exit(0 if ready else 1)


def parse_target(text: str) -> tuple[str, str, str]:
    """Split `RUN/AVERAGE[@REV]`; without REV it is `latest`.

    Raises:
        UsageError: a part is missing.
    """
    name, at, rev = text.partition("@")
    run, _, average = name.partition("/")
    if not run or not average or "/" in average or (at and not rev):
        raise UsageError(f"{text!r} is not RUN/AVERAGE[@REV], for example resnet34/ema-0.999@step-2000")
    return run, average, rev or "latest"


@contextmanager
def _exits(code: int | None = None) -> Iterator[None]:
    """One line on stderr and the error's exit code (or `code`) in place of a traceback."""
    try:
        yield
    except ReaderError as error:
        typer.echo(f"ema: {error}", err=True)
        raise typer.Exit(error.exit_code if code is None else code) from None


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


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs each poll
