"""The server's arithmetic alone: passes over a snapshot, with the server's memory and block sizes.

Rivals are `torch.Tensor.lerp_` over one flat tensor of torch's own memory, and our own pass over one float32 average.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from benchmarks.machine import all_cores
from benchmarks.result import Row, Section, Spread, interleaved
from ema_proto.limits import CHUNK_BYTES_DEFAULT
from ema_proto.wire.manifest import Manifest, Role, TensorSpec
from ema_server.compute.arithmetic import Arithmetic, ByTorch
from ema_server.compute.kernel import Move, Target
from ema_server.compute.memory import allocate
from ema_server.compute.pool import WorkerPool
from ema_server.compute.select import KernelUnavailableError, choose
from ema_server.ingest.staging import Slot
from ema_server.tensors.finite import FiniteCheck
from ema_server.tensors.layout import Form, segments

_ELEMENTS = 86_567_656  # a ViT-B/16
_ELEMENTS_QUICK = 100_000
_WEIGHT = 0.001
_ITEM_BYTES = {"F32": 4, "BF16": 2}
_MOVED_BYTES = {"F32": 4 + 4 + 4, "BF16": 2 + 4 + 4}  # per element: weights read, average read and written
_ARMS = ("one", "three", "half")

Seconds = dict[str, list[float]]
"""Of each arm, by round."""


def measure(*, quick: bool) -> Section:
    """Each kernel with one thread, then with all."""
    elements = _ELEMENTS_QUICK if quick else _ELEMENTS
    kernels, rows = arithmetics(), list[Row]()
    before = torch.get_num_threads()
    for threads in sorted({1, len(all_cores())}):
        torch.set_num_threads(threads)
        what = f"{elements / 1e6:.3g} M, {threads} {'thread' if threads == 1 else 'threads'}"
        seconds = _seconds(elements, threads, kernels, rounds=2 if quick else 9)
        for kernel in kernels:
            rows += _rows(f"{what}, {kernel.name}", elements, seconds, kernel.name)
            if f"{kernel.name} move one" in seconds:
                rows += _checked_rows(f"{what}, {kernel.name}", seconds, kernel.name)
        if threads == 1:  # the server's check of chunks always has one thread
            rows.append(_row(f"{what}: finite check", seconds["finite"], seconds["torch one"], "one average", "none"))
    torch.set_num_threads(before)
    note = "bf16 is compared by bytes moved per second. The finite check reads memory here, cache in the server."
    if len(kernels) == 1:
        note += " **Without the compiled kernel: numba is not installed.**"
    return Section("kernel: one pass over the averages", "rival", tuple(rows), note)


def arithmetics() -> tuple[Arithmetic, ...]:
    """Torch's, and the compiled one where it is available."""
    try:
        return ByTorch(), choose("compiled", torch.device("cpu"))
    except KernelUnavailableError:
        return (ByTorch(),)


def _seconds(elements: int, threads: int, kernels: Sequence[Arithmetic], rounds: int) -> Seconds:
    average, weights = torch.zeros(elements), torch.randn(elements)
    slots = {dtype: _slot(elements, dtype) for dtype in _ITEM_BYTES}
    averages = [allocate(4 * elements).data for _ in range(3)]
    arms = {"lerp": _timed(lambda: average.lerp_(weights, _WEIGHT)), "finite": _timed(_checks(elements, slots["F32"]))}
    with ExitStack() as stack:
        for kernel in kernels:
            pool = WorkerPool(threads, arithmetic=kernel)
            stack.callback(pool.close)
            for arm, dtype, number in zip(_ARMS, ("F32", "F32", "BF16"), (1, 3, 1), strict=True):
                arms[f"{kernel.name} {arm}"] = _timed(_pass(pool, elements, dtype, slots[dtype], averages[:number]))
                if pool.can_move and dtype == "F32":
                    arms[f"{kernel.name} move {arm}"] = _timed(_move(pool, elements, slots[dtype], averages[:number]))
            if pool.can_move:
                check = FiniteCheck(_manifest(elements, "F32"))
                arms[f"{kernel.name} check"] = _timed(partial(pool.not_finite, check, slots["F32"].tensor))
        return interleaved(rounds, **arms)


def _rows(what: str, elements: int, seconds: Seconds, kernel: str) -> list[Row]:
    one, three, half = (seconds[f"{kernel} {arm}"] for arm in _ARMS)
    whole_rate = [elements * _MOVED_BYTES["F32"] / second / 1e9 for second in one]
    half_rate = [elements * _MOVED_BYTES["BF16"] / second / 1e9 for second in half]
    return [
        _row(f"{what}: one average", one, seconds["lerp"], "`lerp_`", "≤ 1.1"),
        _row(f"{what}: three averages", three, one, "one average", "≤ 2.4"),
        Row(
            f"{what}: bf16 input",
            Spread.of(half_rate).show("GB/s"),
            f"{Spread.of(whole_rate).show('GB/s')}, float32 input",
            Spread.ratio(half_rate, whole_rate),
            "≥ 0.7, better 0.95",
        ),
    ]


def _checked_rows(what: str, seconds: Seconds, kernel: str) -> list[Row]:
    """A pass that checks the snapshot as it reads it, against a pass that does not, and a check before such a pass."""
    rows = list[Row]()
    for number in ("one", "three"):
        checked, plain, check = (seconds[f"{kernel} {arm}"] for arm in (f"move {number}", number, "check"))
        both = [first + then for first, then in zip(check, plain, strict=True)]
        rows.append(_row(f"{what}: {number}, checked in the pass", checked, plain, "not checked", "≤ 1.1"))
        rows.append(_row(f"{what}: {number}, checked in the pass", checked, both, "checked before", "< 1"))
    return rows


def _row(name: str, ours: list[float], rival: list[float], against: str, aim: str) -> Row:
    shown = f"{Spread.of(rival).show('ms', 1e3)}, {against}"
    return Row(name, Spread.of(ours).show("ms", 1e3), shown, Spread.ratio(ours, rival), aim)


def _pass(
    pool: WorkerPool, elements: int, dtype: str, slot: Slot, averages: Sequence[torch.Tensor]
) -> Callable[[], None]:
    targets = [Target(average, Form.WIDE, _WEIGHT) for average in averages]
    blocks = segments(_manifest(elements, dtype), lambda _: -1)
    return lambda: pool.update(blocks, slot.tensor, targets, None)


def _move(pool: WorkerPool, elements: int, slot: Slot, averages: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A pass that checks, and writes the averages elsewhere; each pass begins where the one before it ended."""
    manifest = _manifest(elements, "F32")
    blocks, check = segments(manifest, lambda _: -1), FiniteCheck(manifest)
    places = [(average, allocate(4 * elements).data) for average in averages]

    def work() -> None:
        moves = [Move(Target(old, Form.WIDE, _WEIGHT), new) for old, new in places]
        pool.move(blocks, slot.tensor, moves, check, None)
        places[:] = [(new, old) for old, new in places]

    return work


def _checks(elements: int, slot: Slot) -> Callable[[], None]:
    """The finite check of a whole snapshot, chunk by chunk."""
    check, nbytes = FiniteCheck(_manifest(elements, "F32")), len(slot.view)

    def work() -> None:
        for offset in range(0, nbytes, CHUNK_BYTES_DEFAULT):
            check.check(offset, slot.tensor[offset : offset + CHUNK_BYTES_DEFAULT])

    return work


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
