"""Error of averages made from a bfloat16 ring, and the time that synthesis takes.

The weights take a random walk. 32 snapshots of two power averages of it are stored, in float32 and in bfloat16, and the
files are summed as the server does. The exact average of the requested width is computed in float64. An
error is the root mean square of the difference, over that of the exact average.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from benchmarks.result import Row, Section, Spread, interleaved
from ema_proto.averages.profiles import gamma_of
from ema_server.config import RingDtype
from ema_server.derived.combine import combined
from ema_server.derived.plan import Plan, make_plan
from ema_server.derived.store import Piece
from ema_server.publishing.ring_snapshot import RingMember, RingSnapshot
from ema_server.storage.catalog import FileEntry

_KEPT = (0.05, 0.10)
_WANTED = (0.03, 0.04, 0.06, 0.075, 0.12, 0.15, 0.20)
_SNAPSHOTS = 32
_STEP = 0.01  # standard deviation of a step of the walk, which begins at values of deviation 1
_READ_BYTES = 4 << 20


def measure(*, quick: bool) -> Section:
    """A walk of 8,192 steps of 1,024 elements, several times; then a sum over files of 8 million elements."""
    steps, elements, walks = (64, 64, 2) if quick else (8192, 1024, 5)
    found: dict[tuple[float, RingDtype], list[float]] = {}
    plans: dict[float, Plan] = {}
    for seed in range(walks):
        with tempfile.TemporaryDirectory() as folder:
            for (wanted, dtype), (plan, error) in errors(Path(folder), steps, elements, seed).items():
                found.setdefault((wanted, dtype), []).append(error)
                plans[wanted] = plan
    rows = [_row(plans[wanted], wanted, found) for wanted in _WANTED if wanted in plans]
    rows.append(_time(1 << 16 if quick else 8_000_000, rounds=1 if quick else 3))
    title = f"synthesis: of {_SNAPSHOTS} snapshots of power averages {_KEPT[0]} and {_KEPT[1]}, after {steps:,} steps"
    note = "The ratio is what bfloat16 costs; the time is that of the sum beside reading the same files."
    return Section(title, "float32, or reading alone", tuple(rows), note)


def errors(folder: Path, steps: int, elements: int, seed: int) -> dict[tuple[float, RingDtype], tuple[Plan, float]]:
    """How an average of each width is made, and its relative error, by width and the ring's dtype."""
    rings, exact = _walk(folder, steps, elements, seed)
    found = {}
    for dtype, snapshots in rings.items():
        for wanted in _WANTED:
            plan = make_plan(snapshots, gamma_of(wanted), steps)
            made = load(b"".join(_pieces(plan)))["weight"].double()
            right = exact[wanted]
            relative = (made - right).square().mean().sqrt() / right.square().mean().sqrt()
            found[wanted, dtype] = plan, float(relative)
    return found


def _walk(
    folder: Path, steps: int, elements: int, seed: int
) -> tuple[dict[RingDtype, list[RingSnapshot]], dict[float, Tensor]]:
    """The rings that the walk leaves, and the exact averages at its end."""
    torch.manual_seed(seed)
    weight = torch.randn(elements)
    kept = {width: weight.clone() for width in _KEPT}
    exact = {width: weight.double() for width in _WANTED}
    rings: dict[RingDtype, list[RingSnapshot]] = {"float32": [], "bfloat16": []}
    for step in range(1, steps + 1):
        weight += _STEP * torch.randn(elements)
        for held in (kept, exact):
            for width, average in held.items():
                average.lerp_(weight.to(average.dtype), 1 - (1 - 1 / step) ** (gamma_of(width) + 1))
        if step % (steps // _SNAPSHOTS) == 0:
            for dtype, ring in rings.items():
                ring.append(_store(folder / f"{dtype}-{step}", step, dtype, kept))
    return rings, exact


def _store(folder: Path, step: int, dtype: RingDtype, kept: dict[float, Tensor]) -> RingSnapshot:
    folder.mkdir()
    members = []
    for width, average in kept.items():
        path = folder / f"{width}.safetensors"
        save_file({"weight": average.bfloat16() if dtype == "bfloat16" else average}, path)
        data = path.read_bytes()
        file = FileEntry(path.name, len(data), hashlib.sha256(data).hexdigest())
        rule, gamma = f"power:sigma_rel={width}", gamma_of(width)
        members.append(RingMember(path.stem, rule, gamma, f"{step}-{width}", step, 0, 0, 1, file, frozenset()))
    return RingSnapshot(folder, step, dtype, tuple(members))


def _pieces(plan: Plan) -> Iterator[Piece]:
    return combined(plan.terms, plan.newest.member.copied)


def _row(plan: Plan, wanted: float, found: dict[tuple[float, RingDtype], list[float]]) -> Row:
    narrow, wide = found[wanted, "bfloat16"], found[wanted, "float32"]
    what = f"error at {wanted}; profile off by {plan.error:.1e}, rounding amplified {plan.amplification:.1f} times"
    ours, rival = (f"{Spread.of(values).median:.1e}" for values in (narrow, wide))
    return Row(what, f"{ours}, bfloat16", f"{rival}, float32", Spread.ratio(narrow, wide), "none")


def _time(elements: int, rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        average = torch.randn(elements)
        steps = range(100, 100 * _SNAPSHOTS + 1, 100)
        stored = _store(Path(folder) / "ring", 0, "float32", dict.fromkeys(_KEPT, average))
        ring = [replace(stored, step=step) for step in steps]  # the same files, so that they stay in the page cache
        plan = make_plan(ring, gamma_of(0.12), steps[-1])
        paths = [part.snapshot.folder / part.member.file.name for part in plan.parts]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the server's thread
        taken = interleaved(rounds, ours=lambda: _seconds(_pieces(plan)), rival=lambda: _seconds(_reading(paths)))
        torch.set_num_threads(threads)
    nbytes = sum(part.member.file.size for part in plan.parts)
    shown = (f"{nbytes / Spread.of(taken[arm]).median / 1e9:.2f} GB/s" for arm in ("ours", "rival"))
    what = f"sum of {len(paths)} files of {elements * 4 / 1e6:.1f} MB, verified, one thread, from the page cache"
    return Row(what, next(shown), next(shown), Spread.ratio(taken["rival"], taken["ours"]), "none")


def _seconds(pieces: Iterator[object]) -> float:
    started = time.perf_counter()
    deque(pieces, maxlen=0)
    return time.perf_counter() - started


def _reading(paths: list[Path]) -> Iterator[int]:
    buffer = bytearray(_READ_BYTES)
    for path in paths:
        with path.open("rb") as file:
            while count := file.readinto(buffer):
                yield count
