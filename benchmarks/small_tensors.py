"""What many small tensors cost, and a small model: in the training thread, in all, and when a run is joined.

Ours: one average of a model of 50,000 tensors of 1 KB, against the same bytes in 100 tensors, and against timm's
arithmetic in process. A model of 60,000 parameters is trained by a loop of pure Python, which hardly gives the
interpreter's lock to other threads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from benchmarks.models import parameter_bytes
from benchmarks.result import Row, Section, Spread, interleaved
from benchmarks.rival import ModelEma
from benchmarks.served import serving
from trainer_client import EmaClient

_STEP_S = 0.3e-3  # of the loop of pure Python
_runs = itertools.count()


def measure(*, quick: bool) -> Section:
    """One average; many tensors first, then the small model."""
    count, snapshots, rounds = (500, 2, 1) if quick else (50_000, 10, 5)
    many, few = _model(count, 256), _model(100, 256 * count // 100)
    small = nn.Sequential(nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, 100))
    name = f"{count:,} tensors of 1 KB"
    with serving(1 << 30) as server:
        with _streaming(server.zmq, many, "wait") as ours, _streaming(server.zmq, few, "wait") as other:
            rival = ModelEma(many)
            one = interleaved(
                rounds,
                ours=lambda: _update_s(ours, many),
                other=lambda: _update_s(other, few),
                rival=lambda: _cpu_s(lambda: rival.update(many)),
            )
            sustained = interleaved(
                rounds,
                ours=lambda: _sustained_s(ours, many, snapshots),
                other=lambda: _sustained_s(other, few, snapshots),
            )
        joined = interleaved(rounds, ours=lambda: _join_s(server.zmq, many), other=lambda: _join_s(server.zmq, few))
        in_process = ModelEma(small)
        with _streaming(server.zmq, small, "skip") as client:
            thread = interleaved(
                rounds,
                ours=lambda: _thread_s(lambda: client.update(small)),
                rival=lambda: _thread_s(lambda: in_process.update(small)),
            )
            shares = interleaved(rounds, ours=lambda: _share(client, small, 0.2 if quick else 3.0), rival=lambda: 1.0)
    return Section(
        "small_tensors: many small tensors, and a small model",
        "rival",
        (
            _row(f"{name}: one `update()`, CPU time", one["ours"], one["other"], "100 tensors", "≤ 1.5"),
            _row(f"{name}: one `update()`, CPU time", one["ours"], one["rival"], "ModelEmaV3 in process", "≤ 1"),
            _row(f"{name}: sustained", sustained["ours"], sustained["other"], "100 tensors", "≤ 1.5"),
            _row(f"{name}: join and first snapshot", joined["ours"], joined["other"], "100 tensors", "≤ 1.5 s"),
            _row(
                "60 k parameters: training thread", thread["ours"], thread["rival"], "ModelEmaV3 in process", "≤ 0.1 ms"
            ),
            Row(
                "60 k parameters, steps of 0.3 ms in pure Python: steps that count",
                Spread.of(shares["ours"]).show("%", scale=100),
                "100 %, in process",
                Spread.ratio(shares["ours"], shares["rival"]),
                "≥ 0.2",
            ),
        ),
        f"{parameter_bytes(many) / 1e6:.0f} MB a snapshot in both forms.",
    )


def _model(count: int, elements: int) -> nn.Module:
    return nn.ParameterList([torch.randn(elements) for _ in range(count)])


def _row(what: str, ours: list[float], rival: list[float], whose: str, aim: str) -> Row:
    shown = [Spread.of(seconds).show("ms", scale=1000) for seconds in (ours, rival)]
    return Row(what, shown[0], f"{shown[1]}, {whose}", Spread.ratio(ours, rival), aim)


@contextmanager
def _streaming(endpoint: str, model: nn.Module, way: Literal["skip", "wait"]) -> Iterator[EmaClient]:
    """A client of a run of its own that is joined; left without publishing."""
    client = EmaClient(endpoint, run=f"small-{next(_runs)}", averages=["ema:0.9999"], when_behind=way)
    try:
        client.update(model)
        _flush(client)
        yield client
    finally:
        client.close()


def _flush(client: EmaClient) -> None:
    if not client.flush():
        raise TimeoutError("the server did not apply what was sent within a minute")


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _update_s(client: EmaClient, model: nn.Module) -> float:
    seconds = _cpu_s(lambda: client.update(model))
    _flush(client)
    return seconds


def _cpu_s(call: Callable[[], object]) -> float:
    """CPU seconds of this process, other threads included."""
    began = time.process_time()
    call()
    return time.process_time() - began


def _sustained_s(client: EmaClient, model: nn.Module, snapshots: int) -> float:
    began = time.perf_counter()
    for _ in range(snapshots):
        client.update(model)
    _flush(client)
    return (time.perf_counter() - began) / snapshots


def _join_s(endpoint: str, model: nn.Module) -> float:
    client = EmaClient(endpoint, run=f"small-{next(_runs)}", averages=["ema:0.9999"])
    try:
        return _seconds(lambda: client.update(model))
    finally:
        client.close()


def _thread_s(call: Callable[[], object]) -> float:
    """CPU seconds of the calling thread, in a loop that leaves the server time for each snapshot."""
    used = 0.0
    for _ in range(200):
        _spin(2e-3)
        began = time.thread_time()
        call()
        used += time.thread_time() - began
    return used / 200


def _share(client: EmaClient, model: nn.Module, seconds: float) -> float:
    """The share of steps that is applied."""
    before, steps, ends = client.stats()["committed"], client.steps, time.monotonic() + seconds
    while time.monotonic() < ends:
        _spin(_STEP_S)
        client.update(model)
    _flush(client)
    return float(client.stats()["committed"] - before) / (client.steps - steps)


def _spin(seconds: float) -> None:
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass
