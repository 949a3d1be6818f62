"""Memory that a run takes in the server and in the trainer, against the amounts that the README states.

Server: three averages in the accumulator's dtype and two slots of a snapshot. Trainer: two slots. It measures
the highest proportional set size while snapshots stream and a generation is published, less that just before.
"""

from __future__ import annotations

from typing import Any

from benchmarks.memory_trainer import AVERAGES
from benchmarks.models import QUICK_WIDTHS, WIDTHS
from benchmarks.result import Row, Section, Spread
from benchmarks.served import START_S, serving
from ema_cli.demo.child import Child
from ema_proto.limits import SLOTS

_DISK_BYTES = 4 << 30


def measure(*, quick: bool) -> Section:
    """The larger model, each round with new processes."""
    size, width = list((QUICK_WIDTHS if quick else WIDTHS).items())[-1]
    found = [_grown(width) for _ in range(1 if quick else 3)]
    rows = (
        _row(f"server, {size}, {len(AVERAGES)} averages", found, "server", len(AVERAGES) + SLOTS, "≤ +128 MiB"),
        _row(f"trainer, {size}", found, "trainer", SLOTS, "no more than stated"),
    )
    return Section("memory: over the idle process", "sum of averages and slots", rows)


def _grown(width: int) -> dict[str, Any]:
    with serving(_DISK_BYTES) as server:
        command = ["-m", "benchmarks.memory_trainer", server.zmq, str(server.pid), str(width)]
        with Child("trainer", command, server.folder / "trainer.log") as trainer:
            return trainer.first_line(START_S)


def _row(what: str, found: list[dict[str, Any]], side: str, snapshots: int, aim: str) -> Row:
    stated = [snapshots * one["snapshot"] for one in found]
    grown = [one[side] for one in found]
    over = Spread.of([ours - sums for ours, sums in zip(grown, stated, strict=True)])
    ours = f"{Spread.of(grown).show('MiB', 2**-20)}; {over.median / 2**20:+.0f} MiB"
    return Row(what, ours, Spread.of(stated).show("MiB", 2**-20), Spread.ratio(grown, stated), aim)
