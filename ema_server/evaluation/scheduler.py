"""Schedules evaluations: which versions are due, which workers ask, which versions must stay meanwhile.

The unit is a set: the versions of all averages at one step. A set that was begun is completed before another one
begins, and then the newest set begins. So an evaluation that is slower than publishing skips steps, never averages,
and every result has that of `raw` at the same step beside it.

Everything runs on the event loop, except `_is_needed` and `_exists`, which other threads call.
"""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Concatenate, ParamSpec, TypeVar

from ema_server.evaluation import lease_queries
from ema_server.evaluation.leases import Ask, Due, Finding, Grant, Lease, Validation
from ema_server.evaluation.metric_store import MetricStore, Report, Subject, log_failure
from ema_server.runs.status_store import RunState, StatusStore
from ema_server.storage.catalog import Catalog, Version

REQUEST_HOLD_S = 600.0  # how long a requested version waits for a worker before it may be pruned
_LATE_S = 10.0  # a worker that asks this much later than it said is still present
Args = ParamSpec("Args")
Result = TypeVar("Result")


class Validations:
    """Grants leases and answers requests for validations.

    Args:
        catalog: the versions; it keeps those that are needed here.
        statuses: the states of the runs.
        metrics: the database of leases and results.
        clock: seconds since the epoch. Workers' clocks are not used.

    Raises:
        MetricStoreError: the leases could not be read.
    """

    def __init__(
        self, catalog: Catalog, statuses: StatusStore, metrics: MetricStore, clock: Callable[[], float] = time.time
    ) -> None:
        self._catalog = catalog
        self._statuses = statuses
        self._metrics = metrics
        self._clock = clock
        self._needed_until: dict[tuple[str, str], float] = {}  # by version and task
        self._present_until: dict[Ask, float] = {}
        self._asks: dict[str, Ask] = {}  # by lease
        self._granted: dict[str, int] = {}  # by run: the number of its last grant
        self._grants = itertools.count(1)
        metrics.submit(lambda db: db.executescript(lease_queries.SCHEMA)).result()
        for lease in metrics.submit(lease_queries.live, clock()).result():
            self._keep(lease)
        catalog.guard(self._is_needed)
        catalog.listen(self._rename)

    async def ask(self, ask: Ask, *, every: int, skip: frozenset[str], poll_s: float) -> Grant:
        """A worker asks for a version.

        Args:
            ask: what it accepts.
            every: of the versions that were not requested, give those of every Nth generation, and the last ones.
            skip: ids of versions to give only if they were requested: the worker has failed on them.
            poll_s: when it asks again.

        Raises:
            MetricStoreError: the leases could not be read or written; so for every method below.
        """
        self._present_until[ask] = self._clock() + 2 * poll_s + _LATE_S
        due = self._due(ask, every, skip)
        grant = await self._query(lease_queries.grant, ask, due, self._exists, self._clock())
        if grant.lease is not None:
            self._asks[grant.lease.id] = ask
            self._granted[grant.lease.subject.run] = next(self._grants)
            self._present_until[ask] = grant.lease.expires + _LATE_S
            self._keep(grant.lease)
        return grant

    async def beat(self, lease_id: str) -> Lease | None:
        """Extend a lease; None if it is lost."""
        lease = await self._query(lease_queries.beat, lease_id, self._clock())
        if lease is None:
            self._asks.pop(lease_id, None)
            return None
        self._keep(lease)
        if lease_id in self._asks:
            self._present_until[self._asks[lease_id]] = lease.expires + _LATE_S
        return lease

    async def settle(self, lease_id: str, finding: Finding) -> tuple[Report, bool] | None:
        """End a lease by its result; the report and whether it is new, None if the lease is lost."""
        settled = await self._query(lease_queries.settle, lease_id, finding, self._clock())
        self._asks.pop(lease_id, None)
        if settled is None:
            return None
        report, first, has_rest = settled
        if not has_rest:  # else its hold, until the lease would expire, keeps the generation and so the rest of the set
            self._needed_until.pop((report.subject.version, report.task), None)
        return report, first

    async def give_back(self, lease_id: str) -> None:
        """End a lease without a result: other workers may have its version at once."""
        ask = self._asks.pop(lease_id, None)
        if ask is not None and ask not in self._asks.values():  # two workers may ask for the same under one name
            self._present_until.pop(ask, None)
        await self._query(lease_queries.give_back, lease_id)

    def abandon(self, worker: str) -> None:
        """End the leases of a worker that is known to be dead. Does not wait."""
        for ask in [ask for ask in self._present_until if ask.worker == worker]:
            del self._present_until[ask]
        self._metrics.submit(lease_queries.abandon, worker).add_done_callback(log_failure)

    async def request(self, version: Version, task: str, *, again: bool, possible: bool) -> Validation | None:
        """Ask for a validation; None if it is not done already and not `possible`."""
        now = self._clock()
        found = await self._query(lease_queries.request, subject_of(version), task, now, again=again, possible=possible)
        if found is not None and found.finding is None:
            self._need(version.id, task, now + REQUEST_HOLD_S)
        return found

    async def find(self, run: str, validation_id: str) -> Validation | None:
        """A validation of a run, None if there is none of this id."""
        return await self._query(lease_queries.find, run, validation_id, self._clock())

    def has_worker(self, subject: Subject, task: str) -> bool:
        """Whether a worker that accepts this version has asked recently, or evaluates one."""
        return any(ask.covers(subject, task) for ask in self._present())

    def tasks(self) -> tuple[str, ...]:
        """The tasks of the workers that have asked recently, sorted."""
        return tuple(sorted({ask.task for ask in self._present()}))

    def delete(self, run: str) -> Future[None]:
        """Delete the leases, validations and reports of a run that was deleted. Does not wait."""
        return self._metrics.submit(lease_queries.delete_run, run)

    async def _query(
        self, query: Callable[Concatenate[sqlite3.Connection, Args], Result], *args: Args.args, **kwargs: Args.kwargs
    ) -> Result:
        return await asyncio.wrap_future(self._metrics.submit(query, *args, **kwargs))

    def _rename(self, run: str, new_run: str) -> None:
        self._metrics.submit(lease_queries.rename, run, new_run).add_done_callback(log_failure)

    def _present(self) -> list[Ask]:
        now = self._clock()
        for ask in [ask for ask, until in self._present_until.items() if until < now]:
            del self._present_until[ask]
        return list(self._present_until)

    def _due(self, ask: Ask, every: int, skip: frozenset[str]) -> Due:
        """The newest set of each run, first that of the run of which a version was given longest ago.

        Derived versions come before them, one by one: new sets keep coming while a run streams. Of a worker that asks
        for one version, that one alone.
        """
        if ask.run is not None and ask.version is not None:
            found = (self._catalog.find(ask.run, average, ask.version) for average in ask.averages)
            return Due((ask.run,), skip, tuple((subject_of(version),) for version in found if version is not None))
        runs = self._current_runs() if ask.run is None else (ask.run,)
        derived, sets = [], []
        for run in sorted(runs, key=lambda run: self._granted.get(run, 0)):
            newest = [version for version in self._newest(run, ask, every) if version.id not in skip]
            derived += [(subject_of(version),) for version in newest if version.derived]
            sets.append(tuple(subject_of(version) for version in newest if not version.derived))
        return Due(runs, skip, (*derived, *sets))

    def _newest(self, run: str, ask: Ask, every: int) -> Iterator[Version]:
        """The newest version of each average of a run that is to be evaluated."""
        status = self._statuses.get(run)
        finished = status is not None and status.state is RunState.FINISHED
        names = (*self._catalog.averages(run), *self._catalog.derived_averages(run))
        for average in ask.averages or names:
            versions = self._catalog.versions(run, average)
            ends = versions[:1] if finished else ()
            taken = (item for item in versions if item.derived or (item.seq - 1) % every == 0 or item in ends)
            yield from itertools.islice(taken, 1)

    def _current_runs(self) -> tuple[str, ...]:
        """The runs that had a trainer since the server started: workers for all runs may not know older models."""
        return tuple(status.run for status in self._statuses.all() if status.is_current)

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


def subject_of(version: Version) -> Subject:
    """A version as reports name it."""
    return Subject(version.run, version.average, version.id, version.step)
