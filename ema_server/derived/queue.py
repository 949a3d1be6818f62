"""Makes derived versions, one at a time, in a thread of its own. Comes in: what to make. Goes out: versions.

Nothing of it runs on the averager's or the publisher's thread, or on the event loop: averaging and publishing go on.
"""

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
QUEUE_MAX = 32  # each waits with what it was asked for in memory, and whoever asked waits too

Result = TypeVar("Result")


class NameTaken(Exception):
    """Versions of another kind have the name; the text says which."""


class Busy(Exception):
    """As many versions are being made, or wait for it, as may; the text says how many."""


class Stopped(Exception):
    """The server was asked to stop before the version was made."""


@dataclass(frozen=True, slots=True)
class Synthesized:
    """A version that was made of a ring, or was there already; `facts` are what its `version.json` says of it."""

    version: Version
    facts: dict[str, Any]
    is_new: bool


class Deriving:
    """One thread for derived versions.

    Args:
        store: where they are kept.
        ring: what power averages are made of.
        stopping: set when the server has begun to stop: what is in the making is given up.
    """

    def __init__(self, store: DerivedStore, ring: Ring, stopping: threading.Event) -> None:
        self.store = store
        self.ring = ring
        self._stopping = stopping
        self._room = threading.BoundedSemaphore(QUEUE_MAX)
        self._pool = ThreadPoolExecutor(1, "deriving", initializer=torch.set_num_threads, initargs=(1,))

    def restore(self) -> None:
        """Find what is on the disk.

        Raises:
            OSError: the data folder cannot be read.
        """
        self.ring.restore()
        self.store.restore()

    async def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, called in the thread when it is its turn.

        Raises:
            Busy: too much is waiting already.
            RuntimeError: the thread has ended. Whatever `work` raises goes through.
        """
        if not self._room.acquire(blocking=False):
            raise Busy(f"{QUEUE_MAX} versions are being made or wait for it, the most that may: try again in a while")
        try:
            future = self._pool.submit(work)
        except RuntimeError:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Give up what is in the making, and end the thread."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)

    def pieces(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The same pieces, until the server is asked to stop.

        Raises:
            Stopped: it was.
        """
        for piece in pieces:
            if self._stopping.is_set():
                raise Stopped("the server has been asked to stop")
            yield piece

    def synthesize(self, run: str, rule: PowerEma, step: int | None) -> Synthesized:
        """Make a power average of a ring's snapshots; what was made before for the same step is not made again.

        Args:
            run: its name.
            rule: the average to make, with the name to list it under.
            step: of the trainer; None is that of the newest snapshot.

        Raises:
            CannotSynthesize: the ring does not suffice; the text says what to do.
            NameTaken: the name belongs to versions that answer another request.
            BrokenGeneration, BadModelFile: what is stored is not what was written.
            OSError: the disk refuses.
            VersionGone: the run was set aside meanwhile.
            Stopped: the server was asked to stop.
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
            what = _derivation(run, rule, plan)
            version = self.store.write(what, self.pieces(combined(plan)), plan.newest.snapshot.config)
            return Synthesized(version, self.store.provenance(version), is_new=True)

    def _known(self, run: str, rule: PowerEma, step: int) -> Version | None:
        """A version that answers the same request, unless the run has gone back before its step since."""
        versions = self.store.catalog.versions(run, rule.name)
        for version in versions:
            asked = self.store.provenance(version).get("asked") if version.derived == SYNTHESIZED else None
            if asked != rule.spec:
                other = asked or version.spec
                raise NameTaken(f"{rule.name!r} of run {run!r} is {other} already, not {rule.spec}: use another name")
        return next((one for one in versions if one.step == step and not self.store.is_superseded(one)), None)


_NO_RING = (
    "there are no stored power averages to make it of: begin the run with at least two, for example "
    "averages=['power:sigma_rel=0.05', 'power:sigma_rel=0.1'], and let it publish (--ring-every-steps says how often "
    "some are stored, --ring-size how many)"
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
    """The rule with the treatment of tensors that the stored averages have: the sum inherits it."""
    kept = parse_average(stored)
    if isinstance(kept, Raw):
        return rule
    return replace(rule, buffers=kept.buffers, include=kept.include, exclude=kept.exclude)
