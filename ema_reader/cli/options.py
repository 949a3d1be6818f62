"""Options, checks of arguments, and exit codes that the commands share.

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
from ema_reader.errors import ReaderError, UsageError
from ema_reader.targets import named

LABEL_CHARS_MAX = 200  # the server's limit

Url = Annotated[str, typer.Option("--url", envvar="EMA_URL", help="Address of the server.")]
Token = Annotated[str | None, typer.Option("--token", envvar="EMA_TOKEN", help="Token of the server, if it has one.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Long = Annotated[bool, typer.Option("--long", help="Full ids, exact sizes and times, all columns.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run.")]
Target = Annotated[
    str, typer.Argument(metavar="RUN/AVERAGE[@REV]", help="REV: an id or its first digits, step-N, or latest.")
]


def parse_averages(text: str) -> tuple[str, ...]:
    """Names of averages separated by commas; empty for `all`.

    Raises:
        UsageError: there is no name, or an invalid one.
    """
    return () if text == "all" else tuple(named("average", name.strip()) for name in text.split(","))


def check_rule(spec: str, name: str) -> None:
    """Check an averaging rule and the name of its average (empty: the rule's default).

    Raises:
        UsageError: one of them is invalid; the text says why.
    """
    try:
        parse_average(spec, name=name)
    except LocalProtocolError as error:
        raise UsageError(str(error)) from None


def check_label(option: str, text: str) -> str:
    """The name of a task or a worker, checked.

    Raises:
        UsageError: it is empty or too long.
    """
    if not 0 < len(text) <= LABEL_CHARS_MAX:
        raise UsageError(f"{option} is {text[: LABEL_CHARS_MAX + 1]!r}: use 1 to {LABEL_CHARS_MAX} characters")
    return text


@contextmanager
def exits(code: int | None = None) -> Iterator[None]:
    """Inside a `with` block: an error is one line on stderr and the error's exit code (or `code`)."""
    try:
        yield
    except ReaderError as error:
        typer.echo(f"ema: {error}", err=True)
        raise typer.Exit(error.exit_code if code is None else code) from None


def log_to_stderr() -> None:
    """Log what a long command does, with times."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs each poll


def terminated(number: int, frame: object) -> None:
    """On SIGTERM, exit through the `finally` blocks, which give leases back and end children."""
    raise SystemExit(128 + number)
