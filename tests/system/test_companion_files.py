"""Companion files from a client's arguments to a download, over real sockets, with kills and other peers."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ema_proto.receiver.connections import Connection, Connections
from ema_proto.wire import messages as m
from ema_reader import Reader
from ema_server.config import ServerConfig
from ema_server.server import build
from ema_server.storage.companions import Draft
from support.processes import ServerProcess
from support.waiting import eventually
from trainer_client import EmaClient, SettingsError

LARGE = 35_000_000  # a large tokenizer.json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(torch.randint(0, 256, (LARGE,), dtype=torch.uint8).numpy().tobytes())
    (folder / "README.md").write_text("# Model\n")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "config.json").write_text('{"hidden_size": 4}')
    (folder / "model.safetensors").write_bytes(b"not these")
    return folder


def companions(folder: Path) -> dict[str, bytes]:
    names = ("tokenizer.json", "README.md", "additional_chat_templates/tool_use.jinja", "config.json")
    return {name: (folder / name).read_bytes() for name in names}


def downloaded(http: str, run: str, folder: Path) -> dict[str, bytes]:
    with Reader(http) as reader:
        reader.download(reader.version(run, "raw"), folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_downloaded_version_has_the_files_of_the_folder(folder: Path, tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    with ServerProcess(tmp_path / "data") as server:
        with EmaClient(server.zmq, run="a", averages=["raw"], files=folder, checksum=True) as client:
            client.update(model)
            assert client.flush(durable=True)
        found = downloaded(server.http, "a", tmp_path / "out")
    expected = companions(folder)

    assert {name: found[name] for name in expected} == expected
    assert set(found) == {*expected, "model.safetensors", "version.json"}
    assert found["model.safetensors"] != b"not these"


def test_files_survive_a_killed_server_and_a_changed_file_applies_from_the_resume_on(
    folder: Path, tmp_path: Path
) -> None:
    model = nn.Linear(4, 4)
    with (
        ServerProcess(tmp_path / "data") as first,
        EmaClient(first.zmq, run="a", averages=["raw"], files=folder) as client,
    ):
        client.update(model)
        assert client.flush(durable=True)
        first.kill()
        with ServerProcess(tmp_path / "data", zmq=first.zmq) as server:
            eventually(lambda: client.stats()["state"] == "streaming", "the client is back", 30.0)
            client.update(model)
            assert client.flush(durable=True)
            expected = companions(folder)
            found = downloaded(server.http, "a", tmp_path / "out")
            assert {name: found[name] for name in expected} == expected
            client.close()
            (folder / "README.md").write_text("# Another\n")
            with EmaClient(server.zmq, run="a", averages=["raw"], files=[folder], step=2) as second:
                second.update(model)
            assert downloaded(server.http, "a", tmp_path / "out")["README.md"] == b"# Another\n"
            with Reader(server.http) as reader:
                old = reader.version("a", "raw", "step-2")
                reader.download(old, tmp_path / "old")
            assert (tmp_path / "old" / "README.md").read_text() == "# Model\n"
            server.send(signal.SIGTERM)
            assert server.wait() == 0


@pytest.fixture
def old_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that does not know companion files."""
    greet = Connections.greet

    def without_files(self: Connections, connection: Connection, session: bytes, hello: m.Hello) -> None:
        greet(self, connection, session, replace(hello, capabilities=("crc32",)))

    monkeypatch.setattr(Connections, "greet", without_files)
    server = build(ServerConfig(data=tmp_path / "data", zmq="tcp://127.0.0.1:0"))
    server.start()
    yield server.ingest.start()
    server.averager.stop(30.0)
    server.close()


def test_an_older_server_is_warned_of_once_and_streaming_goes_on(
    old_server: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ema"), EmaClient(old_server, run="a", files=folder) as client:
        client.update(nn.Linear(4, 4))
        assert client.flush(durable=True)

    assert [line for line in caplog.messages if "companion files" in line] == [
        f"ema: the server at {old_server} takes no companion files: the versions of run a are without them; upgrade it"
    ]


def test_files_are_read_on_the_rank_that_streams_alone(tmp_path: Path) -> None:
    EmaClient("tcp://127.0.0.1:1", run="a", files=tmp_path / "none.json", rank=1).close()
    with pytest.raises(SettingsError, match="cannot be read"):
        EmaClient("tcp://127.0.0.1:1", run="a", files=tmp_path / "none.json", rank=0)
    with pytest.raises(SettingsError, match="not a list of paths"):
        EmaClient("tcp://127.0.0.1:1", run="a", files=3, rank=1)  # type: ignore[arg-type]


def test_a_server_that_is_killed_while_files_arrive_gets_them_again(folder: Path, tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    stored = tmp_path / "data" / "runs" / "a" / "files"
    with (
        ServerProcess(tmp_path / "data") as first,
        EmaClient(first.zmq, run="a", averages=["raw"], files=folder) as client,
    ):
        client.update(model)
        eventually(lambda: stored.exists() and list(stored.iterdir()), "a file arrives", 30.0)
        first.kill()
        with ServerProcess(tmp_path / "data", zmq=first.zmq) as server:
            eventually(lambda: client.stats()["state"] == "streaming", "the client is back", 30.0)
            client.update(model)
            assert client.flush(durable=True)
            expected = companions(folder)
            found = downloaded(server.http, "a", tmp_path / "out")
            assert {name: found[name] for name in expected} == expected
            client.close()
    assert not list(stored.glob(".tmp-*"))


def test_files_that_wait_for_the_disk_hold_up_no_other_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), Draft.write

    def slow(self: Draft, payload: bytes) -> bool:
        assert may_write.wait(60.0)
        return write(self, payload)

    monkeypatch.setattr(Draft, "write", slow)
    server = build(ServerConfig(data=tmp_path / "data", zmq="tcp://127.0.0.1:0"))
    server.start()
    endpoint = server.ingest.start()
    try:
        with EmaClient(endpoint, run="a", averages=["raw"], files=folder) as held_up:
            held_up.update(nn.Linear(4, 4))
            with EmaClient(endpoint, run="b", averages=["raw"], when_behind="wait") as other:
                for _ in range(20):
                    other.update(nn.Linear(4, 4))
                assert other.flush(durable=True)
            assert held_up.stats()["committed"] == 0, "no snapshot goes before the files"
            may_write.set()
            assert held_up.flush(durable=True)
    finally:
        may_write.set()
        server.averager.stop(30.0)
        server.close()


def test_a_disk_that_refuses_a_file_is_tried_again_while_training_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures, write = iter([OSError(28, "No space left on device"), None]), Draft.write

    def failing(self: Draft, payload: bytes) -> bool:
        if (error := next(failures, None)) is not None:
            raise error
        return write(self, payload)

    monkeypatch.setattr(Draft, "write", failing)
    server = build(ServerConfig(data=tmp_path / "data", zmq="tcp://127.0.0.1:0"))
    server.start()
    try:
        with EmaClient(server.ingest.start(), run="a", averages=["raw"], files=folder) as client:
            client.update(nn.Linear(4, 4))
            eventually(lambda: client.stats()["reconnects"] == 1, "the client is back", 30.0)
            assert client.flush(durable=True)
        assert "file 'README.md' could not be stored: No space left on device" in caplog.text
        assert {file.name for file in server.services.catalog.versions("a", "raw")[0].files} >= set(companions(folder))
    finally:
        server.averager.stop(30.0)
        server.close()
