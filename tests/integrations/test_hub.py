"""Clients of the Hugging Face Hub, unmodified, with HF_ENDPOINT at a real server: they load what was averaged."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from ema_reader import File, Reader
from support.hub_clients import digests
from support.processes import SUPPORT, Process, ServerProcess
from support.recording_proxy import Recorded, recording
from support.reverse_proxy import nginx
from support.small_llama import write_small_llama
from support.small_unet import small_unet
from support.stand_in_hub import Repository, hub
from trainer_client import EmaClient

pytest.importorskip("huggingface_hub")

pytestmark = pytest.mark.timeout(300)  # the imports of a client take half a minute on a busy machine

_SCRIPT = str(SUPPORT / "hub_clients.py")
_CLIENT_S = 250.0
_NOWHERE = "http://127.0.0.1:9"  # what is not sent to HF_ENDPOINT fails


def publish(server: ServerProcess, run: str, model: Any, token: str | None = None, **given: Any) -> None:
    """Stream three steps of a model, and publish the second and the third."""
    averages = ["raw", "ema:0.5,name=ema"]
    with (
        EmaClient(server.zmq, run=run, averages=averages, token=token, when_behind="wait", **given) as client,
        torch.no_grad(),
    ):
        for step in (1, 2, 3):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
            client.update(model, step)
            if step == 2:
                client.checkpoint(step)
        client.finish()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the run `plain`, whose weights take 1 MB."""
    with ServerProcess(tmp_path_factory.mktemp("hub") / "data") as process:
        publish(process, "plain", torch.nn.Linear(512, 512), config={"own": 1})
        yield process


@pytest.fixture
def proxy(server: ServerProcess) -> Iterator[Recorded]:
    with recording(server.http) as recorded:
        yield recorded


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "hf"


def started(url: str, home: Path, *command: str, token: str | None = None) -> Process:
    variables = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HTTP_PROXY": _NOWHERE,
        "HTTPS_PROXY": _NOWHERE,
        "NO_PROXY": "127.0.0.1",
        **({} if token is None else {"HF_TOKEN": token}),
    }
    return Process(*command, env=variables)


def result(url: str, home: Path, *arguments: str) -> Any:
    """What a client of `support.hub_clients` returns."""
    with started(url, home, _SCRIPT, *arguments) as process:
        line = process.wait_line(lambda line: line.startswith('{"result"'), _CLIENT_S)
        return json.loads(line)["result"]


def loaded(server: ServerProcess, run: str, average: str, rev: str) -> dict[str, str]:
    """The digests of the tensors of a version, read without the Hub's protocol."""
    with Reader(server.http) as reader:
        return digests(reader.load(reader.version(run, average, rev)))


def version_id(server: ServerProcess, run: str, average: str, rev: str = "latest") -> str:
    with Reader(server.http) as reader:
        return reader.version(run, average, rev).id


def file_of(server: ServerProcess, run: str, name: str) -> File:
    """A file of the newest version of the average `ema`."""
    with Reader(server.http) as reader:
        found = reader.version(run, "ema").file(name)
    assert found is not None
    return found


def test_calls_of_the_api_describe_the_average(server: ServerProcess, home: Path) -> None:
    newest, older = (version_id(server, "plain", "ema", rev) for rev in ("latest", "step-2"))
    wanted = file_of(server, "plain", "config.json")
    body = {"metrics": {"accuracy": 0.75}}
    path = f"/v1/runs/plain/averages/ema/versions/{newest}/metrics"
    httpx2.post(f"{server.http}{path}", json=body).raise_for_status()

    found = result(server.http, home, "api", "plain/ema")

    files = {"README.md", "config.json", "model.safetensors", "version.json"}
    assert (found["sha"], found["branches"]) == (newest, {"main": newest})
    assert sorted(found["listed"]) == ["plain/ema", "plain/raw"]
    assert found["tags"] == {"step-3": newest, "step-2": older}
    assert set(found["files"]) == set(found["siblings"]) == set(found["tree"]) == files
    assert found["siblings"]["config.json"] == wanted.size
    assert found["paths_info"] == ["config.json"]
    assert (found["tensors"], found["parameters"]) == (["bias", "weight"], 512 * 513)
    assert found["scores"] == {"accuracy": 0.75}
    assert found["exist"] == [True, False, True, False, True, False]
    assert found["errors"] == [
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "EntryNotFoundError",
        "EntryNotFoundError",
    ]


def test_file_is_downloaded_once_and_by_the_version(server: ServerProcess, proxy: Recorded, home: Path) -> None:
    sha = version_id(server, "plain", "ema")
    arguments = ("download", "plain/ema", "model.safetensors")

    path = Path(result(proxy.url, home, *arguments, "main"))
    first = [request[:2] for request in proxy.requests]
    proxy.requests.clear()
    again = Path(result(proxy.url, home, *arguments, "main"))
    second = [request[:2] for request in proxy.requests]
    proxy.requests.clear()
    by_version = Path(result(proxy.url, home, *arguments, sha))

    alias, fixed = (f"/plain/ema/resolve/{rev}/model.safetensors" for rev in ("main", sha))
    assert [request for request in first if "/resolve/" in request[1]] == [
        ("HEAD", alias),
        ("HEAD", fixed),
        ("GET", fixed),
    ]
    assert [request for request in second if "/resolve/" in request[1]] == [("HEAD", alias), ("HEAD", fixed)]
    assert [request for request in proxy.requests if "/resolve/" in request[1]] == []
    assert path == again == by_version
    assert path.parent.name == sha
    wanted = file_of(server, "plain", "model.safetensors")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == wanted.sha256


def test_broken_download_is_resumed_from_the_version(server: ServerProcess, proxy: Recorded, home: Path) -> None:
    publish(server, "large", torch.nn.Linear(1700, 1700))  # more than one piece of 10 MiB, which clients write
    sha = version_id(server, "large", "ema")
    proxy.break_after = 11_000_000

    path = Path(result(proxy.url, home, "download", "large/ema", "model.safetensors", "main"))

    gets = [request for request in proxy.requests if request[0] == "GET" and "/resolve/" in request[1]]
    assert {request[1] for request in gets} == {f"/large/ema/resolve/{sha}/model.safetensors"}
    assert [request[2] for request in gets] == [None, f"bytes={10 << 20}-"]
    assert proxy.statuses[-1] == 206
    wanted = file_of(server, "large", "model.safetensors")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == wanted.sha256


def test_snapshot_follows_main_and_keeps_the_files_of_each_version(server: ServerProcess, home: Path) -> None:
    model = torch.nn.Linear(4, 4)
    with EmaClient(server.zmq, run="moving", averages=["raw"], when_behind="wait") as client:
        client.update(model, 1)
        client.checkpoint(1)
        first = Path(result(server.http, home, "snapshot", "moving/raw", "main"))
        with torch.no_grad():
            model.weight.add_(1.0)
        client.update(model, 2)
        client.checkpoint(2)
        second = Path(result(server.http, home, "snapshot", "moving/raw", "main"))
    again = Path(result(server.http, home, "snapshot", "moving/raw", "step-1"))

    assert first == again != second
    assert second.name == version_id(server, "moving", "raw")
    names = {"README.md", "model.safetensors", "version.json"}
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()} == names
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()


def test_command_line_downloads_with_the_token(tmp_path: Path, home: Path) -> None:
    with ServerProcess(tmp_path / "data", "--token", "secret") as server:
        publish(server, "plain", torch.nn.Linear(4, 4), token="secret")
        command = ("-m", "huggingface_hub.cli.hf", "download", "plain/ema", "--local-dir")
        with started(server.http, home, *command, str(tmp_path / "with"), token="secret") as process:
            assert process.wait(_CLIENT_S) == 0, "\n".join(process.errors)
        with started(server.http, home, *command, str(tmp_path / "without"), token="hf_other") as process:
            assert process.wait(_CLIENT_S) != 0
            output = "\n".join([*process.lines, *process.errors])

    assert (tmp_path / "with" / "model.safetensors").stat().st_size > 0
    assert not (tmp_path / "without" / "model.safetensors").exists()
    assert "HF_TOKEN" in output


def test_clients_reach_the_server_below_the_prefix_of_a_proxy(
    server: ServerProcess, home: Path, tmp_path: Path
) -> None:
    with nginx(server.http, tmp_path / "proxy") as address:
        path = Path(result(address, home, "download", "plain/ema", "config.json", "main"))
        folder = Path(result(address, home, "snapshot", "plain/ema", "step-2"))

    assert json.loads(path.read_text()) == {"own": 1}
    assert folder.name == version_id(server, "plain", "ema", "step-2")


def test_other_repositories_come_from_the_hub_upstream(tmp_path: Path, home: Path) -> None:
    with hub() as upstream, ServerProcess(tmp_path / "data", "--hub-upstream", upstream.url) as server:
        publish(server, "plain", torch.nn.Linear(4, 4), config={"own": 1})
        files = {"config.json": b'{"other": 1}'}
        upstream.repositories["org/model"] = Repository(private=False, files=files, commits=[("1" * 40, "first")])

        found = result(server.http, home, "two_hubs", upstream.url, "plain/ema", "org/model")

    assert json.loads(Path(found["plain/ema"]).read_text()) == {"own": 1}
    assert json.loads(Path(found["org/model"]).read_text()) == {"other": 1}
    assert Path(found["org/model"]).parent.name == "1" * 40


@pytest.fixture(scope="module")
def language_model(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run of a causal language model with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = write_small_llama(tmp_path_factory.mktemp("llama"))
    publish(server, "lm", transformers.AutoModelForCausalLM.from_pretrained(folder), files=folder)
    return "lm"


def test_transformers_loads_model_and_tokenizer(server: ServerProcess, language_model: str, home: Path) -> None:
    newest, older = result(server.http, home, "transformers", f"{language_model}/ema", "main", "step-2")

    assert newest["digests"] == loaded(server, language_model, "ema", "latest")
    assert older["digests"] == loaded(server, language_model, "ema", "step-2")
    assert newest["tokens"] == older["tokens"] == [3, 5]


def test_inference_engines_find_and_download_the_weights(
    server: ServerProcess, language_model: str, home: Path
) -> None:
    found = result(server.http, home, "engine", f"{language_model}/ema", "step-2")

    assert found["digests"] == loaded(server, language_model, "ema", "step-2")
    names = {name.rpartition("/")[2] for name in found["listed"]}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names


def test_peft_loads_an_adapter_over_a_base_from_the_same_server(
    server: ServerProcess, language_model: str, home: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(write_small_llama(tmp_path / "base"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    publish(server, "adapter", peft.get_peft_model(base, config))

    found = result(server.http, home, "peft", f"{language_model}/raw", "adapter/ema", "step-2")

    assert found["digests"] == loaded(server, "adapter", "ema", "step-2")


def test_diffusers_loads_a_model(server: ServerProcess, home: Path) -> None:
    pytest.importorskip("diffusers")
    model = small_unet()
    publish(server, "unet", model, config=json.loads(model.to_json_string()))

    found = result(server.http, home, "diffusers", "unet/ema", "step-2")

    assert found["digests"] == loaded(server, "unet", "ema", "step-2")


def test_lm_eval_scores_a_version_and_notes_its_id(
    server: ServerProcess, language_model: str, home: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    tasks, data = tmp_path / "tasks", tmp_path / "data.jsonl"
    tasks.mkdir()
    rows = [{"q": f"w{i} w{i + 1}", "choices": [f"w{i}", f"w{i + 2}"], "label": i % 2} for i in range(1, 9)]
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tasks / "mine.yaml").write_text(json.dumps(task))
    command = ["-m", "lm_eval", "--model", "hf", "--tasks", "mine", "--include_path", str(tasks), "--device", "cpu"]
    command += ["--model_args", f"pretrained={language_model}/ema,revision=step-2,max_length=16"]

    with started(server.http, home, *command, "--output_path", str(tmp_path / "out")) as process:
        assert process.wait(_CLIENT_S) == 0, "\n".join(process.errors)

    [path] = (tmp_path / "out").rglob("results*.json")
    found = json.loads(path.read_text())
    assert 0 <= found["results"]["mine"]["acc,none"] <= 1
    assert found["config"]["model_sha"] == version_id(server, language_model, "ema", "step-2")


def test_timm_creates_a_model(server: ServerProcess, home: Path) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("timm requires torchvision")
    create: Callable[..., Any] = pytest.importorskip("timm").create_model
    publish(
        server, "vision", create("test_resnet", num_classes=3), config={"architecture": "test_resnet", "num_classes": 3}
    )

    found = result(server.http, home, "timm", "vision/ema", "step-2")

    assert found["digests"] == loaded(server, "vision", "ema", "step-2")
