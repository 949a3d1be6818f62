"""The thread that stores companion files: order, failures, and sessions that are replaced."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from ema_proto.receiver.events import FileReceived
from ema_proto.wire.files import FileSpec
from ema_server.ingest.companion_files import FileWriter
from ema_server.storage.companions import CompanionStore, Draft
from ema_server.storage.datadir import open_data_dir
from support.waiting import eventually

DATA = bytes(range(200))
FILE = FileSpec("tokenizer.json", len(DATA), hashlib.sha256(DATA).hexdigest())


class Stored:
    """A writer into a folder, and what it reports."""

    def __init__(self, root: Path) -> None:
        self.data_dir = open_data_dir(root)
        self.data_dir.create_run("run")
        self.reports: list[tuple[int, int, str | None]] = []
        store = CompanionStore(self.data_dir)
        self.writer = FileWriter(store, lambda p, text: self.reports.append((p.ticket, p.offset, text)))

    def put(self, ticket: int, begin: int, end: int, data: bytes = DATA) -> None:
        self.writer.put(FileReceived("run", ticket, FILE, begin, data[begin:end]))

    def reported(self, count: int) -> list[tuple[int, int, str | None]]:
        return eventually(lambda: self.reports if len(self.reports) >= count else None, f"{count} reports")

    def names(self) -> list[str]:
        folder = self.data_dir.files_folder("run")
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Stored]:
    stored = Stored(tmp_path)
    yield stored
    stored.writer.stop()
    stored.data_dir.close()


def test_a_file_has_its_name_once_the_last_part_is_reported(stored: Stored) -> None:
    stored.put(1, 0, 100)
    assert stored.reported(1) == [(1, 0, None)]
    assert FILE.sha256 not in stored.names()
    stored.put(1, 100, 200)
    assert stored.reported(2)[1] == (1, 100, None)
    assert stored.names() == [FILE.sha256]


def test_a_damaged_file_leaves_nothing_and_can_be_sent_again(stored: Stored) -> None:
    stored.put(1, 0, 200, DATA[::-1])
    ((_, _, text),) = stored.reported(1)
    assert text is not None
    assert "arrived damaged" in text
    assert stored.names() == []
    stored.put(2, 0, 200)
    assert stored.reported(2)[1] == (2, 0, None)
    assert stored.names() == [FILE.sha256]


def test_a_newer_session_begins_the_file_again(stored: Stored) -> None:
    stored.put(1, 0, 100, DATA[::-1])
    stored.put(2, 0, 100)
    stored.put(2, 100, 200)
    assert [text for _, _, text in stored.reported(3)] == [None, None, None]
    assert stored.names() == [FILE.sha256]


def test_parts_after_a_failed_one_are_not_reported(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Draft, payload: bytes) -> bool:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Draft, "write", fail)
        stored.put(1, 0, 100)
        stored.put(1, 100, 200)
        assert stored.reported(1) == [(1, 0, "file 'tokenizer.json' could not be stored: No space left on device")]
    stored.put(2, 0, 200)
    assert stored.reported(2)[1:] == [(2, 0, None)]


def test_an_internal_error_is_logged_and_reported(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Draft, payload: bytes) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(Draft, "write", fail)
    with caplog.at_level(logging.ERROR, "ema"):
        stored.put(1, 0, 200)
        assert "internal error: ZeroDivisionError" in str(stored.reported(1)[0][2])
    assert "internal error while file tokenizer.json was stored" in caplog.text


def test_what_is_not_whole_is_deleted_when_the_session_ends_and_when_the_writer_stops(stored: Stored) -> None:
    stored.put(1, 0, 100)
    stored.reported(1)
    stored.writer.drop("run")
    eventually(lambda: stored.names() == [], "the part is deleted")
    stored.put(2, 0, 100)
    stored.reported(2)
    stored.writer.stop()
    assert stored.names() == []
