"""How much an average lengthens a training step on a GPU, and how much GPU memory it takes.

Added time is a round's step with an average less the same round's step without one, as in `step_time`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

import torch

from benchmarks.models import QUICK_WIDTHS, WIDTHS
from benchmarks.result import Row, Section, Spread
from benchmarks.served import START_S, serving
from ema_cli.demo.child import Child

_DISK_BYTES = 8 << 30  # each round sets the previous run aside
_ROUND_S = 300.0
_TITLE = "gpu_step: what an average adds to a training step on a GPU"
_RIVAL = 'ModelEmaV3(device="cpu")'

Round = dict[str, dict[str, float]]


def measure(*, quick: bool) -> Section:
    """Two sizes; for a smoke test a tiny one. No rows without a CUDA device."""
    if not torch.cuda.is_available():
        return Section(
            _TITLE, _RIVAL, (), "No CUDA device here: `python -m benchmarks gpu_step` measures where one is."
        )
    found: list[Row] = []
    for size, width in (QUICK_WIDTHS if quick else WIDTHS).items():
        print(f"  {size}, {torch.cuda.get_device_name()}", file=sys.stderr, flush=True)
        found += rows(size, _rounds(width, quick=quick))
    note = f"On one {torch.cuda.get_device_name()}; in brackets the step without an average."
    return Section(_TITLE, _RIVAL, tuple(found), note)


def rows(size: str, rounds: Sequence[Round]) -> list[Row]:
    """Our two ways against the rival in host memory, then against the one in GPU memory."""
    added = {arm: [r[arm]["step_s"] - r["none"]["step_s"] for r in rounds] for arm in rounds[0]}
    grown = {arm: [r[arm]["memory"] - r["none"]["memory"] for r in rounds] for arm in rounds[0]}
    plain_ms = statistics.median(r["none"]["step_s"] for r in rounds) * 1e3

    def ours(arm: str) -> str:
        blocked_ms = statistics.median(r[arm]["blocked_s"] for r in rounds) * 1e3
        skipped = statistics.mean(r[arm]["skipped"] for r in rounds)
        return f"{Spread.of(added[arm]).show('ms', 1e3, '+')}; blocked {blocked_ms:.2f} ms; skipped {skipped:.0%}"

    def row(arm: str, rival: str, aim: str, what: str = "") -> Row:
        shown = f"{Spread.of(added[rival]).show('ms', 1e3, '+')} [{plain_ms:.0f} ms]"
        return Row(f"{size}: `{arm}`{what}", ours(arm), shown, Spread.ratio(added[arm], added[rival]), aim)

    ours_mib, rivals_mib = (Spread.of(grown[arm]).show("MiB", 2.0**-20, "+") for arm in ("attach", "V3 on the GPU"))
    return [
        row("attach", "V3 on the CPU", "≤ 0.02, blocked ≤ 1 ms"),
        row("attach, overlap=False", "V3 on the CPU", "none"),
        row("attach", "V3 on the GPU", "none", " against V3 on the GPU"),
        Row(
            f"{size}: GPU memory, `attach` against V3 on the GPU",
            ours_mib,
            rivals_mib,
            Spread.ratio(grown["attach"], grown["V3 on the GPU"]),
            "≤ 64 MiB",
        ),
    ]


def _rounds(width: int, *, quick: bool) -> list[Round]:
    rounds = 1 if quick else 3
    numbers = {"width": width, "batch": 2 if quick else 64, "rounds": rounds, "steps": 3 if quick else 30}
    with serving(_DISK_BYTES) as server:
        command = ["-m", "benchmarks.gpu_trainer", server.zmq]
        command += [part for name, value in numbers.items() for part in (f"--{name}", str(value))]
        with Child("trainer", command, server.folder / "trainer.log") as trainer:
            return [_shown(trainer.first_line(_ROUND_S + START_S)) for _ in range(rounds)]


def _shown(found: Round) -> Round:
    """Print a round as it ends: a machine with a GPU may be lent for minutes only."""
    parts = (f"{arm} {of['step_s'] * 1e3:.1f} ms, blocked {of['blocked_s'] * 1e3:.2f} ms" for arm, of in found.items())
    print("    " + "; ".join(parts), file=sys.stderr, flush=True)
    return found
