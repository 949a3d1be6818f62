"""The command `blend`: weighted sums of versions, and with --evaluate which of them is best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.metrics import By, Lower
from ema_reader.cli.options import Json, Long, Target, Token, Url, exits
from ema_reader.cli.sweep import Device, Function, RecalibrateBn, Task, evaluated, evaluation_of, make_each
from ema_reader.derived import Blended
from ema_reader.errors import UsageError
from ema_reader.reader import DEFAULT_URL, Reader
from ema_reader.targets import parse_target
from ema_reader.values import Version

_DIGITS = 12  # of 1 - gamma: that of 0.55 is 0.45, as a person writes it


def blend(
    target: Target,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="[RUN/]AVERAGE[@REV]",
            help="Another version; default: the same run and step. Repeatable.",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", help="One for each version, for example 0.7,0.3; repeatable, for several blends."),
    ] = None,
    gamma: Annotated[
        list[str] | None,
        typer.Option("--gamma", help="Instead: weights of the --with version, for example .1,.2,.3; repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the average; default: such as ema_0.7-raw_0.3.")
    ] = None,
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
    """Make weighted sums of versions. The weights of each sum add up to 1.

    Prints a line for each: the version and what it was made from. With --evaluate, a table with a column for each
    metric, and the best version by each. Exit code 1 when one could not be made or evaluated.
    """
    with exits(), Reader(url, token) as reader:
        first = parse_target(target)
        targets = [_other(text, first[0]) for text in others or ()]
        asked = _asked(target, len(targets) + 1, weights or (), gamma or (), name)
        evaluation = evaluation_of(function, recalibrate_bn, task, device, by, lower)
        versions = _versions(reader, first, targets)
        make = partial(reader.derived.blend, versions, name=name)
        made = make_each({f"the blend {_shown(each)}": partial(make, each) for each in asked})
        good = len(made) == len(asked)
        if evaluation is None:
            text = "\n".join(render.as_json(each) if json else _line(each) for each in made)
        else:
            columns = {"weights": _weights_text}
            text, all_evaluated = evaluated(reader, "blended", made, evaluation, columns, long=long, json=json)
            good = good and all_evaluated
        typer.echo(text)
        raise typer.Exit(0 if good else 1)


def _other(text: str, run: str) -> tuple[str, str, str | None]:
    """Run, average and REV of a --with version, REV None if it has none.

    Raises:
        UsageError: a part is missing or not a valid name.
    """
    named_run, average, rev = parse_target(text if "/" in text.partition("@")[0] else f"{run}/{text}")
    return named_run, average, rev if "@" in text else None


def _asked(
    target: str, count: int, weights: Sequence[str], gamma: Sequence[str], name: str | None
) -> tuple[tuple[float, ...], ...]:
    """The weights of each blend.

    Raises:
        UsageError: there is no other version, or no blend; a weight is no number; or a name for several blends.
    """
    example = f"for example: ema blend {target} --with raw --weights 0.7,0.3"
    if count < 2:
        raise UsageError(f"give another version, {example}")
    if bool(weights) == bool(gamma):
        raise UsageError(f"give either --weights or --gamma, {example}")
    if gamma and count > 2:
        raise UsageError(f"--gamma is for two versions: give --weights, {count} numbers for each blend")
    found = [_numbers("--weights", text) for text in weights]
    found += [(round(1.0 - value, _DIGITS), value) for text in gamma for value in _numbers("--gamma", text)]
    for each in found:
        if len(each) != count:
            raise UsageError(f"--weights {_shown(each)} has {len(each)} numbers for {count} versions")
    asked = tuple(dict.fromkeys(found))
    if name is not None and len(asked) > 1:
        raise UsageError("--name names one average: give one blend with it")
    return asked


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers, for example 0.7,0.3") from None
    if not all(map(math.isfinite, numbers)):
        raise UsageError(f"{option} {text!r} has a number that is not finite")
    return numbers


def _versions(
    reader: Reader, first: tuple[str, str, str], others: Sequence[tuple[str, str, str | None]]
) -> list[Version]:
    """The versions, so that every blend is made of the same ones."""
    found = [reader.version(*first)]
    for run, average, rev in others:
        default = f"step-{found[0].step}" if run == first[0] else "latest"
        found.append(reader.version(run, average, default if rev is None else rev))
    return found


def _shown(weights: Sequence[float]) -> str:
    return ",".join(f"{weight:.12g}" for weight in weights)


def _weights_text(made: Blended) -> str:
    return _shown([each.weight for each in made.inputs])


def _line(made: Blended) -> str:
    parts = (f"{each.weight:.12g} x {each.run}/{each.average} at step {each.step}" for each in made.inputs)
    return f"{made.version}: {', '.join(parts)}"
