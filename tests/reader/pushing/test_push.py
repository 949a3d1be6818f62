"""`ema push` to file systems of fsspec: which files are there afterwards, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fsspec")

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from ema_cli.app import build
from ema_reader import Reader, ReaderError, VerificationFailed
from ema_reader.errors import UsageError
from ema_reader.pushing.push import push_version
from ema_reader.pushing.stores import FileStore, open_store
from support.served import Served

OWN = "http://127.0.0.1:8080"


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    yield
    MemoryFileSystem.store.clear()


def pushed(reader: Reader, target: str, url: str) -> tuple[str, ...]:
    run, _, average = target.partition("/")
    return push_version(reader, reader.version(run, average), FileStore(url))


def test_version_is_copied_with_its_card_and_scores(served: Served, reader: Reader, tmp_path: Path) -> None:
    version = served.publish("digits", 100, ["raw"], companions={"assets/merges.txt": b"a b"}).versions[0]
    reader.report(f"digits/raw@{version.id}", {"accuracy": 0.75})
    folder = tmp_path / "out" / "digits"

    names = pushed(reader, "digits/raw", f"file://{folder}")

    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert set(names) == set(found) == {"README.md", "assets/merges.txt", "model.safetensors", "version.json"}
    for file in version.files:
        assert found[file.name].read_bytes() == (version.folder / file.name).read_bytes()
    assert "| default | accuracy | 0.75 |" in found["README.md"].read_text()


def test_next_version_replaces_it_and_removes_only_what_it_lacks(served: Served, reader: Reader) -> None:
    url = "memory://bucket/model"
    served.publish("digits", 100, ["raw"], companions={"old.json": b"{}"})
    pushed(reader, "digits/raw", url)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/model/LICENSE", b"mine")
    version = served.publish("digits", 200, ["raw"], companions={"new.json": b"{}"}).versions[0]

    pushed(reader, "digits/raw", url)

    names = {path.rpartition("/")[2] for path in fs.ls("/bucket/model", detail=False)}
    assert names == {"README.md", "LICENSE", "model.safetensors", "new.json", "version.json"}
    assert json.loads(fs.cat_file("/bucket/model/version.json"))["id"] == version.id


def test_version_json_is_gone_while_files_change_and_comes_last(
    served: Served, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.publish("digits", 100, ["raw"])
    pushed(reader, "digits/raw", "memory://m")
    served.publish("digits", 200, ["raw"])
    put_file = MemoryFileSystem.put_file
    seen: list[tuple[str, bool]] = []

    def put(self: MemoryFileSystem, source: str, path: str, **given: Any) -> None:
        seen.append((path.rpartition("/")[2], self.exists("/m/version.json")))
        put_file(self, source, path, **given)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    pushed(reader, "digits/raw", "memory://m")

    assert seen[-1][0] == "version.json"
    assert not any(complete for _, complete in seen)
    assert len(seen) == 3


def test_store_that_loses_bytes_is_reported(served: Served, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    served.publish("digits", 100, ["raw"])
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda self, source, path: self.pipe_file(path, b"short"))

    with pytest.raises(ReaderError, match="does not have the"):
        pushed(reader, "digits/raw", "memory://m")


def test_error_of_the_store_names_the_address(served: Served, reader: Reader, tmp_path: Path) -> None:
    served.publish("digits", 100, ["raw"])
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(ReaderError, match=r"file://.*/file/out"):
        pushed(reader, "digits/raw", f"file://{tmp_path}/file/out")


def test_damaged_version_is_not_copied(served: Served, reader: Reader, tmp_path: Path) -> None:
    version = served.publish("digits", 100, ["raw"]).versions[0]
    path = version.folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(VerificationFailed):
        pushed(reader, "digits/raw", f"file://{tmp_path}/out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "hf://name", "hf://a/b/c", "hf://a/b@main"])
def test_unknown_destination_is_wrong_usage(url: str) -> None:
    if url.startswith("hf:"):
        pytest.importorskip("huggingface_hub")
    with pytest.raises(UsageError):
        open_store(url, public=False, own_endpoint=OWN)


def test_the_ema_server_is_no_hub_to_push_to(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.HfApi, "__init__", lambda self: setattr(self, "endpoint", OWN))

    with pytest.raises(UsageError, match="unset it"):
        open_store("hf://owner/name", public=False, own_endpoint=f"{OWN}/")


def test_command_prints_the_address(served: Served, url: str, tmp_path: Path) -> None:
    version = served.publish("digits", 100, ["raw"]).versions[0]
    destination = f"file://{tmp_path}/out"

    done = CliRunner().invoke(build(), ["push", "digits/raw@step-100", destination, "--url", url, "--json"])

    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["address"], shown["version"]["id"]) == (destination, version.id)
    missing = CliRunner().invoke(build(), ["push", "digits/raw@step-7", destination, "--url", url])
    assert missing.exit_code == 3
