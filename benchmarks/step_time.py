"""Time that an average adds to a training step, with the average in the server and with the average in the trainer.

Added time is a round's step with an average less the same round's step without one. It includes the copy, the
sending threads, and the effect on shared caches. The client's counter of blocked time includes only the copy.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.machine import all_cores, halves
from benchmarks.models import QUICK_WIDTHS, WIDTHS
from benchmarks.result import Row, Section, Spread
from benchmarks.served import START_S, serving
from ema_cli.demo.child import Child

_DISK_BYTES = 4 << 30
_ROUND_S = 300.0
_AIM = "≤ 1.1"

Round = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Setting:
    """Which cores train, which run the client's threads, and which the server."""

    name: str
    compute: frozenset[int]
    send: frozenset[int]
    serve: frozenset[int]


def settings() -> tuple[Setting, ...]:
    """The three settings, on this machine's cores."""
    first, second = halves()
    return (
        Setting("sending and server on other cores", first, second, second),
        Setting("server on other cores", first, first, second),
        Setting("all on all cores", all_cores(), all_cores(), all_cores()),
    )


def measure(*, quick: bool) -> Section:
    """Three settings by two sizes; for a smoke test one of each."""
    rows: list[Row] = []
    for setting in settings()[: 1 if quick else None]:
        for size, width in (QUICK_WIDTHS if quick else WIDTHS).items():
            print(f"  {size}, {setting.name}", file=sys.stderr, flush=True)
            rounds = _rounds(setting, width, rounds=1 if quick else 5, steps=2 if quick else 3072 // width + 2)
            rows += _rows(f"{size}, {setting.name}", rounds, _AIM if setting.compute != setting.serve else "none")
    note = "Time added to a step; in brackets the step without an average. The rival is timm's arithmetic, not timm."
    return Section("step_time: what an average adds to a training step", "ModelEmaV3 in process", tuple(rows), note)


def _rounds(setting: Setting, width: int, rounds: int, steps: int) -> list[Round]:
    numbers = {"width": width, "batch": 1, "tokens": 48, "rounds": rounds, "steps": steps}
    cores = {"compute": setting.compute, "send": setting.send}
    with serving(_DISK_BYTES, setting.serve) as server:
        command = ["-m", "benchmarks.step_trainer", server.zmq]
        command += [part for name, value in numbers.items() for part in (f"--{name}", str(value))]
        command += [part for name, value in cores.items() for part in (f"--{name}", json.dumps(sorted(value)))]
        with Child("trainer", command, server.folder / "trainer.log") as trainer:
            return [trainer.first_line(_ROUND_S + START_S) for _ in range(rounds)]


def _rows(what: str, rounds: Sequence[Round], aim: str) -> list[Row]:
    added = {arm: [r[arm]["step_s"] - r["none"]["step_s"] for r in rounds] for arm in rounds[0]}
    plain_ms = statistics.median(r["none"]["step_s"] for r in rounds) * 1e3
    rows = []
    for arm in ("attach", "update", "attach, wait"):
        blocked_ms = statistics.median(r[arm]["blocked_s"] for r in rounds) * 1e3
        skipped = statistics.mean(r[arm]["skipped"] for r in rounds)
        ours = f"{Spread.of(added[arm]).show('ms', 1e3, '+')}; blocked {blocked_ms:.1f} ms; skipped {skipped:.0%}"
        rival = f"{Spread.of(added['rival']).show('ms', 1e3, '+')} [{plain_ms:.0f} ms]"
        rows.append(Row(f"{what}: `{arm}`", ours, rival, Spread.ratio(added[arm], added["rival"]), aim))
    return rows
