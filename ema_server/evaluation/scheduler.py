"""Who evaluates what: which versions are due, who asks for work, which versions must stay meanwhile.

Comes in: asks of workers and wishes for validations; goes out: leases and results. Knows the catalog and the lease
store, nothing of HTTP. All of it runs on the event loop, but for `_is_needed` and `_exists`, which other threads call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from ema_server.evaluation.lease_store import LeaseStore
from ema_server.evaluation.leases import Ask, Finding, Grant, Lease, Validation
from ema_server.evaluation.metric_store import MetricStore, Report, Subject
from ema_server.runs.status_store import RunState, StatusStore
from ema_server.storage.catalog import Catalog, Version

REQUEST_HOLD_S = 600.0  # how long a version that someone asked about waits for a worker before it may be pruned
_LATE_S = 10.0  # a worker that asks this much later than it said is still there


class Validations:
    """Grants leases and answers requests for validations.

    Args:
        catalog: which versions there are; it keeps those that are needed here.
        statuses: which runs are finished.
        metrics: the store that has the results.
        clock: seconds since the epoch. Workers' clocks count for nothing.

    Raises:
        MetricStoreError: the leases could not be read.
    """

    def __init__(
        self, catalog: Catalog, statuses: StatusStore, metrics: MetricStore, clock: Callable[[], float] = time.time
    ) -> None:
        self._catalog = catalog
        self._board = statuses
        self._store = LeaseStore(metrics)
        self._clock = clock
        self._needed_until: dict[tuple[str, str], float] = {}  # by version and task
        self._present_until: dict[Ask, float] = {}
        self._asks: dict[str, Ask] = {}  # by lease
        for lease in self._store.live(clock()).result():
            self._keep(lease)
        catalog.guard(self._is_needed)
        catalog.listen(self._store.rename)

    async def ask(self, ask: Ask, *, every: int, skip: frozenset[str], poll_s: float) -> Grant:
        """A worker asks for a version.

        Args:
            ask: what it would take.
            every: of the versions that nobody asked about, take those of each so-manieth generation, and the last ones.
            skip: ids of versions not to give unless someone asked about them: the worker has failed on them.
            poll_s: when it asks again.

        Raises:
            MetricStoreError: the leases could not be read or written; so for all below.
        """
        self._present_until[ask] = self._clock() + 2 * poll_s + _LATE_S
        due = [item for item in self._due(ask, every) if item.version not in skip]
        grant = await asyncio.wrap_future(self._store.grant(ask, due, self._exists, self._clock()))
        if grant.lease is not None:
            self._asks[grant.lease.id] = ask
            self._present_until[ask] = grant.lease.expires + _LATE_S
            self._keep(grant.lease)
        return grant

    async def beat(self, lease_id: str) -> Lease | None:
        """Extend a lease; None when it is lost."""
        lease = await asyncio.wrap_future(self._store.beat(lease_id, self._clock()))
        if lease is None:
            self._asks.pop(lease_id, None)
            return None
        self._keep(lease)
        if lease_id in self._asks:
            self._present_until[self._asks[lease_id]] = lease.expires + _LATE_S
        return lease

    async def settle(self, lease_id: str, finding: Finding) -> tuple[Report, bool] | None:
        """End a lease by its result; the report and whether it is new, None when the lease is lost."""
        settled = await asyncio.wrap_future(self._store.settle(lease_id, finding, self._clock()))
        self._asks.pop(lease_id, None)
        if settled is not None:
            self._needed_until.pop((settled[0].subject.version, settled[0].task), None)
        return settled

    async def give_back(self, lease_id: str) -> None:
        """The worker cannot go on with it; others may have it."""
        ask = self._asks.pop(lease_id, None)
        if ask is not None and ask not in self._asks.values():  # two workers may have the same name and wishes
            self._present_until.pop(ask, None)
        await asyncio.wrap_future(self._store.give_back(lease_id))

    def abandon(self, worker: str) -> None:
        """A worker is known to be dead: others may have what it had. Does not wait."""
        for ask in [ask for ask in self._present_until if ask.worker == worker]:
            del self._present_until[ask]
        self._store.abandon(worker)

    async def request(self, version: Version, task: str, *, again: bool, possible: bool) -> Validation | None:
        """Someone asks for a validation; None when it is not done already and not `possible`."""
        now = self._clock()
        subject = Subject(version.run, version.average, version.id, version.step)
        found = await asyncio.wrap_future(self._store.request(subject, task, now, again=again, possible=possible))
        if found is not None and found.finding is None:
            self._need(version.id, task, now + REQUEST_HOLD_S)
        return found

    async def find(self, run: str, validation_id: str) -> Validation | None:
        """A validation as it stands."""
        return await asyncio.wrap_future(self._store.find(run, validation_id, self._clock()))

    def has_worker(self, run: str, average: str, task: str) -> bool:
        """Whether a worker that would take such a version has asked lately, or is at work."""
        return any(ask.covers(run, average, task) for ask in self._present())

    def tasks(self) -> tuple[str, ...]:
        """The tasks of the workers that have asked lately, sorted."""
        return tuple(sorted({ask.task for ask in self._present()}))

    def _present(self) -> list[Ask]:
        now = self._clock()
        for ask in [ask for ask, until in self._present_until.items() if until < now]:
            del self._present_until[ask]
        return list(self._present_until)

    def _due(self, ask: Ask, every: int) -> Iterable[Subject]:
        for run in self._current_runs() if ask.run is None else (ask.run,):
            status = self._board.get(run)
            finished = status is not None and status.state is RunState.FINISHED
            names = (*self._catalog.averages(run), *self._catalog.derived_averages(run))
            for average in ask.averages or names:
                versions = self._catalog.versions(run, average)
                ends = versions[:1] if finished else ()
                taken = (item for item in versions if item.derived or (item.seq - 1) % every == 0 or item in ends)
                for version in list(taken)[:1]:
                    yield Subject(run, average, version.id, version.step)

    def _current_runs(self) -> tuple[str, ...]:
        """The runs of this server's time: the models of older ones may be others than a worker for all runs knows."""
        return tuple(status.run for status in self._board.all() if status.is_current)

    def _exists(self, subject: Subject) -> bool:
        return self._catalog.find(subject.run, subject.average, subject.version) is not None

    def _keep(self, lease: Lease) -> None:
        self._need(lease.subject.version, lease.task, lease.expires)

    def _need(self, version: str, task: str, until: float) -> None:
        now = self._clock()
        for key in [key for key, end in self._needed_until.items() if end < now]:
            del self._needed_until[key]
        self._needed_until[version, task] = max(until, self._needed_until.get((version, task), 0.0))

    def _is_needed(self, version: Version) -> bool:
        now, needed = self._clock(), tuple(self._needed_until.items())
        return any(name == version.id and until > now for (name, _), until in needed)
