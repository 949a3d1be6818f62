"""Commands that have versions made of others: `synthesize`. What the weights are made of is the server's to know."""

from __future__ import annotations

from typing import Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.options import Json, Token, Url, exits, named
from ema_reader.derived import Synthesized
from ema_reader.reader import DEFAULT_URL, Reader


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(synthesize)


def synthesize(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run that kept two power averages at least.")],
    sigma_rel: Annotated[float | None, typer.Option("--sigma-rel", help="The width, for example 0.12.")] = None,
    gamma: Annotated[float | None, typer.Option("--gamma", help="The exponent, in place of the width.")] = None,
    step: Annotated[int | None, typer.Option("--step", min=1, help="As of which step; default the newest.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the average; default power-SIGMA_REL.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Make a power-function average that the run did not keep, of those that it kept.

    Prints the version and how far its profile is off by estimate; what makes it doubtful goes to stderr.
    """
    with exits(), Reader(url, token) as reader:
        made = reader.derived.synthesize(named("run", run), sigma_rel=sigma_rel, gamma=gamma, step=step, name=name)
        if made.warning is not None:
            typer.echo(f"ema: warning: {made.warning}", err=True)
        typer.echo(render.as_json(made) if json else _text(made))


def _text(made: Synthesized) -> str:
    return (
        f"{made.version}: estimated error {made.estimated_error:.2%}, rounding amplified {made.amplification:.1f} "
        f"times, made of {made.inputs} stored averages"
    )
