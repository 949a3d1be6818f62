"""Shards from 2 and 4 ranks into one average, against one sender of the same bytes that is not sharded.

Measured are the throughput, and which steps count where the trainer is twice as fast as the path to the server.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from benchmarks import sharded_sender
from benchmarks.models import QUICK_WIDTHS, WIDTHS, Transformer, parameter_bytes
from benchmarks.result import Row, Section, Spread, interleaved
from benchmarks.served import START_S, Server, serving
from benchmarks.sharded_sender import Boxes, Order, Report, Sender

_ORDER_S = 120.0
_DISK_BYTES = 2 << 30
_TRAININGS: dict[str, tuple[int, Boxes]] = {
    "one sender": (1, "rows"),
    "2 ranks, rows": (2, "rows"),
    "2 ranks, columns": (2, "columns"),
    "4 ranks, rows": (4, "rows"),
    "4 ranks, columns": (4, "columns"),
}
_NOTE = (
    "*Behind*: a step takes half the time that one sender needs for a snapshot, and the clients skip. The ratio there "
    "is that of the steps that count."
)
_RIVAL, *_SHARDED = _TRAININGS


class Ranks:
    """The ranks of one training, each in a process of its own."""

    def __init__(self, server: Server, name: str, width: int) -> None:
        world, boxes = _TRAININGS[name]
        run = name.replace(", ", "-").replace(" ", "-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([sharded_sender.__name__])
        self._pipes, self._processes = [], []
        for rank in range(world):
            sender = Sender(server.zmq, run, width, rank, world, boxes, server.folder / f"{run}.store")
            ours, theirs = context.Pipe()
            process = context.Process(target=sharded_sender.main, args=(sender, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(START_S)

    def follow(self, order: Order) -> list[Report]:
        """What each rank reports."""
        for pipe in self._pipes:
            pipe.send(order)
        return self._answers(_ORDER_S)

    def close(self) -> None:
        """Have the processes end."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(START_S)

    def _answers(self, timeout_s: float) -> list[Report]:
        for pipe in self._pipes:
            if not pipe.poll(timeout_s):
                raise TimeoutError(f"a rank has not answered within {timeout_s:g} s")
        return [pipe.recv() for pipe in self._pipes]


def measure(*, quick: bool) -> Section:
    """The smaller model: the boxes of its columns have short rows, 384 bytes with 4 ranks."""
    size, width = next(iter((QUICK_WIDTHS if quick else WIDTHS).items()))
    nbytes = parameter_bytes(Transformer(width))
    rounds, snapshots, steps = (1, 2, 5) if quick else (5, 6, 40)
    with serving(_DISK_BYTES) as server, _trainings(server, width) as trainings:
        print(f"  throughput of {size}", file=sys.stderr, flush=True)
        arms = {name: partial(_seconds, ranks, snapshots) for name, ranks in trainings.items()}
        seconds = interleaved(rounds, **arms)
        print("  steps that count", file=sys.stderr, flush=True)
        step_s = statistics.median(seconds[_RIVAL]) / snapshots / 2
        behind = _in_turn(trainings, Order("skip", steps, step_s), 1 if quick else 3)
    return Section(
        "sharded: the shards of several ranks, over tcp",
        "one sender, not sharded",
        (*_throughput(size, nbytes * snapshots, seconds), *_behind(behind, steps)),
        _NOTE,
    )


@contextmanager
def _trainings(server: Server, width: int) -> Iterator[dict[str, Ranks]]:
    with ExitStack() as stack:
        trainings = {}
        for name in _TRAININGS:
            trainings[name] = ranks = Ranks(server, name, width)
            stack.callback(ranks.close)
        yield trainings


def _in_turn(trainings: dict[str, Ranks], order: Order, rounds: int) -> dict[str, list[list[Report]]]:
    reports: dict[str, list[list[Report]]] = {name: [] for name in trainings}
    for _ in range(rounds):
        for name, ranks in trainings.items():
            reports[name].append(ranks.follow(order))
    return reports


def _seconds(ranks: Ranks, snapshots: int) -> float:
    reports = ranks.follow(Order("wait", snapshots))
    if any(report.skipped or report.dropped for report in reports):
        raise RuntimeError(f"not all snapshots were applied: {reports}")
    return max(report.seconds for report in reports)


def _throughput(size: str, nbytes: int, seconds: dict[str, list[float]]) -> Iterator[Row]:
    rates = {name: [nbytes / second / 1e9 for second in taken] for name, taken in seconds.items()}
    for name in _SHARDED:
        ours, rival = (Spread.of(rates[each]).show("GB/s") for each in (name, _RIVAL))
        yield Row(f"{size}, float32: {name}", ours, rival, Spread.ratio(rates[name], rates[_RIVAL]), "≥ 0.85")


def _counted(steps: int, reports: list[Report]) -> int:
    """Steps that count: of all ranks, the one that lost most has lost each step that is lost."""
    return steps - max(report.skipped + report.dropped for report in reports)


def _behind(orders: dict[str, list[list[Report]]], steps: int) -> Iterator[Row]:
    counted = {name: [_counted(steps, reports) / steps for reports in turns] for name, turns in orders.items()}
    for name in _SHARDED:
        dropped = [max(report.dropped for report in reports) / steps for reports in orders[name]]
        ours = f"{Spread.of(dropped).show('%', 100)} dropped; {statistics.median(counted[name]):.0%} count"
        rival = f"{statistics.median(counted[_RIVAL]):.0%} count"
        ratio = Spread.ratio(counted[name], counted[_RIVAL])
        yield Row(f"server behind: {name}", ours, rival, ratio, "dropped ≤ 2 %")
