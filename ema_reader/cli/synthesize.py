"""The command `synthesize`: power averages of other widths, and with --evaluate which of them is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.metrics import By, Lower
from ema_reader.cli.options import Json, Long, Token, Url, check_rule, exits
from ema_reader.cli.sweep import Device, Function, RecalibrateBn, Task, evaluated, evaluation_of, make_each
from ema_reader.derived import Synthesized
from ema_reader.errors import UsageError
from ema_reader.reader import DEFAULT_URL, Reader
from ema_reader.targets import named


def synthesize(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run with at least two power averages.")],
    sigma_rel: Annotated[
        list[str] | None, typer.Option("--sigma-rel", help="Widths, for example 0.12 or 0.03,0.05; repeatable.")
    ] = None,
    gamma: Annotated[
        list[str] | None, typer.Option("--gamma", help="Exponents, instead of widths; repeatable.")
    ] = None,
    step: Annotated[int | None, typer.Option("--step", min=1, help="The step; default: the newest.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the average; default: power-SIGMA_REL.")] = None,
    function: Function = None,
    task: Task = "default",
    device: Device = "cpu",
    recalibrate_bn: RecalibrateBn = None,
    by: By = None,
    lower: Lower = None,
    long: Long = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Make power averages that the run did not keep from those that it kept.

    Prints a line for each: the version, and the estimated error in its steps' weights. With --evaluate, a table with a
    column for each metric, and the best version by each. Warnings go to stderr. Exit code 1 when one could not be made
    or evaluated.
    """
    with exits(), Reader(url, token) as reader:
        asked = _asked(named("run", run), sigma_rel or (), gamma or (), name)
        evaluation = evaluation_of(function, recalibrate_bn, task, device, by, lower)
        made = make_each(_makers(reader, run, asked, step, name))
        for each in made:
            if each.warning is not None:
                typer.echo(f"ema: warning: {each.version.average}: {each.warning}", err=True)
        good = len(made) == len(asked)
        if evaluation is None:
            text = "\n".join(render.as_json(each) if json else _line(each) for each in made)
        else:
            columns = {"estimated_error": _error_text}
            text, all_evaluated = evaluated(reader, "synthesized", made, evaluation, columns, long=long, json=json)
            good = good and all_evaluated
        typer.echo(text)
        raise typer.Exit(0 if good else 1)


def _asked(run: str, sigma_rel: Sequence[str], gamma: Sequence[str], name: str | None) -> tuple[tuple[str, float], ...]:
    """What to make: `sigma_rel` or `gamma`, and its value.

    Raises:
        UsageError: nothing, both, or a value that is no number or out of range; or a name for several averages.
    """
    if sigma_rel and gamma:
        raise UsageError("--sigma-rel and --gamma say the same in two ways: give one of them")
    option, texts = ("sigma_rel", sigma_rel) if sigma_rel else ("gamma", gamma)
    asked = tuple(dict.fromkeys((option, _number(option, part)) for text in texts for part in text.split(",")))
    if not asked:
        raise UsageError(f"give the widths to make, for example: ema synthesize {run} --sigma-rel 0.12")
    if name is not None and len(asked) > 1:
        raise UsageError("--name names one average: give one --sigma-rel or --gamma with it")
    return asked


def _number(option: str, text: str) -> float:
    check_rule(f"power:{option}={text.strip()}", "")
    return float(text)


def _makers(
    reader: Reader, run: str, asked: Sequence[tuple[str, float]], step: int | None, name: str | None
) -> dict[str, Callable[[], Synthesized]]:
    make = partial(reader.derived.synthesize, run, step=step, name=name)
    return {
        f"{option} {value:g}": partial(make, sigma_rel=value) if option == "sigma_rel" else partial(make, gamma=value)
        for option, value in asked
    }


def _line(made: Synthesized) -> str:
    return (
        f"{made.version}: estimated error {_error_text(made)} in the weights of the steps, rounding errors "
        f"{made.amplification:.1f} times those of the stored averages, made of {made.inputs} averages in "
        f"{made.snapshots} snapshots"
    )


def _error_text(made: Synthesized) -> str:
    return f"{made.estimated_error:.2%}"
