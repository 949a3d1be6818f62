"""Evaluation metrics by version, in SQLite. Comes in: reports; goes out: rows. One thread owns the connection.

It also remembers which versions were handed out, so that a worker may still report on one that was pruned while it was
being evaluated. Callers get futures; it knows nothing of HTTP and of the files of a version.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

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
"""
Result = TypeVar("Result")


class MetricStoreError(Exception):
    """The database could not be opened, read or written; the text names it and says why."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a report is about: one version, with what identifies it to a person."""

    run: str
    average: str
    version: str
    step: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker said about a version for a task. `at` is the server's time (RFC 3339)."""

    subject: Subject
    task: str
    worker: str | None
    metrics: dict[str, float]
    error: str | None
    samples: int | None
    seconds: float | None
    at: str


def connect(uri: str) -> sqlite3.Connection:
    """Open the database at an SQLite `file:` URI so that what was committed survives a power cut.

    Write-ahead logging needs shared memory, which network file systems lack: there a rollback journal serves.

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
    """The reports of all runs.

    Args:
        path: the database file, made when it is missing.

    Raises:
        MetricStoreError: it cannot be opened, or was written by a newer release.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        try:
            self._connection = self._run(self._open).result()
        except MetricStoreError:
            self._thread.shutdown()
            raise

    def hand_out(self, subject: Subject) -> None:
        """Remember that a reader got this version. Does not wait; a failure is logged."""
        self._run(lambda: self._hand_out(subject)).add_done_callback(log_failure)

    def rename(self, run: str, new_run: str) -> None:
        """A run got another name: what was reported goes with it. Does not wait; a failure is logged."""
        self._run(lambda: self._rename(run, new_run)).add_done_callback(log_failure)

    def find(self, run: str, average: str, version: str) -> Future[Subject | None]:
        """What is known of a version that was handed out once; None when it never was."""
        return self._run(lambda: self._find(run, average, version))

    def add(self, report: Report) -> Future[bool]:
        """Keep a report; True when it is the first of its version, task and worker, False when it replaced one."""
        return self._run(lambda: self._add(report))

    def submit(self, work: Callable[[sqlite3.Connection], Result]) -> Future[Result]:
        """Run `work` with the connection, on the thread that owns it."""
        return self._run(lambda: work(self._connection))

    def reports(self, run: str) -> Future[tuple[Report, ...]]:
        """All reports of a run, by step, average, task and worker."""
        return self._run(lambda: self._reports(run))

    def close(self) -> None:
        """Finish what was asked for and close the database."""
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
            raise MetricStoreError(f"{self._path} has format {found}, this release knows {_FORMAT}: use a newer one")
        connection.execute(f"PRAGMA user_version={_FORMAT}")
        return connection

    def _hand_out(self, subject: Subject) -> None:
        row = (subject.run, subject.average, subject.version, subject.step)
        with self._connection:
            self._connection.execute("INSERT OR IGNORE INTO handed_out VALUES (?, ?, ?, ?)", row)

    def _rename(self, run: str, new_run: str) -> None:
        with self._connection:
            self._connection.execute("UPDATE OR REPLACE handed_out SET run = ? WHERE run = ?", (new_run, run))
            self._connection.execute("UPDATE OR REPLACE reports SET run = ? WHERE run = ?", (new_run, run))

    def _find(self, run: str, average: str, version: str) -> Subject | None:
        query = "SELECT step FROM handed_out WHERE run = ? AND average = ? AND version = ?"
        row = self._connection.execute(query, (run, average, version)).fetchone()
        return Subject(run, average, version, row[0]) if row else None

    def _add(self, report: Report) -> bool:
        with self._connection:
            return insert_report(self._connection, report)

    def _reports(self, run: str) -> tuple[Report, ...]:
        query = (
            "SELECT average, version, step, task, worker, at, body FROM reports"
            " WHERE run = ? ORDER BY step, average, task, worker"
        )
        return tuple(_report(run, *row) for row in self._connection.execute(query, (run,)))


def insert_report(db: sqlite3.Connection, report: Report) -> bool:
    """Write a report inside the caller's transaction; returns what `MetricStore.add` does."""
    subject, worker = report.subject, report.worker or ""
    key = (subject.run, subject.version, report.task, worker)
    body = [report.metrics, report.error, report.samples, report.seconds]
    row = (subject.run, subject.average, subject.version, subject.step, report.task, worker, report.at)
    query = "SELECT 1 FROM reports WHERE run = ? AND version = ? AND task = ? AND worker = ?"
    known = db.execute(query, key).fetchone()
    db.execute("INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, json.dumps(body)))
    return known is None


def latest_report(db: sqlite3.Connection, subject: Subject, task: str) -> Report | None:
    """The newest report with metrics of a version for a task, None when it has none."""
    query = (
        "SELECT run, average, version, step, task, worker, at, body FROM reports"
        " WHERE run = ? AND version = ? AND task = ? ORDER BY at DESC"
    )
    rows = db.execute(query, (subject.run, subject.version, task))
    return next((report for report in (_report(*row) for row in rows) if report.error is None), None)


def _report(run: str, average: str, version: str, step: int, task: str, worker: str, at: str, body: str) -> Report:
    metrics, error, samples, seconds = json.loads(body)
    return Report(Subject(run, average, version, step), task, worker or None, metrics, error, samples, seconds, at)


def log_failure(future: Future[None]) -> None:
    """Log the error of work that nobody waits for."""
    error = future.exception()
    if error is not None:
        log.warning("metrics: what readers did could not be noted: %s", error)
