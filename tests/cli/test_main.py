from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ema_cli.app import COMMANDS
from ema_cli.exits import EXIT_USAGE, missing_advice
from support.command import ema

_PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
_EXTRAS: dict[str, list[str]] = _PYPROJECT["project"]["optional-dependencies"]
_IMPORT_NAMES = {"pyzmq": "zmq", "scikit-learn": "sklearn"}
_SPEED_ONLY = {"httptools", "uvloop"}  # uvicorn works without them


def _packages(extra: str) -> set[str]:
    """Import names of an extra's packages, including nested extras of ours."""
    found: set[str] = set()
    for requirement in _EXTRAS[extra]:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)
        assert name is not None
        if name[0] == "ema-sidecar":
            inner = re.search(r"\[(.+)\]", requirement)
            assert inner is not None
            found.update(*(_packages(part) for part in inner[1].split(",")))
        else:
            found.add(_IMPORT_NAMES.get(name[0], name[0]))
    return found


@pytest.mark.parametrize("package", sorted(_packages("demo") - _SPEED_ONLY - {"torch"}))
def test_missing_package_names_its_extra(package: str) -> None:
    advice = missing_advice(ModuleNotFoundError(name=f"{package}.inner"))

    assert advice is not None
    extra = re.search(r"pip install '\.\[(\w+)\]'", advice)
    assert extra is not None
    assert package in _packages(extra[1])


def test_missing_module_of_ours_is_not_a_missing_extra() -> None:
    assert missing_advice(ModuleNotFoundError(name="ema_server.gone")) is None


def test_help_lists_commands_in_workflow_order() -> None:
    shown = ema("--help")

    listed = re.findall(r"^\W*(\w+)  ", shown.stdout.partition("Commands")[2], flags=re.MULTILINE)
    assert list(COMMANDS) == listed
    assert shown.returncode == 0


@pytest.mark.parametrize(
    ("missing", "arguments", "says"),
    [
        ("zmq", ["serve", "--data", "data"], ".[server]"),
        ("fastapi", ["serve", "--data", "data"], ".[server]"),
        ("httpx2", ["download", "run/average"], ".[reader]"),
        ("sklearn", ["demo", "--steps", "10"], ".[demo]"),
        ("typer", ["status"], ".[reader]"),
        ("typer", ["serve"], ".[server]"),
        ("typer", ["demo"], ".[demo]"),
        ("httpx2", ["demo"], ".[demo]"),
        ("rich", ["demo"], ".[demo]"),
    ],
)
def test_command_without_its_extra_prints_one_line_of_advice(
    tmp_path: Path, missing: str, arguments: list[str], says: str
) -> None:
    tried = ema(*arguments, missing=[missing], cwd=tmp_path)

    assert len(tried.stderr.splitlines()) == 1, tried.stderr
    assert missing in tried.stderr
    assert says in tried.stderr
    assert tried.stdout == ""
    assert tried.returncode == EXIT_USAGE


def test_missing_extra_leaves_other_commands_usable() -> None:
    shown = ema("versions", "--help", missing=["zmq", "fastapi", "sklearn", "torch"])

    assert shown.returncode == 0, shown.stderr
    assert "RUN[/AVERAGE]" in shown.stdout


def test_help_does_not_import_torch() -> None:
    program = "import sys; from ema_cli.app import build; build(); print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert {"torch", "fastapi", "sklearn"} & set(result.stdout.split()) == set()


def test_version_is_that_of_the_distribution() -> None:
    assert ema("--version").stdout.strip() == _PYPROJECT["project"]["version"]
