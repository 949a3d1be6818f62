"""A missing, wrong or malformed token is reported by every client before anything is sent, and never shown."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from ema_cli.app import build, run
from support.processes import ServerProcess
from trainer_client import ConnectError, EmaClient, SettingsError

WAIT_S = 60.0
TOKEN = "the-right-one"
WRONG = ["the-wrong-one", "the-right-one.", "the-right-on", "The-right-one"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("tokens") / "data", "--token", TOKEN) as process:
        yield process


@pytest.mark.parametrize("token", [None, *WRONG])
def test_trainer_raises_at_construction(server: ServerProcess, token: str | None) -> None:
    with pytest.raises(ConnectError, match="EMA_TOKEN") as caught:
        EmaClient(server.zmq, "r", token=token, connect_timeout_s=WAIT_S)

    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("token", ["read from a file\n", "two words", "schl\u00fcssel", "tab\t"])
def test_invalid_token_is_refused_before_anything_is_sent(token: str) -> None:
    with pytest.raises(SettingsError, match="EMA_TOKEN") as caught:
        EmaClient("tcp://127.0.0.1:9", "r", token=token)

    assert token not in str(caught.value)


@pytest.mark.parametrize("token", [None, *WRONG])
@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["status", "r"],
        ["versions", "r"],
        ["download", "r/raw"],
        ["validate", "r/raw"],
        ["evaluate", "json:dumps", "--run", "r"],
    ],
    ids=" ".join,
)
def test_every_reading_command_exits_with_4(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    server: ServerProcess,
    command: list[str],
    token: str | None,
) -> None:
    given = [] if token is None else ["--token", token]
    monkeypatch.setattr("sys.argv", ["ema", *command, "--url", server.http, *given])

    assert run(build()) == 4
    output = capsys.readouterr()
    assert (output.out, len(output.err.splitlines())) == ("", 1)
    assert "EMA_TOKEN" in output.err
    assert TOKEN not in output.err
    assert token is None or token not in output.err


def test_healthcheck_needs_no_token(monkeypatch: pytest.MonkeyPatch, server: ServerProcess) -> None:
    monkeypatch.setattr("sys.argv", ["ema", "healthcheck", "--url", server.http])

    assert run(build()) == 0


@pytest.mark.parametrize("header", ["", "Bearer", f"bearer{TOKEN}", f"Basic {TOKEN}", f"Bearer {TOKEN}x"])
def test_no_other_header_authorizes(server: ServerProcess, header: str) -> None:
    for path in ("/v1/runs", "/metrics", "/v1/runs/r/averages/raw/versions/latest/files/model.safetensors"):
        answer = httpx2.get(f"{server.http}{path}", headers={"Authorization": header}, timeout=WAIT_S)
        assert answer.status_code == 401
        assert TOKEN not in answer.text
