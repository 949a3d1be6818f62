"""`ema watch`: keeps a folder at the newest version of an average, and has engines or a command take each one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.options import Json, Token, Url, exits, log_to_stderr, terminated
from ema_reader.errors import ReaderError, UsageError
from ema_reader.reader import DEFAULT_URL, Reader
from ema_reader.targets import parse_target
from ema_reader.watching.folder import WatchedFolder
from ema_reader.watching.targets import Command, Target, parse_engine
from ema_reader.watching.watch import Watch


def watch(
    target: Annotated[str, typer.Argument(metavar="RUN/AVERAGE", help="The average, which need not exist yet.")],
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="Folder; DIR/current leads to the newest.")],
    post: Annotated[
        list[str] | None,
        typer.Option("--post", metavar="ENGINE=URL", help="sglang=URL or vllm=URL; may be given several times."),
    ] = None,
    cmd: Annotated[
        str | None,
        typer.Option("--cmd", metavar="COMMAND", help="Run for each version, e.g. 'python eval.py {path} {step}'."),
    ] = None,
    keep: Annotated[int, typer.Option("--keep", min=1, help="How many versions stay in DIR.")] = 2,
    poll_s: Annotated[float, typer.Option("--poll-s", min=0.05, max=3600, help="Seconds between two requests.")] = 1.0,
    engine_token: Annotated[
        str | None, typer.Option("--engine-token", envvar="EMA_ENGINE_TOKEN", help="API key of the engines.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Download each new version, verified, link DIR/current to it, and have an engine or a command take it.

    Prints each version that was delivered, and ends when the run is finished. Exit code 1 when the last version was
    refused. In COMMAND {path}, {link}, {step}, {version}, {run} and {average} are replaced; there is no shell.
    """
    log_to_stderr()
    signal.signal(signal.SIGTERM, terminated)
    with exits(), Reader(url, token) as reader:
        if "@" in target:
            raise UsageError(f"{target!r}: the newest version is watched, leave out @REV")
        run, average, _ = parse_target(target)
        targets: list[Target] = [parse_engine(text, engine_token) for text in post or ()]
        if cmd is not None:
            targets.append(Command(cmd))
        with WatchedFolder(into, run, average, keep) as folder:
            watching = Watch(reader, run, average, folder, targets, poll_s=poll_s)
            for version in watching.deliveries():
                path = folder.folder_of(version)
                typer.echo(render.as_json({"version": version, "path": str(path)}) if json else f"{version}: {path}")
        if watching.failure is not None:
            raise ReaderError(f"the run is finished, but its last version is not delivered: {watching.failure}")
