"""The container files agree with the code and with each other; what runs them is `scripts/compose-check.sh`."""

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

from ema_cli.app import build
from ema_cli.demo.train import parse
from ema_reader.evaluation.user_function import import_function
from ema_reader.reader import DEFAULT_URL
from ema_server.config import ServerConfig, split_host_port
from ema_server.http.listener import GRACEFUL_S
from ema_server.server import INGEST_STOP_S, PUBLISH_STOP_S

_ROOT = Path(__file__).parents[1]
_DOCKERFILE = (_ROOT / "Dockerfile").read_text()
_COMPOSE = (_ROOT / "docker-compose.yml").read_text()
_GPU = (_ROOT / "docker-compose.gpu.yml").read_text()
_CHECK = _ROOT / "scripts" / "compose-check.sh"
_CONTAINERS = (_ROOT / "docs" / "guides" / "containers.md").read_text()
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())
_OF_THE_IMAGE = {"EMA_ZMQ", "EMA_HTTP", "EMA_DATA"}


def _compose() -> tuple[str, ...] | None:
    """Compose's command, where there is one."""
    if shutil.which("docker-compose") is not None:
        return ("docker-compose",)
    if shutil.which("docker") is None:
        return None
    known = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=30)
    return ("docker", "compose") if known.returncode == 0 else None


def _service(name: str) -> str:
    """The lines of one service."""
    services = re.split(r"^services:\n", _COMPOSE, flags=re.MULTILINE)[1]
    found = re.search(rf"^  {name}:\n((?:    .*\n|\n)+)", services, flags=re.MULTILINE)
    assert found is not None, name
    return found[1]


def _image_environment() -> dict[str, str]:
    return dict(re.findall(r"(EMA_[A-Z_]+)=(\S+)", _DOCKERFILE))


def _default(text: str) -> str:
    """`text` as compose reads it where no variable is set."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


def _command(service: str) -> list[str]:
    """The words of a service's `command`."""
    found = re.search(r"^    command: \[(.*)\]$", _service(service), flags=re.MULTILINE)
    assert found is not None
    return [_default(word.strip().strip('"')) for word in found[1].split(", ")]


def test_what_the_image_sets_is_what_the_server_reads() -> None:
    environment = _image_environment()
    config = ServerConfig(
        data=Path(environment["EMA_DATA"]), zmq=environment["EMA_ZMQ"], http=environment["EMA_HTTP"], token="secret"
    )

    assert set(environment) == _OF_THE_IMAGE
    assert config.data.is_absolute()
    assert config.http_port == split_host_port("url", DEFAULT_URL.partition("//")[2])[1]  # where healthcheck looks


def test_every_setting_of_the_server_can_be_given_to_the_service() -> None:
    group: Any = typer.main.get_command(build())
    offered = {option.envvar for option in group.commands["serve"].params if option.envvar}
    passed = set(re.findall(r"^      (EMA_\w+):", _service("ema"), flags=re.MULTILINE))

    assert offered - passed == _OF_THE_IMAGE | {"EMA_INSECURE"}
    assert passed - offered == set()


def test_the_ports_are_those_of_the_image_and_open_to_this_machine_only() -> None:
    environment = _image_environment()
    inside = {environment["EMA_ZMQ"].rpartition(":")[2], environment["EMA_HTTP"].rpartition(":")[2]}
    published = [_default(line) for line in re.findall(r"^      - (.*:\d+)$", _service("ema"), flags=re.MULTILINE)]

    assert published == [f"127.0.0.1:{port}:{port}" for port in sorted(inside)]
    assert f"EXPOSE {' '.join(sorted(inside))}" in _DOCKERFILE
    assert "ports:" not in _service("demo-trainer") + _service("demo-evaluator")


def test_the_volume_is_where_the_data_is() -> None:
    data = _image_environment()["EMA_DATA"]

    assert f"      - ema-data:{data}\n" in _service("ema")
    assert f"--owner=10001 --group=10001 {data}\n" in _DOCKERFILE  # a new volume takes its owner from there


@pytest.mark.parametrize("name", ["ema", "demo-trainer", "demo-evaluator"])
def test_every_service_is_contained(name: str) -> None:
    contained = re.search(r"^x-contained: &contained\n((?:  .*\n)+)", _COMPOSE, flags=re.MULTILINE)

    assert contained is not None
    for line in ("init: true", 'user: "10001:10001"', "read_only: true", "tmpfs: [/tmp]", "cap_drop: [ALL]"):
        assert f"  {line}\n" in contained[1]
    assert '  security_opt: ["no-new-privileges:true"]\n' in contained[1]
    assert re.search(r"<<: \*(contained|demo)\n", _service(name))


def test_the_grace_is_longer_than_the_longest_last_publish() -> None:
    minutes = re.search(r"stop_grace_period: (\d+)m\n", _service("ema"))

    assert minutes is not None
    assert int(minutes[1]) * 60 > INGEST_STOP_S + PUBLISH_STOP_S + GRACEFUL_S


def test_a_token_is_needed_to_start_anything() -> None:
    assert "EMA_TOKEN: ${EMA_TOKEN:?" in _service("ema")


def test_trainer_and_evaluator_are_those_of_the_demo() -> None:
    job = parse(_command("demo-trainer"))
    evaluate, function, option, run = _command("demo-evaluator")

    assert "entrypoint: [python, -m, ema_cli.demo.train]\n" in _service("demo-trainer")
    assert (job.endpoint, job.record) == (None, None)
    assert (evaluate, option, run) == ("evaluate", "--run", job.run)
    assert callable(import_function(function))


def test_the_defaults_of_the_image_are_said_the_same_everywhere() -> None:
    makefile = (_ROOT / "Makefile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", _DOCKERFILE, flags=re.MULTILINE))
    composed = dict(re.findall(r"^  (BASE_IMAGE|TORCH_VERSION|TORCH_INDEX): (.*)$", _COMPOSE, flags=re.MULTILINE))

    assert arguments == {name: _default(value) for name, value in composed.items()} | {"EXTRAS": "server"}
    assert re.search(rf"^TORCH +\?= {re.escape(arguments['TORCH_VERSION'])}$", makefile, flags=re.MULTILINE)
    for text in (makefile, _CHECK.read_text()):
        assert re.search(rf"^INDEX *:?= ?{re.escape(arguments['TORCH_INDEX'])}$", text, flags=re.MULTILINE)
    assert "EXTRAS: demo\n" in _COMPOSE
    assert {"server", "demo"} <= set(_PROJECT["project"]["optional-dependencies"])


def test_the_build_sees_what_the_wheel_is_made_of_and_nothing_else() -> None:
    allowed = re.findall(r"^!(.*)$", (_ROOT / ".dockerignore").read_text(), flags=re.MULTILINE)
    project = _PROJECT["project"]
    made_of = _PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

    assert "\n*\n" in (_ROOT / ".dockerignore").read_text()
    assert set(allowed) == {"pyproject.toml", project["readme"], *project["license-files"], *made_of}


def test_the_file_for_a_gpu_adds_to_the_servers_service_and_to_nothing_else() -> None:
    """Compose 1.29 knows neither `gpus:` nor a `name:` of the project."""
    (service,) = re.findall(r"^  ([\w-]+):$", _GPU, flags=re.MULTILINE)
    device = re.search(r"EMA_DEVICE: (.*)$", _GPU, flags=re.MULTILINE)

    assert service == "ema"
    assert device is not None
    assert ServerConfig(Path("data"), device=_default(device[1])).device == "cuda"
    assert re.search(r"^        TORCH_INDEX: \$\{TORCH_CUDA_INDEX-", _GPU, flags=re.MULTILINE)
    assert "ARG TORCH_INDEX=" in _DOCKERFILE
    assert re.search(r"reservations:\n +devices:\n +- driver: nvidia\n +count: 1\n +capabilities: \[gpu\]\n", _GPU)
    assert re.findall(r"^(?:name|version):|gpus:", _GPU, flags=re.MULTILINE) == []


@pytest.mark.skipif(_compose() is None, reason="needs docker compose")
@pytest.mark.parametrize(
    "files", [("docker-compose.yml",), ("docker-compose.yml", "docker-compose.gpu.yml")], ids="+".join
)
def test_compose_takes_the_files(files: tuple[str, ...]) -> None:
    """It reads and merges them; no engine is asked."""
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


def test_the_snippet_for_ones_own_evaluation_mounts_it_where_the_server_looks() -> None:
    page = (_ROOT / "docs" / "guides" / "evaluation.md").read_text()
    place = re.search(r"^      PYTHONPATH: (\S+)", _service("ema"), flags=re.MULTILINE)

    assert place is not None
    assert re.search(rf"^      - \./my_evaluation\.py:{place[1]}/my_evaluation\.py:ro$", page, flags=re.MULTILINE)
    assert "EMA_EVALUATE=my_evaluation:evaluate" in page


def test_the_snippet_for_ones_own_trainer_uses_what_there_is() -> None:
    section = re.split(r"^## Beside your own training container$", _CONTAINERS, flags=re.MULTILINE)[1].split("\n## ")[0]
    snippet = re.search(r"^```yaml\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)

    assert snippet is not None
    names = re.findall(r"^  ([\w-]+):$", snippet[1], flags=re.MULTILINE)
    assert [name for name in names if f"\n  {name}:\n" in _COMPOSE] == []  # compose would merge the two
    assert re.search(r"^      EMA_ENDPOINT: tcp://ema:5555( +#.*)?$", snippet[1], flags=re.MULTILINE)
    assert re.search(r"^      EMA_TOKEN: \$\{EMA_TOKEN\}$", snippet[1], flags=re.MULTILINE)
    assert "condition: service_healthy" in snippet[1]


@pytest.mark.process
def test_the_check_is_a_script_that_bash_can_read() -> None:
    assert _CHECK.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", _CHECK], check=True, timeout=30)
