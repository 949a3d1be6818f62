"""What the commands that read have in common: their options, the targets they name, and how they end.

Exit codes: 0 done, 1 failure, 2 usage, 3 not found, 4 token, 5 server unreachable, 6 verification failed, 130
interrupted.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ema_reader.errors import ReaderError, UsageError

Url = Annotated[str, typer.Option("--url", envvar="EMA_URL", help="Address of the server.")]
Token = Annotated[str | None, typer.Option("--token", envvar="EMA_TOKEN", help="Token of the server, if it has one.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Target = Annotated[str, typer.Argument(metavar="RUN/AVERAGE[@REV]", help="REV: 40 hex, step-N or latest.")]


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
def exits(code: int | None = None) -> Iterator[None]:
    """Inside a `with` block: one line on stderr and the error's exit code (or `code`) in place of a traceback."""
    try:
        yield
    except ReaderError as error:
        typer.echo(f"ema: {error}", err=True)
        raise typer.Exit(error.exit_code if code is None else code) from None


def log_to_stderr() -> None:
    """What a long command does, with times."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs each poll
