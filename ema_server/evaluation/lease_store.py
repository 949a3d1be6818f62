"""Leases and requested validations, in the metrics' database. Comes in: asks, results, times; goes out: futures.

Every decision is one transaction on the metric store's thread. Which versions exist, and who asks, is known elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from ema_server.evaluation import lease_rows
from ema_server.evaluation.leases import Ask, Finding, Grant, Lease, Validation
from ema_server.evaluation.metric_store import MetricStore, Report, Subject, log_failure


class LeaseStore:
    """Leases and validations of all runs. Shares the thread and the connection of the metric store.

    Args:
        metrics: the open metric store.

    Raises:
        MetricStoreError: the tables could not be made.
    """

    def __init__(self, metrics: MetricStore) -> None:
        self._metrics = metrics
        metrics.submit(lambda db: db.executescript(lease_rows.SCHEMA)).result()

    def live(self, now: float) -> Future[tuple[Lease, ...]]:
        """The leases that have neither expired nor ended."""
        return self._metrics.submit(lambda db: lease_rows.live(db, now))

    def grant(self, ask: Ask, due: Sequence[Subject], exists: Callable[[Subject], bool], now: float) -> Future[Grant]:
        """Give the worker a version: one that was asked for, oldest first, else the first of `due` without metrics.

        Args:
            ask: what the worker would take.
            due: versions that are to be evaluated without being asked for.
            exists: whether a version that was asked for is still there; called on the database's thread.
            now: seconds since the epoch.
        """
        return self._metrics.submit(lambda db: lease_rows.grant(db, ask, due, exists, now))

    def beat(self, lease_id: str, now: float) -> Future[Lease | None]:
        """Extend a lease from `now` on, also an expired one that nobody has taken over; None: it is lost."""
        return self._metrics.submit(lambda db: lease_rows.beat(db, lease_id, now))

    def settle(self, lease_id: str, finding: Finding, now: float) -> Future[tuple[Report, bool] | None]:
        """End a lease by its result; returns the report and whether it is new, None when the lease is lost.

        The same result may come twice: its first answer may have been lost on the way.
        """
        return self._metrics.submit(lambda db: lease_rows.settle(db, lease_id, finding, now))

    def give_back(self, lease_id: str) -> Future[Lease | None]:
        """Let others have the version at once, as if it had never been taken; None when the lease is lost."""
        return self._metrics.submit(lambda db: lease_rows.give_back(db, lease_id))

    def abandon(self, worker: str) -> None:
        """A worker is known to be dead: its leases expire now. Does not wait; a failure is logged."""
        self._metrics.submit(lambda db: lease_rows.abandon(db, worker)).add_done_callback(log_failure)

    def request(
        self, subject: Subject, task: str, now: float, *, again: bool, possible: bool
    ) -> Future[Validation | None]:
        """Ask for a validation, or find the one there is.

        A version that has metrics for the task has been validated, unless `again`. Asking for what is waiting or being
        evaluated returns that. Otherwise a new one begins to wait if that is `possible`, else None.
        """
        return self._metrics.submit(lambda db: lease_rows.request(db, subject, task, now, again, possible))

    def find(self, run: str, validation_id: str, now: float) -> Future[Validation | None]:
        """A validation of a run as it stands."""
        return self._metrics.submit(lambda db: lease_rows.find(db, run, validation_id, now))

    def rename(self, run: str, new_run: str) -> None:
        """A run got another name: what belongs to it goes with it. Does not wait; a failure is logged."""
        self._metrics.submit(lambda db: lease_rows.rename(db, run, new_run)).add_done_callback(log_failure)
