"""One server per data folder, of a known format; unfinished writes are deleted, foreign files are left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ema_server.storage.datadir import DataDirError, open_data_dir

_HOLD = "import sys; from pathlib import Path; from ema_server.storage.datadir import open_data_dir; \
d = open_data_dir(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


@contextmanager
def _held_by_another(data: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _HOLD, str(data)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            yield other
        finally:
            other.kill()


@pytest.mark.process
def test_second_server_is_refused_and_names_the_first(tmp_path: Path) -> None:
    with _held_by_another(tmp_path) as other:
        with pytest.raises(DataDirError, match=f"in use by another server .process {other.pid}.: stop it or choose"):
            open_data_dir(tmp_path)
        other.kill()
        other.wait(10)
        open_data_dir(tmp_path).close()


def test_closed_folder_can_be_opened_again(tmp_path: Path) -> None:
    for _ in range(2):
        open_data_dir(tmp_path / "new" / "folder").close()

    assert json.loads((tmp_path / "new" / "folder" / "format.json").read_text()) == {"format": 1}


def test_newer_format_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "format.json").write_text('{"format": 2}')
    for _ in range(2):
        with pytest.raises(DataDirError, match="has format 2, this server reads 1: use the server that wrote it"):
            open_data_dir(tmp_path)

    assert (tmp_path / "format.json").read_text() == '{"format": 2}'


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
def test_invalid_format_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "format.json").write_text(text)
    with pytest.raises(DataDirError, match="is invalid"):
        open_data_dir(tmp_path)


def test_path_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirError, match="cannot be used: Not a directory; choose another with --data"):
        open_data_dir(tmp_path / "file" / "data")


def test_unfinished_writes_are_deleted_and_invalid_names_are_not_runs(tmp_path: Path) -> None:
    generations = tmp_path / "runs" / "r" / "generations"
    (generations / ".tmp-00000001" / "averages").mkdir(parents=True)
    (generations / ".tmp-00000001" / "averages" / "half").write_bytes(b"x")
    (generations / "notes").mkdir()
    (tmp_path / "runs" / "--odd").mkdir()
    (tmp_path / "runs" / "file").write_text("")
    data_dir = open_data_dir(tmp_path)

    assert data_dir.runs() == ("r",)
    assert [path.name for path in generations.iterdir()] == ["notes"]
    assert list(data_dir.whole_generations("r")) == []
    data_dir.close()


@pytest.mark.parametrize(
    ("names", "seq"), [([], 1), (["00000007-000000000100"], 8), ([".bad-00000009-000000000001"], 10)]
)
def test_next_seq_is_above_every_seq_in_use(tmp_path: Path, names: list[str], seq: int) -> None:
    for name in names:
        (tmp_path / "runs" / "r" / "generations" / name).mkdir(parents=True)
    data_dir = open_data_dir(tmp_path)

    assert data_dir.next_seq("r") == seq
    data_dir.close()
