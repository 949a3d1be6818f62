"""Each setting, command, endpoint, metric and reject code is documented in one place; documents and code agree."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from ema_cli.app import build
from ema_proto.errors import RejectCode
from ema_reader import Reader
from ema_server.http.routes.prometheus import render
from support.served import Served
from trainer_client import EmaClient

_ROOT = Path(__file__).parents[1]
_README = (_ROOT / "README.md").read_text()
_REFERENCE = (_ROOT / "docs" / "reference.md").read_text()
_WITHOUT_JSON = {"serve"}


def _table(text: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table under a heading, without its head."""
    section = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    lines = re.split(r"^#", section, flags=re.MULTILINE)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def _named(text: str, heading: str) -> list[str]:
    """What the first column of a table names, without its backticks."""
    return [row[0].strip("`") for row in _table(text, heading)]


def _options(command: str) -> dict[str, Any]:
    """The options of a command by their long name."""
    group: Any = typer.main.get_command(build())
    return {param.opts[0]: param for param in group.commands[command].params if param.opts[0].startswith("--")}


def _shown(default: object) -> str:
    """A default as the tables show it; settings without one are shown by a word of their own."""
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def test_every_command_is_in_the_reference() -> None:
    group: Any = typer.main.get_command(build())

    assert [f"ema {name}" for name in group.commands] == _named(_REFERENCE, "Commands")


@pytest.mark.parametrize("kind", [EmaClient, Reader])
def test_every_public_method_is_in_the_reference(kind: type) -> None:
    shown = [name for row in _table(_REFERENCE, kind.__name__) for name in re.findall(r"`(\w+)`", row[0])]
    methods = [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")]

    assert sorted(shown) == sorted(methods)


def test_every_command_that_prints_data_can_print_json() -> None:
    group: Any = typer.main.get_command(build())

    assert [name for name in group.commands if "--json" not in _options(name)] == sorted(_WITHOUT_JSON)


def test_every_endpoint_is_in_the_reference() -> None:
    paths: Mapping[str, Mapping[str, Any]] = json.loads((_ROOT / "proto" / "openapi.json").read_text())["paths"]

    offered = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert offered == set(_named(_REFERENCE, "Endpoints"))


def test_every_metric_is_in_the_reference(tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.publish("run", 3)
    served.telemetry.http_requests.labels("/v1/runs", "200").inc()

    text = render(served.services).decode()
    served.close()

    exposed = set(re.findall(r"^(ema_\w+)(?:\{| )", text, flags=re.MULTILINE))
    assert exposed == set(_named(_REFERENCE, "Metrics"))


def test_every_reject_code_is_in_the_specification() -> None:
    specification = (_ROOT / "proto" / "SPEC.md").read_text()

    assert [code.value for code in RejectCode if f"`{code.value}`" not in specification] == []


def test_every_setting_of_the_server_is_in_the_readme() -> None:
    options = _options("serve")

    assert [row[0].strip("`").split()[0] for row in _table(_README, "Server")] == list(options)


@pytest.mark.parametrize("row", _table(_README, "Server"), ids=lambda row: row[0])
def test_a_setting_of_the_server_is_documented_as_it_is(row: list[str]) -> None:
    name, variable, default, _ = row
    option = _options("serve")[name.strip("`").split()[0]]

    assert variable == f"`{option.envvar}`"
    if default.startswith("`"):
        assert default == _shown(option.default)
    else:
        assert option.required or option.default in (None, False)


def test_every_setting_of_the_trainer_is_in_the_readme() -> None:
    parameters = list(inspect.signature(EmaClient).parameters)

    assert _named(_README, "Trainer") == parameters


@pytest.mark.parametrize("row", _table(_README, "Trainer"), ids=lambda row: row[0])
def test_a_setting_of_the_trainer_is_documented_as_it_is(row: list[str]) -> None:
    name, default, _ = row
    actual = inspect.signature(EmaClient).parameters[name.strip("`")].default

    if actual is None:
        assert not default.startswith("`") or default.startswith("`EMA_")
    elif isinstance(actual, tuple):
        assert default == f"`{json.dumps(list(actual))}`"
    else:
        assert default == f"`{json.dumps(actual)}`"


def test_every_setting_of_the_reader_is_in_the_readme() -> None:
    parameters = [name for name in inspect.signature(Reader).parameters if name != "self"]

    assert _named(_README, "Reader") == parameters


def test_every_variable_that_is_documented_is_read_by_the_code() -> None:
    folders = ("trainer_client", "ema_server", "ema_reader", "ema_cli")
    sources = [path.read_text() for folder in folders for path in (_ROOT / folder).rglob("*.py")]
    read = set(re.findall(r"\"(EMA_[A-Z_]+)\"", "\n".join(sources)))
    read |= {option.envvar for option in _options("serve").values() if option.envvar}

    assert set(re.findall(r"`(EMA_[A-Z_]+)`", _README)) == read


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/guides/averages.md",
        "docs/guides/troubleshooting.md",
        "docs/reference.md",
        "docs/guides/timm.md",
        "docs/guides/evaluation.md",
        "proto/SPEC.md",
    ],
)
def test_every_link_to_a_file_leads_somewhere(document: str) -> None:
    place = (_ROOT / document).parent
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", (_ROOT / document).read_text())

    assert [link for link in links if not (place / link).exists()] == []


def test_the_trainers_script_in_the_readme_is_the_example() -> None:
    example = (_ROOT / "examples" / "train_digits.py").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", _README, flags=re.MULTILINE | re.DOTALL)

    ours = [line.strip() for line in example.splitlines() if "  # ema" in line]
    assert len(ours) == 4
    assert any(all(line.partition("  #")[0] in block for line in ours) for block in blocks)
