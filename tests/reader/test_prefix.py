"""Every command and method behind a reverse proxy that serves the server under a path prefix."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ema_cli.app import build
from ema_reader import Reader, ReaderError
from ema_server.runs.status_store import RunState
from support.reverse_proxy import nginx, stripping
from support.served import WAIT_S, Served


@pytest.fixture(params=[stripping, nginx], ids=["strip", "nginx"])
def behind(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of the server behind a proxy."""
    proxy: Callable[[str, Path], AbstractContextManager[str]] = request.param
    with proxy(url, tmp_path / "proxy") as address:
        yield address


@pytest.mark.process
def test_every_method_works_behind_a_prefix(served: Served, behind: str, tmp_path: Path) -> None:
    served.publish("digits", 100)
    served.beat()

    with Reader(f"{behind}/", token="") as reader:
        version = reader.version("digits", "ema-0.9", "step-100")  # an alias: answered by a redirect
        reader.report(version, {"accuracy": 0.9})
        folder = reader.download(version, tmp_path / "out")

        assert reader.ready()[0]
        assert [run.run for run in reader.runs()] == ["digits"]
        assert reader.wait("digits", "ema-0.9", timeout_s=WAIT_S) == version
        assert reader.best("digits").version == version
        assert sorted(reader.load("digits/ema-0.9")) == ["bias", "weight"]
        assert reader.validate("digits", "ema-0.9", timeout_s=WAIT_S).metrics == {"accuracy": 0.9}
        assert (folder / "version.json").is_file()


def _write_ledger(path: Path) -> None:
    ledger = {"origin": 0, "set": [1], "ranges": [[1, 100, 1]]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "ledger": ledger, "paces": []}))


@pytest.mark.process
def test_every_command_works_behind_a_prefix(
    served: Served, behind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = served.publish("digits", 100).versions[0]
    served.show("digits", 100, ["ema-0.9"], RunState.FINISHED)
    served.beat()
    (tmp_path / "behind_a_prefix.py").write_text("def evaluate(state): return {'bias': state['bias'][0]}")
    monkeypatch.chdir(tmp_path)
    commands = [
        ["status", "digits"],
        ["versions", "digits"],
        ["evaluate", "behind_a_prefix:evaluate", "--run", "digits", "--averages", "all", "--poll-s", "0.05"],
        ["validate", "digits/ema-0.9@step-100"],
        ["metrics", "digits"],
        ["best", "digits", "--download", "best"],
        ["averages", "digits"],
        ["download", f"digits/ema-0.9@{version.id[:7]}"],
        ["healthcheck"],
        ["doctor"],
        ["ledger", "digits/ema-0.9"],  # last: its file is changed before
    ]

    for arguments in commands:
        if arguments[0] == "ledger":
            _write_ledger(version.folder / "version.json")
        done = CliRunner().invoke(build(), [*arguments, "--url", behind])
        assert done.exit_code == 0, (arguments, done.output)


@pytest.mark.process
def test_body_over_the_limit_of_nginx_is_an_error_that_names_its_setting(
    served: Served, url: str, tmp_path: Path
) -> None:
    served.publish("digits", 100)
    with nginx(url, tmp_path / "proxy") as address, Reader(address, token="") as reader:
        metrics = {f"metric-{number}": 1.0 for number in range(200)}
        with pytest.raises(ReaderError, match=r"answers 413 .*\(nginx.*client_max_body_size"):
            reader.report("digits/ema-0.9", metrics)
