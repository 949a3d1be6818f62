"""`ema push hf://…` with the real huggingface_hub, and a stand-in for the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ema_reader import Reader
from support.processes import Process, ServerProcess
from support.stand_in_hub import Hub, hub
from trainer_client import EmaClient

pytest.importorskip("huggingface_hub")
pytest.importorskip("fsspec")

pytestmark = pytest.mark.timeout(300)
_PUSH_S = 80.0


@pytest.fixture
def outside() -> Iterator[Hub]:
    with hub() as made:
        yield made


def push(server: ServerProcess, outside: Hub, home: Path, target: str, *options: str) -> Process:
    variables = {
        "HF_ENDPOINT": outside.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_token",
        "NO_PROXY": "127.0.0.1",
    }
    command = ("-m", "ema_cli", "push", target, "hf://owner/model", "--url", server.http, *options)
    return Process(*command, env=variables)


def test_versions_become_commits_with_tags_and_cards(outside: Hub, tmp_path: Path) -> None:
    import huggingface_hub

    with ServerProcess(tmp_path / "data") as server, Reader(server.http) as reader:
        model = torch.nn.Linear(4, 4)
        files = tmp_path / "assets"
        files.mkdir()
        (files / "old.json").write_text("{}")
        with EmaClient(server.zmq, run="r", averages=["raw"], files=files, when_behind="wait") as client:
            client.update(model, 1)
            client.checkpoint(1)
            first = reader.version("r", "raw")
            reader.report(first, {"accuracy": 0.75})
            with push(server, outside, tmp_path / "hf", "r/raw") as process:
                assert process.wait(_PUSH_S) == 0, list(process.errors)
                assert process.lines[-1] == f"{outside.url}/owner/model"
            found = outside.repositories["owner/model"]
            pushed = dict(found.files)
            files_of_run = {"README.md", "model.safetensors", "old.json", "version.json"}
        with EmaClient(server.zmq, run="r", averages=["raw"], files=[], when_behind="wait") as client:
            client.update(model, 2)
            client.checkpoint(2)
        second = reader.version("r", "raw")
        found.files["LICENSE"] = b"of the owner"
        for _ in range(2):  # again: the tag exists
            with push(server, outside, tmp_path / "hf", "r/raw") as process:
                assert process.wait(_PUSH_S) == 0, list(process.errors)
        weights = reader.download(second, tmp_path / "second") / "model.safetensors"

        assert set(pushed) == files_of_run
        assert found.private
        card = huggingface_hub.ModelCard(pushed["README.md"].decode(), ignore_metadata_errors=False)
        assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [("accuracy", 0.75)]
        assert first.id in card.text
        assert set(found.files) == {*files_of_run, "LICENSE"} - {"old.json"}
        assert found.files["model.safetensors"] == weights.read_bytes()
    assert found.tags == {"step-1": found.commits[0][0], "step-2": found.commits[-1][0]}
    assert [message for _, message in found.commits][:2] == [str(first), str(second)]
    assert outside.tokens == {"Bearer hf_token"}


def test_public_repository_is_made_when_asked(outside: Hub, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "data") as server:
        with EmaClient(server.zmq, run="r", averages=["raw"], when_behind="wait") as client:
            client.update(torch.nn.Linear(4, 4), 1)
        with push(server, outside, tmp_path / "hf", "r/raw", "--public") as process:
            assert process.wait(_PUSH_S) == 0, list(process.errors)

    assert not outside.repositories["owner/model"].private
