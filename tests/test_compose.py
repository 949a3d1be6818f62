"""The container files agree with the code and with each other; `scripts/compose-check.sh` runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ema_cli.app import build
from ema_cli.demo.train import parse
from ema_reader.evaluation.user_function import import_function
from ema_reader.reader import DEFAULT_URL
from ema_server.config import ServerConfig, setting_types, split_host_port, variable_of
from ema_server.http.listener import GRACEFUL_S
from ema_server.server import INGEST_STOP_S, PUBLISH_STOP_S

_ROOT = Path(__file__).parents[1]
_DOCKERFILE = (_ROOT / "Dockerfile").read_text()
_COMPOSE: Any = yaml.safe_load((_ROOT / "docker-compose.yml").read_text())
_SERVICES: Any = _COMPOSE["services"]
_DEMO: Any = yaml.safe_load((_ROOT / "docker-compose.demo.yml").read_text())
_CHECKED: Any = yaml.safe_load((_ROOT / "scripts" / "compose-check.yml").read_text())
_ALL = {**_SERVICES, **_DEMO["services"], **_CHECKED["services"]}
_GPU: Any = yaml.safe_load((_ROOT / "docker-compose.gpu.yml").read_text())
_CHECK = _ROOT / "scripts" / "compose-check.sh"
_CONTAINERS = (_ROOT / "docs" / "guides" / "containers.md").read_text()
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())
_OF_THE_IMAGE = {"EMA_ZMQ", "EMA_HTTP", "EMA_DATA", "EMA_SHM_FOLDER"}


def _compose() -> tuple[str, ...] | None:
    """Compose's command, if it is installed."""
    if shutil.which("docker-compose") is not None:
        return ("docker-compose",)
    if shutil.which("docker") is None:
        return None
    known = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=30)
    return ("docker", "compose") if known.returncode == 0 else None


def _image_environment() -> dict[str, str]:
    return dict(re.findall(r"(EMA_[A-Z_]+)=(\S+)", _DOCKERFILE))


def _default(text: str) -> str:
    """`text` as compose reads it if no variable is set."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


def _command(service: str) -> list[str]:
    return [_default(word) for word in _ALL[service]["command"]]


def test_server_reads_the_variables_of_the_image() -> None:
    environment = _image_environment()
    config = ServerConfig(
        data=Path(environment["EMA_DATA"]), zmq=environment["EMA_ZMQ"], http=environment["EMA_HTTP"], token="secret"
    )

    assert set(environment) == _OF_THE_IMAGE
    assert config.data.is_absolute()
    assert config.http_port == split_host_port("url", DEFAULT_URL.partition("//")[2])[1]  # where healthcheck looks


def test_service_passes_every_setting_of_the_server() -> None:
    read = {variable_of(name) for name in setting_types()}
    passed = {name for name in _SERVICES["ema"]["environment"] if name.startswith("EMA_")}

    assert passed == read - _OF_THE_IMAGE - {"EMA_INSECURE"}


def test_ports_are_those_of_the_image_and_local() -> None:
    environment = _image_environment()
    inside = sorted(environment[name].rpartition(":")[2] for name in ("EMA_ZMQ", "EMA_HTTP"))

    assert [_default(port) for port in _SERVICES["ema"]["ports"]] == [f"127.0.0.1:{port}:{port}" for port in inside]
    assert f"EXPOSE {' '.join(inside)}" in _DOCKERFILE
    assert [name for name, service in _ALL.items() if "ports" in service] == ["ema"]


def test_volumes_are_the_data_folder_and_that_of_the_socket() -> None:
    environment = _image_environment()
    data, sockets = environment["EMA_DATA"], environment["EMA_SHM_FOLDER"]

    assert _SERVICES["ema"]["volumes"] == [f"ema-data:{data}", f"ema-sockets:{sockets}"]
    assert list(_COMPOSE["volumes"]) == ["ema-data", "ema-sockets"]
    assert _ALL["trainer"]["volumes"] == [f"ema-sockets:{sockets}"]
    assert f"- ema-sockets:{sockets} " in _CONTAINERS
    # A new volume takes its owner from there.
    assert f"--owner=10001 --group=10001 {data} " in _DOCKERFILE
    assert f"--owner=10001 --group=10001 --mode=0700 {sockets}\n" in _DOCKERFILE


@pytest.mark.parametrize("name", _ALL)
def test_every_service_is_contained(name: str) -> None:
    expected = {
        "init": True,
        "user": "10001:10001",
        "read_only": True,
        "tmpfs": ["/tmp"],  # noqa: S108
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }

    assert {key: _ALL[name][key] for key in expected} == expected


def test_grace_period_exceeds_the_longest_last_publish() -> None:
    minutes = re.fullmatch(r"(\d+)m", _SERVICES["ema"]["stop_grace_period"])

    assert minutes is not None
    assert int(minutes[1]) * 60 > INGEST_STOP_S + PUBLISH_STOP_S + GRACEFUL_S


def test_server_does_not_start_without_a_token() -> None:
    assert _SERVICES["ema"]["environment"]["EMA_TOKEN"].startswith("${EMA_TOKEN:?")


def test_trainer_and_evaluator_are_those_of_the_demo() -> None:
    job = parse([word.replace("${CHECK_STEPS}", "10") for word in _command("trainer")])
    evaluate, function, option, run = _command("evaluator")

    assert _ALL["trainer"]["entrypoint"] == ["python", "-m", "ema_cli.demo.train"]
    assert (job.endpoint, job.record) == (None, None)
    assert (evaluate, option, run) == ("evaluate", "--run", job.run)
    assert callable(import_function(function))


def test_image_defaults_are_the_same_in_every_file() -> None:
    makefile = (_ROOT / "Makefile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", _DOCKERFILE, flags=re.MULTILINE))
    composed = {name: _default(value) for name, value in _SERVICES["ema"]["build"]["args"].items()}

    assert arguments == composed | {"EXTRAS": "server"}
    assert re.search(rf"^TORCH +\?= {re.escape(arguments['TORCH_VERSION'])}$", makefile, flags=re.MULTILINE)
    for text in (makefile, _CHECK.read_text()):
        assert re.search(rf"^INDEX *:?= ?{re.escape(arguments['TORCH_INDEX'])}$", text, flags=re.MULTILINE)
    assert _DEMO["services"]["demo"]["build"]["args"] == _SERVICES["ema"]["build"]["args"] | {"EXTRAS": "demo"}
    assert {_ALL[name]["image"] for name in ("trainer", "evaluator")} == {_DEMO["services"]["demo"]["image"]}
    assert {"server", "demo"} <= set(_PROJECT["project"]["optional-dependencies"])


def test_demo_shares_nothing_with_a_server_beside_it() -> None:
    (demo,) = _DEMO["services"].values()
    command, *arguments = _command("demo")
    group: Any = typer.main.get_command(build())
    options = group.commands[command].make_context(command, arguments).params

    assert set(_DEMO["services"]) & set(_SERVICES) == set()
    assert set(_DEMO["volumes"]) & set(_COMPOSE["volumes"]) == set()
    assert demo["image"] != _SERVICES["ema"]["image"]
    assert demo["volumes"] == [f"demo-data:{options['folder']}"]
    assert "restart" not in demo  # it ends without a stop


def test_build_context_is_the_content_of_the_wheel() -> None:
    ignored = (_ROOT / ".dockerignore").read_text()
    project = _PROJECT["project"]
    packages = _PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

    assert "\n*\n" in ignored
    allowed = set(re.findall(r"^!(.*)$", ignored, flags=re.MULTILINE))
    assert allowed == {"pyproject.toml", project["readme"], *project["license-files"], *packages}


def test_gpu_file_changes_only_the_server() -> None:
    """Compose 1.29 knows neither `gpus:` nor a `name:` of the project."""
    service = _GPU["services"]["ema"]

    assert (list(_GPU), list(_GPU["services"])) == (["services"], ["ema"])
    assert set(service) == {"image", "build", "environment", "deploy"}
    assert ServerConfig(device=_default(service["environment"]["EMA_DEVICE"])).device == "cuda"
    assert service["build"]["args"] == {"TORCH_INDEX": "${TORCH_CUDA_INDEX-}"}
    assert "ARG TORCH_INDEX=" in _DOCKERFILE
    device = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert service["deploy"]["resources"]["reservations"]["devices"] == [device]


@pytest.mark.process
@pytest.mark.skipif(_compose() is None, reason="needs docker compose")
@pytest.mark.parametrize(
    "files", [("docker-compose.yml",), ("docker-compose.yml", "docker-compose.gpu.yml")], ids="+".join
)
def test_compose_accepts_the_files(files: tuple[str, ...]) -> None:
    """It reads and merges them without a container engine."""
    done = subprocess.run(
        [*(_compose() or ()), *(word for file in files for word in ("-f", file)), "config"],
        cwd=_ROOT,
        env={**os.environ, "EMA_TOKEN": "secret"},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    on_gpu = len(files) > 1
    assert ("driver: nvidia" in done.stdout) == on_gpu
    assert ("EMA_DEVICE: cuda" in done.stdout) == on_gpu
    assert ("image: ema-sidecar-cuda" in done.stdout) == on_gpu
    assert done.stdout.count("stop_grace_period") == 1


def test_evaluation_snippet_mounts_the_function_in_the_import_path() -> None:
    page = (_ROOT / "docs" / "guides" / "evaluation.md").read_text()
    folder = _SERVICES["ema"]["environment"]["PYTHONPATH"]

    assert re.search(rf"^      - \./my_evaluation\.py:{folder}/my_evaluation\.py:ro$", page, flags=re.MULTILINE)
    assert "EMA_EVALUATE=my_evaluation:evaluate" in page


def test_trainer_snippet_connects_to_the_service() -> None:
    section = re.split(r"^## Beside your own training container$", _CONTAINERS, flags=re.MULTILINE)[1].split("\n## ")[0]
    snippet = re.search(r"^```yaml\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)

    assert snippet is not None
    services = yaml.safe_load(snippet[1])["services"]
    assert set(services) & set(_SERVICES) == set()  # compose would merge services of one name
    (trainer,) = services.values()
    assert trainer["environment"] == {"EMA_ENDPOINT": "tcp://ema:5555", "EMA_TOKEN": "${EMA_TOKEN}"}
    assert trainer["depends_on"] == {"ema": {"condition": "service_healthy"}}


@pytest.mark.process
def test_check_is_a_valid_bash_script() -> None:
    assert _CHECK.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", _CHECK], check=True, timeout=30)
