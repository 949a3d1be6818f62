"""The tables of docs/guides/averages.md match what was compared; its rules, and those of the drawings, parse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ema_proto.averages.presets import PRESETS
from ema_proto.averages.specs import parse_average
from support.parity_table import PEERS
from support.scripts import script

_ROOT = Path(__file__).parents[2]
_PAGE = (_ROOT / "docs" / "guides" / "averages.md").read_text()
_ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in _PAGE.split("## From another library")[1].splitlines()
    if line.startswith("| `")
][1:]


def test_every_preset_is_documented_and_compared() -> None:
    compared = {name for peer in PEERS for name in re.findall(r"preset=([\w-]+)", peer.rule)}

    assert sorted(row[0].strip("`") for row in _ROWS) == sorted(PRESETS)
    assert compared == set(PRESETS)


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row[0])
def test_preset_equals_its_table_row(row: list[str]) -> None:
    """With the length in the table: a preset has its own length, or requires one."""
    name, shown = row[0].strip("`"), parse_average(row[2].strip("`"))
    text = row[2].strip("`")
    length = text.partition(":")[2].split(",")[0]
    rule = text.partition(":")[0]
    given = f"{rule}:{length}," if length and not length.startswith("buffers") else f"{rule}:"

    assert parse_average(f"{given}preset={name}") == shown
    assert row[2] == f"`{shown.spec}`"


def test_every_documented_rule_parses() -> None:
    named = re.findall(r"`((?:ema|power|swa|window|wsd):[^`…]+)`", _PAGE)

    assert len(named) > 30
    for text in named:
        parse_average(text.replace("STEPS_PER_EPOCH", "100"))


def test_every_plotted_rule_parses() -> None:
    panels = script("plot_profiles").PANELS

    assert all(parse_average(rule) for panel in panels for rule in panel.rules)
