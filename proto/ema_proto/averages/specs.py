"""Averaging rules as strings: `ema:0.9999,warmup=timm` is `Ema(0.9999, warmup="timm")`.

The grammar is `RULE[:[VALUE][,KEY=VALUE]...]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING
from typing import Any

from ema_proto.averages.parameters import parameters_of
from ema_proto.averages.presets import expanded
from ema_proto.averages.rules import AverageSpec, Bema, Ema, PowerEma, Raw, Uniform, Window, Wsd
from ema_proto.errors import SHOWN_CHARS, LocalProtocolError
from ema_proto.limits import AVERAGES_MAX

_RULES: dict[str, type[AverageSpec]] = {kind.KEYWORD: kind for kind in (Ema, PowerEma, Uniform, Window, Wsd, Bema, Raw)}
_PARAMETER = re.compile(r"\s*[a-z_]+\s*=")
_EXAMPLES = {
    "ema": "ema:0.9999,warmup=timm",
    "power": "power:sigma_rel=0.05",
    "swa": "swa:start=1000,every=100",
    "window": "window:5,every=100",
    "wsd": "wsd:start=10000,steps=2000",
    "bema": "bema:every=100",
    "raw": "raw:name=last",
}
_USE = (
    "use ema:DECAY (for example ema:0.9999), power:sigma_rel=WIDTH, swa, window:K, wsd:start=STEP,steps=STEPS, bema or "
    "raw"
)


def parse_average(text: str, *, name: str = "") -> AverageSpec:
    """Read one rule from its string, e.g. `"ema:0.999"`, `"swa:start=1000"`, `"ema:0.9998,preset=timm-v3"` or `"raw"`.

    Args:
        text: the rule; it may hold its name as `name=`.
        name: name of the average; empty for that in `text`, or else the default one.

    Raises:
        LocalProtocolError: the rule is unknown or its parameter is wrong; the text says which and what is allowed.
    """
    keyword, colon, parameters = text.strip().partition(":")
    rule = _RULES.get(keyword)
    if rule is None:
        raise LocalProtocolError(f"unknown average {text[:SHOWN_CHARS]!r}: {_USE}")
    given = _parameters(rule, parameters.split(",")) if colon else {}
    named = given.pop("name", "")
    if name and named and name != named:
        raise LocalProtocolError(
            f"average {text[:SHOWN_CHARS]!r} is named {name[:SHOWN_CHARS]!r} beside it: name it once"
        )
    values: dict[str, Any] = {}
    for key, parameter in parameters_of(rule).items():
        if key in given:
            values[parameter.name] = parameter.metadata["kind"].read(f"{keyword} {key}", given[key])
        elif parameter.default is MISSING:
            raise LocalProtocolError(
                f"average {text[:SHOWN_CHARS]!r} lacks {key}: use for example {_EXAMPLES[keyword]}"
            )
    return rule(**values, name=name or named)


def split_averages(text: str) -> list[str]:
    """The rules in a text like `"ema:0.9999,warmup=timm,raw"`: a comma separates rules, and a rule's parameters."""
    rules: list[str] = []
    for part in text.split(","):
        if rules and _PARAMETER.match(part):
            rules[-1] += f",{part}"
        else:
            rules.append(part)
    return rules


def parse_averages(given: Iterable[AverageSpec | str]) -> tuple[AverageSpec, ...]:
    """Read a list of rules, strings or values, and check that their names differ.

    Raises:
        LocalProtocolError: the list is empty or too long, a rule is wrong, or two averages share a name.
    """
    if isinstance(given, str):
        given = split_averages(given)
    averages = tuple(parse_average(item) if isinstance(item, str) else item for item in given)
    if not 0 < len(averages) <= AVERAGES_MAX:
        raise LocalProtocolError(f"a run has 1 to {AVERAGES_MAX} averages, {len(averages)} were given")
    seen: set[str] = set()
    for average in averages:
        if average.name.lower() in seen:
            raise LocalProtocolError(f"two averages are named {average.name!r}: give one of them another name=")
        seen.add(average.name.lower())
    return averages


def _parameters(rule: type[AverageSpec], parts: list[str]) -> dict[str, str]:
    """The parameters by key, with those of a preset; the first may come without its key."""
    keys = {parameter.name: key for key, parameter in parameters_of(rule).items()}
    known = [*keys.values(), *(["preset"] if keys else []), "name"]
    given: dict[str, str] = {}
    for place, part in enumerate(parts):
        if place == 0 and rule.LEADING and not _PARAMETER.match(part):
            key, value = keys[rule.LEADING], part.strip()
        else:
            key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in known or key in given:
            problem = "is given twice" if key in given else "is unknown"
            raise LocalProtocolError(
                f"{rule.KEYWORD} parameter {part[:SHOWN_CHARS]!r} {problem}: use {', '.join(known)}, "
                f"for example {_EXAMPLES[rule.KEYWORD]}"
            )
        given[key] = value
    return expanded(rule.KEYWORD, given)
