"""Each setting, command, endpoint, metric and reject code is documented in one place; documents and code agree.

The reference pages are generated: these tests check that the generated blocks name everything.
"""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

import ema_reader
import trainer_client
from ema_cli.app import build
from ema_proto.errors import RejectCode
from ema_reader import Reader
from ema_server.evaluation.metric_store import Report, Subject
from ema_server.http.problems import Code
from ema_server.http.routes.prometheus import render
from ema_server.runs.ranks import LastDropped
from support.scripts import script
from support.served import Served
from trainer_client import EmaClient

_ROOT = Path(__file__).parents[1]
_DOCS = _ROOT / "docs"
_README = (_ROOT / "README.md").read_text()
_README_LINES_MAX = 150
_WITHOUT_JSON = {"serve"}
_PAGES = sorted(_DOCS.rglob("*.md"))
_DOCUMENTS = [_ROOT / "README.md", _ROOT / "CONTRIBUTING.md", _ROOT / "proto" / "SPEC.md", *_PAGES]

reference = script("docs_reference")


def _name(path: Path) -> str:
    return str(path.relative_to(_ROOT))


def _commands() -> Mapping[str, Any]:
    group: Any = typer.main.get_command(build())
    commands: Mapping[str, Any] = group.commands
    return commands


def _options(command: str) -> list[str]:
    """The long names of a command's options."""
    params = _commands()[command].params
    return [param.opts[0] for param in params if param.param_type_name == "option" and not param.hidden]


def _named(text: str) -> list[str]:
    """The entries of the first column of a table, without its head."""
    return re.findall(r"^\| `([^`]+)`(?:<br>`\w+`)? \|", text, flags=re.MULTILINE)


def _headings(text: str, level: int) -> list[str]:
    return re.findall(rf"^{'#' * level} (.+)$", text, flags=re.MULTILINE)


def _code(markdown: str) -> list[str]:
    """The lines of indented code blocks, without their indentation."""
    return re.findall(r"^    (?! )(.+)$", markdown, flags=re.MULTILINE)


def test_every_generated_block_has_one_place() -> None:
    marks = [name for page in _PAGES for name in reference.MARK.findall(page.read_text())]

    assert sorted(marks) == sorted(reference.BLOCKS)


def test_mark_is_replaced_by_its_block() -> None:
    assert reference.fill("# Head\n\n<!-- generate: error-codes -->\n") == f"# Head\n\n{reference.error_codes()}\n"


def test_every_command_and_its_options_are_in_the_reference() -> None:
    block = reference.commands()

    assert [f"ema {name}" for name in _commands()] == _headings(block, 2)
    for name, section in zip(_commands(), re.split(r"^## ", block, flags=re.MULTILINE)[1:], strict=True):
        shown = [re.split("[ ,]", option)[0] for option in _named(section) if option.startswith("-")]
        assert [option for option in _options(name) if option != "--help"] == shown


def test_every_command_that_prints_data_can_print_json() -> None:
    assert [name for name in _commands() if "--json" not in _options(name)] == sorted(_WITHOUT_JSON)


def test_every_command_in_a_document_exists() -> None:
    named = {
        found
        for document in _DOCUMENTS
        for line in _code(document.read_text())
        for found in re.findall(r"(?:^|[$;&|] *)ema ([a-z]+)\b", line)
    }

    assert {"serve", "status", "download", "evaluate"} < named
    assert named - set(_commands()) == set()


def test_every_endpoint_is_in_the_reference() -> None:
    paths: Mapping[str, Mapping[str, Any]] = json.loads((_ROOT / "proto" / "openapi.json").read_text())["paths"]

    offered = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert offered == set(_headings(reference.endpoints(), 3))


def test_every_link_to_a_json_type_leads_to_its_description() -> None:
    types = {name.lower() for name in _headings(reference.json_types(), 3)}

    assert set(re.findall(r"\]\(#(\w+)\)", reference.endpoints() + reference.json_types())) <= types


def test_every_error_code_is_in_the_reference() -> None:
    assert _named(reference.error_codes()) == [code.value[0] for code in Code]


@pytest.mark.process
def test_every_metric_is_in_the_reference(tmp_path: Path) -> None:
    served = Served(tmp_path)
    version = served.publish("run", 3).versions[0]
    subject = Subject("run", version.average, version.id, version.step)
    served.services.usage.measure("run")
    served.services.ranks.joined("run", 2, is_new=True)
    served.services.lanes.joined("run", "shm")
    served.services.ranks.dropped("run", LastDropped(3, 1, "lost", "rank 1 is lost", "2026-01-01T00:00:00Z"))
    served.telemetry.http_requests.labels("/v1/runs", "200").inc()

    served.metrics.add(Report(subject, "default", None, {"top1": 0.5}, None, None, None, "2026-01-01T00:00:00Z"))

    text = render(served.services, served.metrics.newest().result(60)).decode()
    served.close()

    exposed = set(re.findall(r"^(ema_\w+)(?:\{| )", text, flags=re.MULTILINE))
    assert exposed == set(_named(reference.metrics()))


def test_every_extra_is_in_the_readme() -> None:
    extras = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    assert sorted(_named(_README[_README.index("## Extras") :])) == sorted(extras)


def test_every_reject_code_is_in_the_specification() -> None:
    specification = (_ROOT / "proto" / "SPEC.md").read_text()

    assert [code.value for code in RejectCode if f"`{code.value}`" not in specification] == []


def test_every_setting_is_in_the_reference() -> None:
    trainer, reader = (list(inspect.signature(kind).parameters) for kind in (EmaClient, Reader))

    assert _named(reference.server_settings()) == _options("serve")
    assert _named(reference.trainer_settings()) == trainer
    assert _named(reference.reader_settings()) == reader


def test_every_setting_is_described() -> None:
    tables = (reference.server_settings(), reference.trainer_settings(), reference.reader_settings())

    assert [row for table in tables for row in table.splitlines() if not row.removesuffix(" |").strip()] == []
    assert [row for table in tables for row in table.splitlines() if row.endswith("|  |")] == []


def test_every_documented_variable_is_read_by_the_code() -> None:
    folders = ("trainer_client", "ema_server", "ema_reader", "ema_cli")
    sources = [path.read_text() for folder in folders for path in (_ROOT / folder).rglob("*.py")]
    read = set(re.findall(r"\"(EMA_[A-Z_]+)\"", "\n".join(sources)))
    read |= {param.envvar for command in _commands().values() for param in command.params if param.envvar}
    tables = reference.server_settings() + reference.trainer_settings() + reference.reader_settings()
    tables += reference.commands()

    assert set(re.findall(r"`(EMA_[A-Z_]+)`", tables)) == read
    mentioned = {found for document in _DOCUMENTS for found in re.findall(r"`(EMA_[A-Z_]+)`", document.read_text())}
    assert mentioned <= read


@pytest.mark.parametrize("package", [trainer_client, ema_reader])
def test_every_export_is_on_the_python_page(package: Any) -> None:
    page = (_DOCS / "reference" / "python.md").read_text()
    shown = set(re.findall(rf"^::: {package.__name__}\.(\w+)$", page, flags=re.MULTILINE))

    assert set(package.__all__) <= shown


@pytest.mark.parametrize("document", _DOCUMENTS, ids=_name)
def test_every_file_link_resolves(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", document.read_text())

    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    pages = re.findall(r"[\w/-]+\.md$", (_ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)

    assert [_name(page) for page in _PAGES if str(page.relative_to(_DOCS)) not in pages] == []


def test_every_decision_is_in_the_list() -> None:
    decisions = _DOCS / "decisions"
    listed = re.findall(r"\((\d{4}-[\w-]+\.md)\)", (decisions / "README.md").read_text())

    assert listed == sorted(path.name for path in decisions.glob("[0-9]*.md"))


def test_every_path_in_the_architecture_exists() -> None:
    text = (_DOCS / "architecture.md").read_text()
    roots = "proto/|trainer_client/|ema_server/|ema_reader/|ema_cli/|tests/|docs/|scripts/"
    paths = re.findall(rf"`((?:{roots})[\w./]*)`", text)

    assert len(paths) > 60
    assert [path for path in paths if not (_ROOT / path).exists()] == []


def test_readme_is_short() -> None:
    assert len(_README.splitlines()) <= _README_LINES_MAX


@pytest.mark.parametrize("document", [_ROOT / "README.md", _DOCS / "start" / "quickstart.md"], ids=_name)
def test_documented_trainer_script_is_the_example(document: Path) -> None:
    example = (_ROOT / "examples" / "train_digits.py").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)

    ours = [line.strip() for line in example.splitlines() if "  # ema" in line]
    assert len(ours) == 4
    assert any(all(line.partition("  #")[0] in block for line in ours) for block in blocks)


def test_every_framework_recipe_has_at_most_ten_lines() -> None:
    page = (_DOCS / "guides" / "frameworks.md").read_text()
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```python\n(.+?)^```", section, flags=re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines() if line and "is there already" not in line]
        assert 0 < len(lines) <= 10, section.partition("\n")[0]
