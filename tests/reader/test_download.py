"""Downloads: resumed across processes, verified, and renamed into place completely or not at all."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ema_reader import NotFound, Reader, ReaderError, Unreachable, VerificationFailed, download
from ema_reader.partial import Progress
from ema_reader.values import Version
from support.served import WAIT_S, Served

KILLED_HALFWAY = """
import os, signal, sys
from ema_reader import Reader

class Suicide:
    received = 0

    def start(self, name, size, done):
        pass

    def advance(self, count):
        self.received += count
        if self.received > 1_000_000:
            os.kill(os.getpid(), signal.SIGKILL)

reader = Reader(sys.argv[1])
reader.download(reader.version("digits", "ema-0.9"), sys.argv[2], progress=Suicide())
"""


class Recorded:
    """The values passed to a progress bar."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.received = 0

    def start(self, name: str, size: int, done: int) -> None:
        self.started.append((name, done))

    def advance(self, count: int) -> None:
        self.received += count


@pytest.fixture
def version(served: Served, reader: Reader) -> Version:
    served.publish("digits", 100, size=20_000)
    return reader.version("digits", "ema-0.9")


@pytest.fixture
def content(served: Served, version: Version) -> bytes:
    return (served.catalog.versions("digits", "ema-0.9")[0].folder / "model.safetensors").read_bytes()


def partial(folder: Path, version: Version) -> Path:
    file = version.file("model.safetensors")
    assert file is not None
    return folder / f".model.safetensors.{file.sha256[:16]}.partial"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_version_becomes_a_folder_with_only_its_files(
    reader: Reader, version: Version, content: bytes, tmp_path: Path
) -> None:
    folder = reader.download(version, tmp_path / "a" / "out")

    assert folder == tmp_path / "a" / "out"
    assert names(folder) == ["model.safetensors", "version.json"]
    assert (folder / "model.safetensors").read_bytes() == content


def test_partial_file_is_resumed(reader: Reader, version: Version, content: bytes, tmp_path: Path) -> None:
    partial(tmp_path, version).write_bytes(content[:100_001])
    progress: Progress = Recorded()

    reader.download(version, tmp_path, progress=progress)

    assert isinstance(progress, Recorded)
    assert progress.started[0] == ("model.safetensors", 100_001)
    assert progress.received == sum(file.size for file in version.files) - 100_001
    assert (tmp_path / "model.safetensors").read_bytes() == content


@pytest.mark.process
def test_partial_file_of_a_killed_process_is_resumed(served: Served, url: str, reader: Reader, tmp_path: Path) -> None:
    served.publish("digits", 100, size=200_000)
    version = reader.version("digits", "ema-0.9")
    folder = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED_HALFWAY, url, str(folder)], timeout=3 * WAIT_S, check=False)
    kept = partial(folder, version).stat().st_size
    left = names(folder)

    progress = Recorded()
    reader.download(version, folder, progress=progress)

    assert killed.returncode == -signal.SIGKILL
    assert left == [partial(folder, version).name]
    assert kept > 900_000
    assert progress.started[0] == ("model.safetensors", kept)
    assert names(folder) == ["model.safetensors", "version.json"]


def test_flipped_byte_fails_verification_and_leaves_no_file(
    reader: Reader, version: Version, content: bytes, tmp_path: Path
) -> None:
    damaged = bytearray(content[:100_000])
    damaged[500] ^= 1
    partial(tmp_path, version).write_bytes(damaged)

    with pytest.raises(VerificationFailed, match=r"model\.safetensors"):
        reader.download(version, tmp_path)

    assert names(tmp_path) == []
    reader.download(version, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_byte_flipped_on_the_servers_disk_fails_verification(
    served: Served, reader: Reader, version: Version, content: bytes, tmp_path: Path
) -> None:
    damaged = bytearray(content)
    damaged[-1] ^= 1
    (served.catalog.versions("digits", "ema-0.9")[0].folder / "model.safetensors").write_bytes(damaged)

    with pytest.raises(VerificationFailed):
        reader.download(version, tmp_path / "out")

    assert names(tmp_path / "out") == []


def test_too_long_partial_file_starts_over(reader: Reader, version: Version, content: bytes, tmp_path: Path) -> None:
    partial(tmp_path, version).write_bytes(b"x" * (len(content) + 1))

    reader.download(version, tmp_path)

    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_another_version_is_replaced_without_its_partial_file(
    served: Served, reader: Reader, version: Version, tmp_path: Path
) -> None:
    reader.download(version, tmp_path)
    served.publish("digits", 200, size=20_000)
    newer = reader.version("digits", "ema-0.9")
    partial(tmp_path, version).write_bytes(b"of the older version")

    reader.download(newer, tmp_path)

    expected = served.catalog.versions("digits", "ema-0.9")[0].folder
    for name in ("model.safetensors", "version.json"):
        assert (tmp_path / name).read_bytes() == (expected / name).read_bytes()


def test_existing_files_are_not_downloaded_again(reader: Reader, version: Version, tmp_path: Path) -> None:
    reader.download(version, tmp_path)
    before = (tmp_path / "model.safetensors").stat().st_ino
    progress = Recorded()

    reader.download(version, tmp_path, progress=progress)

    assert progress.received == 0
    assert (tmp_path / "model.safetensors").stat().st_ino == before


def test_second_download_into_the_same_folder_is_refused(reader: Reader, version: Version, tmp_path: Path) -> None:
    with partial(tmp_path, version).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        with pytest.raises(ReaderError, match="another download"):
            reader.download(version, tmp_path)


def test_pruned_version_leaves_no_partial_file(
    served: Served, reader: Reader, version: Version, tmp_path: Path
) -> None:
    partial(tmp_path, version).write_bytes(b"a part")
    served.catalog.remove(served.catalog.generations("digits")[0], force=True)

    with pytest.raises(NotFound):
        reader.download(version, tmp_path)

    assert names(tmp_path) == []


@pytest.mark.parametrize("exists", [True, False])
def test_deleted_version_leaves_no_folder_and_is_reported(
    served: Served, reader: Reader, version: Version, tmp_path: Path, exists: bool
) -> None:
    folder = tmp_path / "a" / "out"
    if exists:
        folder.mkdir(parents=True)
    served.catalog.remove(served.catalog.generations("digits")[0], force=True)

    with pytest.raises(NotFound, match="is no longer on the server: it was deleted or pruned"):
        reader.download(version, folder)

    assert folder.exists() == exists
    assert names(tmp_path) == (["a"] if exists else [])


def test_folder_that_cannot_be_made_is_named(reader: Reader, version: Version, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ReaderError, match="file"):
        reader.download(version, tmp_path / "file" / "out")


def test_download_survives_a_server_restart(served: Served, tmp_path: Path) -> None:
    served.publish("digits", 100, size=20_000)
    with served.listening() as url, Reader(url) as reader:
        version = reader.version("digits", "ema-0.9")
    port = int(url.rsplit(":", 1)[1])
    with Reader(url) as reader, ThreadPoolExecutor(1) as thread:
        download = thread.submit(reader.download, version, tmp_path / "out")
        time.sleep(0.2)
        was_waiting = not download.done()
        with served.listening(port):
            download.result(WAIT_S)

    assert was_waiting
    assert names(tmp_path / "out") == ["model.safetensors", "version.json"]


def test_unreachable_server_is_reported_and_the_partial_file_kept(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_PAUSE_S", 0.01)
    served.publish("digits", 100, size=20_000)
    with served.listening() as url, Reader(url) as reader:
        version = reader.version("digits", "ema-0.9")
    partial(tmp_path, version).write_bytes(b"a part")

    with Reader(url) as reader, pytest.raises(Unreachable):
        reader.download(version, tmp_path)

    assert partial(tmp_path, version).read_bytes() == b"a part"
