"""The server's arithmetic without the server: passes over a snapshot, with the server's own memory and blocks.

Rivals are `torch.Tensor.lerp_` over one flat tensor of torch's own memory, and our own pass over one float32 average.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.machine import all_cores
from benchmarks.result import Row, Section, Spread, interleaved
from ema_proto.limits import CHUNK_BYTES_DEFAULT
from ema_proto.manifest import Manifest, Role, TensorSpec
from ema_server.crew import Crew
from ema_server.finite import FiniteCheck
from ema_server.kernel import Target
from ema_server.layout import Form, held_nbytes, segments
from ema_server.memory import allocate
from ema_server.slots import Slot

_ELEMENTS = 86_567_656  # a ViT-B/16
_ELEMENTS_QUICK = 100_000
_WEIGHT = 0.001
_ITEM_BYTES = {"F32": 4, "BF16": 2}


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of each arm, by round."""

    threads: int
    lerp: list[float]
    one: list[float]
    three: list[float]
    half: list[float]
    finite: list[float]


def measure(*, quick: bool) -> Section:
    """With one thread, then with all."""
    elements = _ELEMENTS_QUICK if quick else _ELEMENTS
    rows: list[Row] = []
    before = torch.get_num_threads()
    for threads in sorted({1, len(all_cores())}):
        torch.set_num_threads(threads)
        label = "1 thread" if threads == 1 else f"{threads} threads"
        rows += _rows(f"{elements / 1e6:.3g} M, {label}", elements, _times(elements, threads, rounds=2 if quick else 9))
    torch.set_num_threads(before)
    note = "bf16 is compared by snapshot bytes per second. The finite check reads memory here, cache in the server."
    return Section("kernel: one pass over the averages", "rival", tuple(rows), note)


def _times(elements: int, threads: int, rounds: int) -> _Times:
    crew = Crew(threads)
    average, weights = torch.zeros(elements), torch.randn(elements)
    whole, check = _slot(elements, "F32"), FiniteCheck(_manifest(elements, "F32"))

    def check_chunks() -> None:
        nbytes = len(whole.view)
        for offset in range(0, nbytes, CHUNK_BYTES_DEFAULT):
            check.check(offset, min(CHUNK_BYTES_DEFAULT, nbytes - offset), whole.tensor)

    found = interleaved(
        rounds,
        lerp=_timed(lambda: average.lerp_(weights, _WEIGHT)),
        one=_timed(_pass(crew, whole, _manifest(elements, "F32"), averages=1)),
        three=_timed(_pass(crew, whole, _manifest(elements, "F32"), averages=3)),
        half=_timed(_pass(crew, _slot(elements, "BF16"), _manifest(elements, "BF16"), averages=1)),
        finite=_timed(check_chunks),
    )
    crew.close()
    return _Times(threads, **found)


def _rows(what: str, elements: int, times: _Times) -> list[Row]:
    def row(name: str, ours: list[float], rival: list[float], against: str, aim: str) -> Row:
        shown = f"{Spread.of(rival).show('ms', 1e3)}, {against}"
        return Row(f"{what}: {name}", Spread.of(ours).show("ms", 1e3), shown, Spread.ratio(ours, rival), aim)

    whole_rate = [elements * _ITEM_BYTES["F32"] / second / 1e9 for second in times.one]
    half_rate = [elements * _ITEM_BYTES["BF16"] / second / 1e9 for second in times.half]
    rows = [
        row("one average", times.one, times.lerp, "`lerp_`", "≤ 1.1"),
        row("three averages", times.three, times.one, "one average", "≤ 2.4"),
        Row(
            f"{what}: bf16 input",
            Spread.of(half_rate).show("GB/s"),
            f"{Spread.of(whole_rate).show('GB/s')}, float32 input",
            Spread.ratio(half_rate, whole_rate),
            "≥ 0.7, later 0.95",
        ),
    ]
    if times.threads == 1:  # the server's check has one thread whatever the machine has
        rows.append(row("finite check", times.finite, times.one, "one average", "none"))
    return rows


def _pass(crew: Crew, slot: Slot, manifest: Manifest, averages: int) -> Callable[[], None]:
    memories = [allocate(held_nbytes(manifest, Form.WIDE)) for _ in range(averages)]
    targets = [Target(memory.data, Form.WIDE, _WEIGHT) for memory in memories]
    blocks = segments(manifest)
    return lambda: crew.update(blocks, slot.tensor, targets, None)


def _slot(elements: int, dtype: str) -> Slot:
    slot = Slot(elements * _ITEM_BYTES[dtype])
    slot.tensor.view(torch.float32 if dtype == "F32" else torch.bfloat16).normal_()
    return slot


def _manifest(elements: int, dtype: str) -> Manifest:
    return Manifest((TensorSpec("weight", dtype, (elements,), Role.PARAM, 0),))


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run
