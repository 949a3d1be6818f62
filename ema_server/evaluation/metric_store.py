"""Evaluation metrics by version, in SQLite. One thread owns the connection; callers get futures.

It also records which versions were downloaded, so that a worker may still report on one that was pruned while it was
being evaluated.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

log = logging.getLogger(__name__)

_FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS handed_out (
    run TEXT NOT NULL, average TEXT NOT NULL, version TEXT NOT NULL, step INTEGER NOT NULL,
    PRIMARY KEY (run, average, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reports (
    run TEXT NOT NULL, average TEXT NOT NULL, version TEXT NOT NULL, step INTEGER NOT NULL,
    task TEXT NOT NULL, worker TEXT NOT NULL, at TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (run, version, task, worker)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS reports_by_step ON reports (run, average, task, step);
"""
Args = ParamSpec("Args")
Result = TypeVar("Result")


class MetricStoreError(Exception):
    """The database could not be opened, read or written; the text names it and says why."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The version that a report is about, with the names that identify it to a person."""

    run: str
    average: str
    version: str
    step: int


@dataclass(frozen=True, slots=True)
class Report:
    """The metrics, or the error, of a version for a task by a worker. `at` is the server's time (RFC 3339).

    `missing` says for each metric without a finite value why: `nan`, `inf`, `-inf`, or a text.
    """

    subject: Subject
    task: str
    worker: str | None
    metrics: dict[str, float]
    error: str | None
    samples: int | None
    seconds: float | None
    at: str
    missing: dict[str, str] = field(default_factory=dict)


def connect(uri: str) -> sqlite3.Connection:
    """Open the database at an SQLite `file:` URI so that commits survive a power cut.

    Write-ahead logging needs shared memory, which network file systems lack: there it uses a rollback journal.

    Raises:
        sqlite3.Error: it cannot be opened, or is not a database.
    """
    connection = sqlite3.connect(uri, uri=True)
    try:
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    except sqlite3.OperationalError as error:
        mode = str(error)
    if mode != "wal":
        log.warning("metrics: no write-ahead log on this file system (%s); using a rollback journal", mode)
        connection.execute("PRAGMA journal_mode=TRUNCATE")
    connection.execute("PRAGMA synchronous=FULL")
    connection.executescript(_SCHEMA)
    return connection


class MetricStore:
    """The database of one server. Every query runs as one transaction on the thread that owns the connection.

    Args:
        path: the database file, made if it is missing.

    Raises:
        MetricStoreError: it cannot be opened, or was written by a newer release.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        try:
            self._connection = self._run(self._open).result()
            self._worker = self._run(threading.current_thread).result()
        except MetricStoreError:
            self._thread.shutdown()
            raise

    def submit(
        self, query: Callable[Concatenate[sqlite3.Connection, Args], Result], *args: Args.args, **kwargs: Args.kwargs
    ) -> Future[Result]:
        """Call `query(connection, *args, **kwargs)` in a transaction, which is rolled back if it raises.

        The future raises `MetricStoreError` if the database cannot be read or written.
        """

        def transaction() -> Result:
            with self._connection:
                return query(self._connection, *args, **kwargs)

        return self._run(transaction)

    def hand_out(self, subject: Subject) -> None:
        """Record that a reader downloads this version. Does not wait; a failure is logged."""
        self.submit(_hand_out, subject).add_done_callback(log_failure)

    def rename(self, run: str, new_run: str) -> None:
        """Move the reports of a run to its new name. Does not wait; a failure is logged."""
        self.submit(_rename, run, new_run).add_done_callback(log_failure)

    def find(self, run: str, average: str, version: str) -> Future[Subject | None]:
        """A version that was downloaded once, pruned or not; None if it never was."""
        return self.submit(_find, run, average, version)

    def add(self, report: Report) -> Future[bool]:
        """Store a report; True if it is the first of its version, task and worker, False if it replaced one."""
        return self.submit(insert_report, report)

    def reports(self, run: str, version: str | None = None) -> Future[tuple[Report, ...]]:
        """All reports of a run, or those of one version, by step, average, task and worker."""
        return self.submit(_reports, run, version)

    def newest(self) -> Future[tuple[Report, ...]]:
        """For each run, average and task the report of the newest step that is no error."""
        return self.submit(_newest)

    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._worker.is_alive()

    def close(self) -> None:
        """Finish the queries that were submitted and close the database."""
        if self.is_alive():
            self._run(lambda: self._connection.close()).result()
        self._thread.shutdown()

    def _run(self, work: Callable[[], Result]) -> Future[Result]:
        def mapped() -> Result:
            try:
                return work()
            except sqlite3.Error as error:
                raise MetricStoreError(f"{self._path}: {error}") from error

        return self._thread.submit(mapped)

    def _open(self) -> sqlite3.Connection:
        connection = connect(self._path.absolute().as_uri())
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, _FORMAT):
            raise MetricStoreError(f"{self._path} has format {found}, this release reads {_FORMAT}: use a newer one")
        connection.execute(f"PRAGMA user_version={_FORMAT}")
        return connection


def _hand_out(db: sqlite3.Connection, subject: Subject) -> None:
    row = (subject.run, subject.average, subject.version, subject.step)
    db.execute("INSERT OR IGNORE INTO handed_out VALUES (?, ?, ?, ?)", row)


def _rename(db: sqlite3.Connection, run: str, new_run: str) -> None:
    db.execute("UPDATE OR REPLACE handed_out SET run = ? WHERE run = ?", (new_run, run))
    db.execute("UPDATE OR REPLACE reports SET run = ? WHERE run = ?", (new_run, run))


def delete_reports(db: sqlite3.Connection, run: str) -> None:
    """Delete every row of a run."""
    db.execute("DELETE FROM handed_out WHERE run = ?", (run,))
    db.execute("DELETE FROM reports WHERE run = ?", (run,))


def _find(db: sqlite3.Connection, run: str, average: str, version: str) -> Subject | None:
    query = "SELECT step FROM handed_out WHERE run = ? AND average = ? AND version = ?"
    row = db.execute(query, (run, average, version)).fetchone()
    return Subject(run, average, version, row[0]) if row else None


def _reports(db: sqlite3.Connection, run: str, version: str | None) -> tuple[Report, ...]:
    query = (
        "SELECT average, version, step, task, worker, at, body FROM reports"
        " WHERE run = ? AND (? IS NULL OR version = ?) ORDER BY step, average, task, worker"
    )
    return tuple(_report(run, *row) for row in db.execute(query, (run, version, version)))


def _newest(db: sqlite3.Connection) -> tuple[Report, ...]:
    query = (
        "SELECT run, average, version, step, task, worker, at, body FROM reports"
        " WHERE run = ? AND average = ? AND task = ? AND json_extract(body, '$[1]') IS NULL"
        " ORDER BY step DESC, at DESC LIMIT 1"
    )
    keys = db.execute("SELECT DISTINCT run, average, task FROM reports").fetchall()
    rows = [db.execute(query, key).fetchone() for key in keys]
    return tuple(_report(*row) for row in rows if row is not None)


def insert_report(db: sqlite3.Connection, report: Report) -> bool:
    """Write a report; returns what `MetricStore.add` does."""
    subject, worker = report.subject, report.worker or ""
    key = (subject.run, subject.version, report.task, worker)
    body = [report.metrics, report.error, report.samples, report.seconds, report.missing]
    row = (subject.run, subject.average, subject.version, subject.step, report.task, worker, report.at)
    query = "SELECT 1 FROM reports WHERE run = ? AND version = ? AND task = ? AND worker = ?"
    known = db.execute(query, key).fetchone()
    db.execute("INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, json.dumps(body)))
    return known is None


def latest_report(db: sqlite3.Connection, subject: Subject, task: str) -> Report | None:
    """The newest report of a version for a task that is no error, None if it has none."""
    query = (
        "SELECT run, average, version, step, task, worker, at, body FROM reports"
        " WHERE run = ? AND version = ? AND task = ? ORDER BY at DESC"
    )
    rows = db.execute(query, (subject.run, subject.version, task))
    return next((report for report in (_report(*row) for row in rows) if report.error is None), None)


def _report(run: str, average: str, version: str, step: int, task: str, worker: str, at: str, body: str) -> Report:
    metrics, error, samples, seconds, *missing = json.loads(body)  # rows of earlier releases have no `missing`
    subject = Subject(run, average, version, step)
    return Report(subject, task, worker or None, metrics, error, samples, seconds, at, *missing)


def log_failure(future: Future[None]) -> None:
    """Log the error of a query whose result is not awaited."""
    error = future.exception()
    if error is not None:
        log.warning("metrics: a row could not be written: %s", error)
