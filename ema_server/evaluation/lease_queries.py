"""Queries on leases and validations; `MetricStore.submit` runs each as one transaction.

There is one lease row for each version and task: a worker that takes a version over replaces the row, and with it the
id that the worker before it knows. A row of `scheduled` is a version of a set that has been begun, until it has a
result. Times are seconds since the epoch.
"""

from __future__ import annotations

import itertools
import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ema_server.evaluation.leases import Ask, Due, Finding, Grant, Lease, Validation
from ema_server.evaluation.metric_store import Report, Subject, delete_reports, insert_report, latest_report
from ema_server.storage.records import rfc3339

ATTEMPTS_MAX = 3  # a version that crashes its worker each time must not crash workers for ever

SCHEMA = """
CREATE TABLE IF NOT EXISTS leases (
    run TEXT NOT NULL, average TEXT NOT NULL, version TEXT NOT NULL, step INTEGER NOT NULL, task TEXT NOT NULL,
    id TEXT NOT NULL UNIQUE, worker TEXT NOT NULL, lease_s REAL NOT NULL, expires REAL NOT NULL,
    attempts INTEGER NOT NULL, done INTEGER NOT NULL, PRIMARY KEY (run, version, task)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS validations (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, run TEXT NOT NULL, average TEXT NOT NULL,
    version TEXT NOT NULL, step INTEGER NOT NULL, task TEXT NOT NULL, again INTEGER NOT NULL, created TEXT NOT NULL,
    result TEXT
);
CREATE TABLE IF NOT EXISTS scheduled (
    number INTEGER PRIMARY KEY, run TEXT NOT NULL, average TEXT NOT NULL, version TEXT NOT NULL, step INTEGER NOT NULL,
    task TEXT NOT NULL, UNIQUE (run, version, task)
);
"""

_COLUMNS = "id, run, average, version, step, task, worker, lease_s, expires"


def live(db: sqlite3.Connection, now: float) -> tuple[Lease, ...]:
    """The leases that have neither expired nor ended."""
    query = f"SELECT {_COLUMNS} FROM leases WHERE NOT done AND expires > ?"  # noqa: S608 -- a constant
    return tuple(_lease(*row) for row in db.execute(query, (now,)))


def grant(db: sqlite3.Connection, ask: Ask, due: Due, exists: Callable[[Subject], bool], now: float) -> Grant:
    """Give the worker a version: a requested one, else one of a set that was begun, else the first of the next set.

    Args:
        db: the connection.
        ask: what the worker accepts.
        due: versions to evaluate without a request.
        exists: whether a version that was requested or scheduled still exists.
        now: the time.
    """
    held = set()
    for subject in _candidates(db, ask, due, exists, now):
        key = (subject.run, subject.version, ask.task)
        row = db.execute(
            "SELECT worker, expires, attempts, done FROM leases WHERE run = ? AND version = ? AND task = ?", key
        ).fetchone()
        worker, expires, attempts, done = row or ("", 0.0, 0, 1)
        if not done and expires > now:
            held.add(subject)
        elif attempts < ATTEMPTS_MAX:
            return Grant(_lend(db, subject, ask, 1 if done else attempts + 1, now), len(held))
        else:
            _unschedule(db, subject, ask.task)
            if not done:
                _give_up(db, subject, ask.task, worker, now)
    return Grant(None, len(held))


def _candidates(
    db: sqlite3.Connection, ask: Ask, due: Due, exists: Callable[[Subject], bool], now: float
) -> Iterator[Subject]:
    """The versions that the worker may be given, in order; a set of `due` is scheduled when it is reached."""
    if ask.version is not None:
        yield from _named(db, ask, due, now)
        return
    yield from _requested(db, ask, exists, now)
    yield from _scheduled(db, ask, due, exists)
    for subjects in due.sets:
        yield from _schedule(db, subjects, ask.task)


def _named(db: sqlite3.Connection, ask: Ask, due: Due, now: float) -> Iterator[Subject]:
    """The version that the worker asks for by name, unless it has metrics. It may be tried again, as if requested."""
    for subject in itertools.chain.from_iterable(due.sets):
        if latest_report(db, subject, ask.task) is None:
            _forget_attempts(db, subject, ask.task, now)
            yield subject


def _scheduled(db: sqlite3.Connection, ask: Ask, due: Due, exists: Callable[[Subject], bool]) -> list[Subject]:
    """The versions of sets that were begun and that this worker may take, in the order of the sets."""
    query = "SELECT run, average, version, step FROM scheduled WHERE task = ? ORDER BY number"
    found = []
    for row in db.execute(query, (ask.task,)).fetchall():
        subject = Subject(*row)
        if not exists(subject) or latest_report(db, subject, ask.task) is not None:  # pruned, or reported by hand
            _unschedule(db, subject, ask.task)
        elif subject.run in due.runs and subject.version not in due.skip and ask.covers(subject, ask.task):
            found.append(subject)
    return found


def _schedule(db: sqlite3.Connection, subjects: Sequence[Subject], task: str) -> list[Subject]:
    """Begin a set: schedule its versions that have no metrics, and return them."""
    found = [subject for subject in subjects if latest_report(db, subject, task) is None]
    for subject in found:
        row = (subject.run, subject.average, subject.version, subject.step, task)
        db.execute("INSERT OR IGNORE INTO scheduled VALUES (NULL, ?, ?, ?, ?, ?)", row)
    return found


def _unschedule(db: sqlite3.Connection, subject: Subject, task: str) -> None:
    key = (subject.run, subject.version, task)
    db.execute("DELETE FROM scheduled WHERE run = ? AND version = ? AND task = ?", key)


def _requested(db: sqlite3.Connection, ask: Ask, exists: Callable[[Subject], bool], now: float) -> list[Subject]:
    """The versions that are waited for and that this worker may take; ends the waits that have become pointless."""
    query = (
        "SELECT id, again, run, average, version, step FROM validations"
        " WHERE task = ? AND result IS NULL ORDER BY number"
    )
    found = []
    for validation_id, again, *names in db.execute(query, (ask.task,)).fetchall():
        subject = Subject(*names)
        known = None if again else latest_report(db, subject, ask.task)
        if known is not None:
            _end(db, validation_id, known)
        elif not exists(subject):
            text = "the version was pruned before a worker took it"
            _end(db, validation_id, _failure(subject, ask.task, None, text, now))
        elif ask.covers(subject, ask.task):
            found.append(subject)
    return found


def _lend(db: sqlite3.Connection, subject: Subject, ask: Ask, attempts: int, now: float) -> Lease:
    lease = Lease(secrets.token_hex(16), subject, ask.task, ask.worker, ask.lease_s, now + ask.lease_s)
    names = (subject.run, subject.average, subject.version, subject.step, ask.task, lease.id, ask.worker)
    row = (*names, lease.lease_s, lease.expires, attempts)
    db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)", row)
    return lease


def _give_up(db: sqlite3.Connection, subject: Subject, task: str, worker: str, now: float) -> None:
    text = (
        f"its worker vanished {ATTEMPTS_MAX} times while it evaluated this version; ask for a validation to try again"
    )
    report = _failure(subject, task, worker, text, now)
    insert_report(db, report)
    _end_all(db, report)
    key = (subject.run, subject.version, task)
    db.execute("UPDATE leases SET done = 1 WHERE run = ? AND version = ? AND task = ?", key)


def beat(db: sqlite3.Connection, lease_id: str, now: float) -> Lease | None:
    """Extend a lease from `now`, even an expired one, unless it has ended or its version was taken over."""
    db.execute("UPDATE leases SET expires = ? + lease_s WHERE id = ? AND NOT done", (now, lease_id))
    lease, done = _by_id(db, lease_id)
    return None if done else lease


def settle(db: sqlite3.Connection, lease_id: str, finding: Finding, now: float) -> tuple[Report, bool, bool] | None:
    """Store a result, and end its lease and the waits for it. None if the lease is lost.

    The same result may come twice: the answer to the first may have been lost.

    Returns:
        The report; whether it is new; whether other versions of its step are scheduled.
    """
    lease, _ = _by_id(db, lease_id)
    if lease is None:
        return None
    report = _report(lease.subject, lease.task, lease.worker, finding, now)
    first = insert_report(db, report)
    db.execute("UPDATE leases SET done = 1 WHERE id = ?", (lease_id,))
    _end_all(db, report)
    _unschedule(db, lease.subject, lease.task)
    query = "SELECT 1 FROM scheduled WHERE run = ? AND step = ? AND task = ?"
    rest = db.execute(query, (lease.subject.run, lease.subject.step, lease.task)).fetchone()
    return report, first, rest is not None


def give_back(db: sqlite3.Connection, lease_id: str) -> Lease | None:
    """Undo a grant: others may have the version at once. None if the lease is lost."""
    lease, done = _by_id(db, lease_id)
    query = "UPDATE leases SET expires = 0, attempts = attempts - 1 WHERE id = ? AND NOT done AND expires > 0"
    db.execute(query, (lease_id,))
    return None if done else lease


def abandon(db: sqlite3.Connection, worker: str) -> None:
    """Let every lease of a dead worker expire; its attempts count."""
    db.execute("UPDATE leases SET expires = 0 WHERE worker = ? AND NOT done", (worker,))


def request(
    db: sqlite3.Connection, subject: Subject, task: str, now: float, again: bool, possible: bool
) -> Validation | None:
    """Ask for a validation, or find the one there is.

    A version that has metrics for the task has been validated, unless `again`. Otherwise this returns a validation that
    waits or runs, or a new one if one is `possible`, else None.
    """
    key = (subject.run, subject.version, task)
    known = None if again else latest_report(db, subject, task)
    query = "SELECT id FROM validations WHERE run = ? AND version = ? AND task = ? AND result IS NULL"
    waiting = db.execute(query, key).fetchone()
    if waiting and known is None:
        return find(db, subject.run, waiting[0], now)
    if known is None and not possible:
        return None
    _forget_attempts(db, subject, task, now)
    new = secrets.token_hex(16)
    row = (new, subject.run, subject.average, subject.version, subject.step, task, again, rfc3339(now))
    db.execute("INSERT INTO validations VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, NULL)", row)
    if known is not None:
        _end(db, new, known)
    return find(db, subject.run, new, now)


def _forget_attempts(db: sqlite3.Connection, subject: Subject, task: str, now: float) -> None:
    """Let a version be tried again, even if it crashed its workers."""
    db.execute(
        "UPDATE leases SET attempts = 0 WHERE run = ? AND version = ? AND task = ? AND (done OR expires <= ?)",
        (subject.run, subject.version, task, now),
    )


def find(db: sqlite3.Connection, run: str, validation_id: str, now: float) -> Validation | None:
    """A validation, and the worker that has its version now."""
    query = "SELECT average, version, step, task, created, result FROM validations WHERE run = ? AND id = ?"
    row = db.execute(query, (run, validation_id)).fetchone()
    if row is None:
        return None
    average, version, step, task, created, result = row
    *finding, worker, at = json.loads(result) if result else (None, None)
    query = "SELECT worker FROM leases WHERE run = ? AND version = ? AND task = ? AND NOT done AND expires > ?"
    leased = db.execute(query, (run, version, task, now)).fetchone()
    subject, found = Subject(run, average, version, step), Finding(*finding) if finding else None
    return Validation(validation_id, subject, task, created, found, worker, at, leased[0] if leased else None)


def _end_all(db: sqlite3.Connection, report: Report) -> None:
    """End every wait for the version and the task with this report."""
    query = "SELECT id FROM validations WHERE run = ? AND version = ? AND task = ? AND result IS NULL"
    for row in db.execute(query, (report.subject.run, report.subject.version, report.task)).fetchall():
        _end(db, row[0], report)


def _end(db: sqlite3.Connection, validation_id: str, report: Report) -> None:
    finding = (report.metrics, report.error, report.samples, report.seconds, report.missing)
    result = [*finding, report.worker, report.at]
    db.execute("UPDATE validations SET result = ? WHERE id = ?", (json.dumps(result), validation_id))


def rename(db: sqlite3.Connection, run: str, new_run: str) -> None:
    """Move every row of a run to its new name. What was scheduled is not: the run has been set aside."""
    db.execute("DELETE FROM scheduled WHERE run = ?", (run,))
    db.execute("UPDATE OR REPLACE leases SET run = ? WHERE run = ?", (new_run, run))
    db.execute("UPDATE validations SET run = ? WHERE run = ?", (new_run, run))


def delete_run(db: sqlite3.Connection, run: str) -> None:
    """Delete every row of a run, its reports included."""
    db.execute("DELETE FROM leases WHERE run = ?", (run,))
    db.execute("DELETE FROM scheduled WHERE run = ?", (run,))
    db.execute("DELETE FROM validations WHERE run = ?", (run,))
    delete_reports(db, run)


def _by_id(db: sqlite3.Connection, lease_id: str) -> tuple[Lease | None, bool]:
    query = f"SELECT {_COLUMNS}, done FROM leases WHERE id = ?"  # noqa: S608 -- a constant
    row = db.execute(query, (lease_id,)).fetchone()
    return (None, False) if row is None else (_lease(*row[:-1]), bool(row[-1]))


def _lease(id: str, run: str, average: str, version: str, step: int, *rest: Any) -> Lease:
    return Lease(id, Subject(run, average, version, step), *rest)


def _report(subject: Subject, task: str, worker: str | None, finding: Finding, now: float) -> Report:
    return Report(
        subject,
        task,
        worker,
        finding.metrics,
        finding.error,
        finding.samples,
        finding.seconds,
        rfc3339(now),
        finding.missing,
    )


def _failure(subject: Subject, task: str, worker: str | None, text: str, now: float) -> Report:
    return _report(subject, task, worker, Finding(error=text), now)
