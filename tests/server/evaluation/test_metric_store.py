"""The metric store: what was reported survives, on any file system, and one thread owns the connection."""

from __future__ import annotations

import logging
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ema_server.evaluation.metric_store import MetricStore, MetricStoreError, Report, Subject, connect

WAIT_S = 20
SUBJECT = Subject("digits", "ema-0.9", "a" * 40, 100)


def report(worker: str, value: float = 0.5) -> Report:
    return Report(SUBJECT, "default", worker, {"accuracy": value}, None, None, None, "2026-01-01T00:00:00Z")


def test_reports_survive_a_restart(tmp_path: Path) -> None:
    store = MetricStore(tmp_path / "metrics.sqlite")
    store.hand_out(SUBJECT)
    store.add(report("w")).result(WAIT_S)
    store.close()

    store = MetricStore(tmp_path / "metrics.sqlite")
    found = store.reports("digits").result(WAIT_S), store.find("digits", "ema-0.9", "a" * 40).result(WAIT_S)
    store.close()

    assert found == ((report("w"),), SUBJECT)


def test_row_of_an_earlier_release_has_no_missing_metrics(tmp_path: Path) -> None:
    store = MetricStore(tmp_path / "metrics.sqlite")
    store.add(report("w")).result(WAIT_S)
    store.submit(lambda db: db.execute("""UPDATE reports SET body = '[{"accuracy": 0.5}, null, null, null]'""")).result(
        WAIT_S
    )
    found = store.reports("digits").result(WAIT_S)
    store.close()

    assert found == (report("w"),)


def test_second_report_of_a_worker_replaces_its_row(tmp_path: Path) -> None:
    store = MetricStore(tmp_path / "metrics.sqlite")
    first = [store.add(report(worker)).result(WAIT_S) for worker in ("w1", "w1", "w2")]
    rows = store.reports("digits").result(WAIT_S)
    store.close()

    assert first == [True, False, True]
    assert [row.worker for row in rows] == ["w1", "w2"]


def test_reports_are_moved_when_a_run_is_renamed(tmp_path: Path) -> None:
    store = MetricStore(tmp_path / "metrics.sqlite")
    store.hand_out(SUBJECT)
    store.add(report("w")).result(WAIT_S)
    store.rename("digits", "digits.old")
    old, new = (store.reports(name).result(WAIT_S) for name in ("digits", "digits.old"))
    found = store.find("digits.old", "ema-0.9", "a" * 40).result(WAIT_S)
    store.close()

    assert old == ()
    assert [row.subject for row in new] == [found]


def test_reports_from_many_threads_are_all_stored(tmp_path: Path) -> None:
    store = MetricStore(tmp_path / "metrics.sqlite")
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda i: store.add(report(f"w{i}")).result(WAIT_S), range(64)))
    rows = store.reports("digits").result(WAIT_S)
    store.close()

    assert all(results)
    assert len(rows) == 64


def test_database_syncs_each_commit_to_a_write_ahead_log(tmp_path: Path) -> None:
    connection = connect((tmp_path / "metrics.sqlite").as_uri())
    modes = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    connection.close()

    assert modes == ["wal", 2]


def test_file_system_without_shared_memory_uses_a_rollback_journal_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        connection = connect((tmp_path / "metrics.sqlite").as_uri() + "?vfs=unix-dotfile")
    modes = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    connection.close()

    assert modes == ["truncate", 2]
    assert len(caplog.records) == 1


def test_file_that_is_not_a_database_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sqlite"
    path.write_bytes(b"this is not a database" * 100)

    with pytest.raises(MetricStoreError, match=r"metrics\.sqlite"):
        MetricStore(path)


def test_database_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=7")
    connection.close()

    with pytest.raises(MetricStoreError, match="format 7"):
        MetricStore(path)
