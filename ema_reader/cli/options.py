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

from ema_proto.averages.specs import parse_average
from ema_proto.errors import LocalProtocolError
from ema_proto.names import check_name
from ema_reader.errors import ReaderError, UsageError

LABEL_CHARS_MAX = 200  # as the server has it

Url = Annotated[str, typer.Option("--url", envvar="EMA_URL", help="Address of the server.")]
Token = Annotated[str | None, typer.Option("--token", envvar="EMA_TOKEN", help="Token of the server, if it has one.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Target = Annotated[str, typer.Argument(metavar="RUN/AVERAGE[@REV]", help="REV: 40 hex, step-N or latest.")]


def parse_target(text: str) -> tuple[str, str, str]:
    """Split `RUN/AVERAGE[@REV]`; without REV it is `latest`.

    Raises:
        UsageError: a part is missing, or can be no name.
    """
    name, at, rev = text.partition("@")
    run, _, average = name.partition("/")
    if not run or not average or "/" in average or (at and not rev):
        raise UsageError(f"{text!r} is not RUN/AVERAGE[@REV], for example resnet34/ema-0.999@step-2000")
    return named("run", run), named("average", average), rev or "latest"


def named(kind: str, name: str) -> str:
    """The name of a run or an average (`kind`), if it can be one.

    Raises:
        UsageError: it cannot; the text says what a name is.
    """
    try:
        return check_name(kind, name)
    except LocalProtocolError as error:
        raise UsageError(str(error)) from None


def parse_averages(text: str) -> tuple[str, ...]:
    """Names of averages separated by commas; none for `all`.

    Raises:
        UsageError: there is none, or one that can be no name.
    """
    return () if text == "all" else tuple(named("average", name.strip()) for name in text.split(","))


def check_rule(spec: str, name: str) -> None:
    """Whether `spec` is an averaging rule, and `name` can be its name; empty for its own.

    Raises:
        UsageError: it is none; the text says why.
    """
    try:
        parse_average(spec, name=name)
    except LocalProtocolError as error:
        raise UsageError(str(error)) from None


def check_label(option: str, text: str) -> str:
    """The name of a task or a worker, if it can be one.

    Raises:
        UsageError: it is empty or too long.
    """
    if not 0 < len(text) <= LABEL_CHARS_MAX:
        raise UsageError(f"{option} is {text[: LABEL_CHARS_MAX + 1]!r}: use 1 to {LABEL_CHARS_MAX} characters")
    return text


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
