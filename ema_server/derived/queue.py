"""The thread that makes derived versions, one at a time, while averaging and publishing go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from ema_proto.averages.rules import PowerEma, Raw
from ema_proto.averages.specs import parse_average
from ema_server.derived.combine import combined
from ema_server.derived.plan import CannotSynthesize, Plan, make_plan
from ema_server.derived.store import Derivation, DerivedStore, Piece
from ema_server.publishing.ring import Ring
from ema_server.storage.catalog import Version

SYNTHESIZED = "synthesized"
QUEUE_MAX = 32  # each request waits with its body in memory

Result = TypeVar("Result")


class NameTaken(Exception):
    """The name belongs to other versions; the text says which."""


class Busy(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The server began to stop before the version was made."""


@dataclass(frozen=True, slots=True)
class Synthesized:
    """A version made from a ring, now or earlier; `facts` is `derived` of its `version.json`."""

    version: Version
    facts: dict[str, Any]
    is_new: bool


class DerivationQueue:
    """One thread for derived versions. Once `stopping` is set, unfinished ones are abandoned."""

    def __init__(self, store: DerivedStore, ring: Ring, stopping: threading.Event) -> None:
        self.store = store
        self.ring = ring
        self._stopping = stopping
        self._free = threading.BoundedSemaphore(QUEUE_MAX)
        self._pool = ThreadPoolExecutor(1, "deriving", initializer=torch.set_num_threads, initargs=(1,))
        self._worker = self._pool.submit(threading.current_thread).result()

    def restore(self) -> None:
        """List what is on disk.

        Raises:
            OSError: the data folder cannot be read.
        """
        self.ring.restore()
        self.store.restore()

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the thread and return its result.

        Raises:
            Busy: the queue is full.
            RuntimeError: the thread has ended. Exceptions of `work` propagate.
        """
        if not self._free.acquire(blocking=False):
            raise Busy(f"{QUEUE_MAX} versions are being made or waiting, the maximum: try again later")
        try:
            future = self._pool.submit(work)
        except RuntimeError:
            self._free.release()
            raise
        future.add_done_callback(lambda _: self._free.release())
        return await asyncio.wrap_future(future)

    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._worker.is_alive()

    def stop(self) -> None:
        """Abandon unfinished versions and end the thread."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)

    def pieces(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The same pieces, until the server begins to stop.

        Raises:
            Stopped: it has begun to stop.
        """
        for piece in pieces:
            if self._stopping.is_set():
                raise Stopped("the server is stopping")
            yield piece

    def synthesize(self, run: str, rule: PowerEma, step: int | None) -> Synthesized:
        """Make a power average from a ring's snapshots, or return the version made earlier for the same step.

        Args:
            run: the run.
            rule: the average to make, with the name to list it under.
            step: the step; None for that of the newest snapshot.

        Raises:
            CannotSynthesize: the ring cannot provide it; the text says what to do.
            NameTaken: the name belongs to other versions.
            BrokenGeneration, BadModelFile: a stored file is damaged.
            OSError: the disk fails.
            VersionGone: the run was set aside meanwhile.
            Stopped: the server began to stop.
        """
        with self.ring.reading(run):
            snapshots = self.ring.snapshots(run)
            if not snapshots:
                raise CannotSynthesize(_NO_RING)
            at = snapshots[-1].step if step is None else step
            known = self._known(run, rule, at)
            if known is not None:
                return Synthesized(known, self.store.provenance(known), is_new=False)
            plan = make_plan(snapshots, rule.exponent, at)
            what, newest = _derivation(run, rule, plan), plan.newest.snapshot
            pieces = self.pieces(combined(plan.terms, plan.newest.member.copied))
            version = self.store.write(what, pieces, newest.config, newest.companions)
            return Synthesized(version, self.store.provenance(version), is_new=True)

    def _known(self, run: str, rule: PowerEma, step: int) -> Version | None:
        """The version made earlier for the same request, unless the run was rewound to before its step since."""
        versions = self.store.catalog.versions(run, rule.name)
        for version in versions:
            asked = self.store.provenance(version).get("asked") if version.derived == SYNTHESIZED else None
            if asked != rule.spec:
                other = asked or version.derived or version.spec
                raise NameTaken(f"{rule.name!r} of run {run!r} is already {other}, not {rule.spec}: use another name")
        return next((one for one in versions if one.step == step and not self.store.is_superseded(one)), None)


_NO_RING = (
    "no power averages are stored to make it from: begin the run with at least two, for example "
    "averages=['power:sigma_rel=0.05', 'power:sigma_rel=0.1'], and let it publish (--ring-every-steps sets how often "
    "they are stored, --ring-size how many)"
)


def _derivation(run: str, rule: PowerEma, plan: Plan) -> Derivation:
    member = plan.newest.member
    parts = [
        {"average": part.member.average, "step": part.snapshot.step, "id": part.member.version, "share": part.share}
        for part in plan.parts
    ]
    return Derivation(
        run=run,
        average=rule.name,
        spec=_treated(rule, member.spec).spec,
        step=plan.step,
        updates=member.updates,
        gap_steps=member.gap_steps,
        kind=SYNTHESIZED,
        provenance={
            "asked": rule.spec,
            "sigma_rel": rule.width,
            "gamma": rule.exponent,
            "origin": plan.origin,
            "estimated_error": plan.error,
            "amplification": plan.amplification,
            "rounding": plan.rounding,
            "warning": plan.warning,
            "buffers_from": {"average": member.average, "step": plan.newest.snapshot.step, "id": member.version},
            "inputs": parts,
        },
    )


def _treated(rule: PowerEma, stored: str) -> PowerEma:
    """The rule with the `buffers`, `include` and `exclude` of the stored averages."""
    kept = parse_average(stored)
    if isinstance(kept, Raw):
        return rule
    return replace(rule, buffers=kept.buffers, include=kept.include, exclude=kept.exclude)
