"""Throughput of snapshots into averages through memory that trainer and server share, against two rivals.

Through the server's socket, as between machines; and in the training process, where one call interpolates all tensors
of an average. Ours copies into a slot, checks for NaN and Inf, averages in the other process, and acknowledges; as fast
as `when_behind="wait"` allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.models import QUICK_WIDTHS, WIDTHS, Transformer, parameter_bytes
from benchmarks.result import Row, Section, Spread, interleaved
from benchmarks.rival import ModelEma
from benchmarks.served import serving, streaming

_ONE = ("ema:0.9999",)
_THREE = ("ema:0.9999", "ema:0.999", "ema:0.99")


def measure(*, quick: bool) -> Section:
    """The larger model with one and three averages, and a tiny one."""
    size, width = list((QUICK_WIDTHS if quick else WIDTHS).items())[-1]
    rounds, snapshots = (1, 2) if quick else (7, 10)
    model, tiny = Transformer(width), nn.Sequential(nn.Linear(200, 250), nn.ReLU(), nn.Linear(250, 40))
    with serving(16 * parameter_bytes(model)) as server:
        one = _rates(server.zmq, model, _ONE, rounds, snapshots)
        three = _rates(server.zmq, model, _THREE, rounds, snapshots)
        small = _rates(server.zmq, tiny, _ONE, rounds, 20 if quick else 1000)
    gigabytes = parameter_bytes(model) / 1e9
    rows = (
        _row(f"{size}, one average; rival: our socket", one, "zmq", "GB/s", gigabytes, "≥ 3.4"),
        _row(f"{size}, one average; rival: `_foreach_lerp_`", one, "lerp", "GB/s", gigabytes, "≥ 0.6"),
        _row(f"{size}, three averages; rival: three `_foreach_lerp_`", three, "lerp", "GB/s", gigabytes, "≥ 1"),
        _row("60 k, one average; rival: our socket", small, "zmq", "snapshots/s", 1, "≥ 5"),
    )
    return Section("shared: shared memory, averaging included", "rival", rows)


def _row(what: str, rates: dict[str, list[float]], rival: str, unit: str, scale: float, aim: str) -> Row:
    ours, others = Spread.of(rates["shm"]), Spread.of(rates[rival])
    return Row(what, ours.show(unit, scale), others.show(unit, scale), Spread.ratio(rates["shm"], rates[rival]), aim)


def _rates(
    endpoint: str, model: nn.Module, averages: Sequence[str], rounds: int, snapshots: int
) -> dict[str, list[float]]:
    """Snapshots per second of each arm, in each round."""
    run = f"shared-{parameter_bytes(model)}-{len(averages)}"
    emas = [ModelEma(model) for _ in averages]

    def lerp() -> None:
        for ema in emas:
            ema.update(model)

    with (
        torch.no_grad(),
        streaming(endpoint, f"{run}-shm", "shm", model, averages) as shm,
        streaming(endpoint, f"{run}-zmq", "zmq", model, averages) as zmq,
    ):
        seconds = interleaved(
            rounds,
            shm=lambda: shm(snapshots),
            zmq=lambda: zmq(snapshots),
            lerp=lambda: _timed(lerp, snapshots),
        )
    return {arm: [snapshots / each for each in taken] for arm, taken in seconds.items()}


def _timed(update: Callable[[], None], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        update()
    return time.perf_counter() - started
