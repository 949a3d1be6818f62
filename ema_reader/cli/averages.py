"""Commands about averages: `averages` shows and changes them, `ledger` lists their steps, `synthesize` makes one."""

from __future__ import annotations

from typing import Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.options import Json, RunName, Target, Token, Url, check_rule, exits
from ema_reader.derived import Synthesized
from ema_reader.errors import UsageError
from ema_reader.reader import DEFAULT_URL, Reader
from ema_reader.targets import named, parse_target


def averages(
    run: RunName,
    add: Annotated[list[str] | None, typer.Option("--add", metavar="SPEC", help="Add one, as ema:0.9995.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="With --add: its name; default: the rule's.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", metavar="AVERAGE", help="Remove this one.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show the averages of a run: rule, decay and half-life now, mean age, share of the initial weights.

    With --add or --remove, one at a time, the averages are changed first, while the run's trainer streams.
    """
    with exits(), Reader(url, token) as reader:
        specs, names = add or [], remove or []
        if name is not None and not specs:
            raise UsageError("--name belongs to --add: give a rule, for example --add ema:0.9995")
        if len(specs) + len(names) > 1:
            raise UsageError("more than one --add or --remove: each may fail, so use one at a time")
        named("run", run)
        for spec in specs:
            check_rule(spec, name or "")
            reader.averages.add(run, spec, name or "")
        for old in names:
            reader.averages.remove(run, named("average", old))
        found = reader.averages.of(run)
        typer.echo(render.as_json({"averages": found}) if json else render.averages_text(found))


def ledger(
    target: Target,
    tail: Annotated[int | None, typer.Option("--tail", min=1, help="Only this many newest steps.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """List the steps inside a version with their shares, newest first: enough to recompute it from snapshots."""
    with exits(), Reader(url, token) as reader:
        version = reader.version(*parse_target(target))
        found = reader.averages.ledger(version.run, version.average, version.id, tail)
        typer.echo(render.as_json(found) if json else render.ledger_text(found))


def synthesize(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run with at least two power averages.")],
    sigma_rel: Annotated[
        list[float] | None, typer.Option("--sigma-rel", help="The width, as 0.12; repeatable.")
    ] = None,
    gamma: Annotated[list[float] | None, typer.Option("--gamma", help="The exponent, instead; repeatable.")] = None,
    step: Annotated[int | None, typer.Option("--step", min=1, help="At this step; default the newest.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Its name; default power-SIGMA_REL.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Make power averages that the run did not keep from those that it kept.

    Prints a line for each: the version, and the estimated error of its profile; warnings go to stderr.
    """
    with exits(), Reader(url, token) as reader:
        widths, exponents = sigma_rel or [], gamma or []
        if name is not None and len(widths) + len(exponents) > 1:
            raise UsageError("--name names one average: give one --sigma-rel or --gamma with it")
        if widths and exponents:
            raise UsageError("--sigma-rel and --gamma say the same in two ways: give one of them")
        asked: list[tuple[float | None, float | None]] = [(width, None) for width in widths] + [
            (None, exponent) for exponent in exponents
        ]
        for width, exponent in asked or [(None, None)]:
            made = reader.derived.synthesize(named("run", run), sigma_rel=width, gamma=exponent, step=step, name=name)
            if made.warning is not None:
                typer.echo(f"ema: warning: {made.warning}", err=True)
            typer.echo(render.as_json(made) if json else _text(made))


def _text(made: Synthesized) -> str:
    return (
        f"{made.version}: estimated error {made.estimated_error:.2%}, rounding amplified {made.amplification:.1f} "
        f"times, made of {made.inputs} stored averages"
    )
