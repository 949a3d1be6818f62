"""Rules for the repository: exports, layering, packaging, sizes."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import itertools
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_ROOT = Path(__file__).parents[1]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
_PUBLIC = ("trainer_client", "ema_reader", "ema_proto")
_PACKAGES = ("proto/ema_proto", "trainer_client", "ema_server", "ema_reader", "ema_cli")
_FILE_LINES_MAX = 500
_FUNCTION_LINES_MAX = 60
_NESTING_MAX = 3

_Nested = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match | ast.AsyncFor | ast.AsyncWith
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((_ROOT / folder).rglob("*.py"))]


def _depth(node: ast.AST) -> int:
    """Levels of nesting below `node`; an elif and a nested function count as no level of their own."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, _depth(child) + (isinstance(child, _Nested) and not is_elif))
    return deepest


def _lines(function: _Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def _public_names(module: ModuleType) -> set[str]:
    """Names that a module imports or defines, without its own submodules."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }


@pytest.mark.parametrize("name", _PUBLIC)
def test_package_exports_exist(name: str) -> None:
    module = importlib.import_module(name)

    assert sorted(module.__all__) == sorted(_public_names(module))
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.process
def test_imports_keep_the_contracts() -> None:
    linter = Path(sysconfig.get_path("scripts")) / "lint-imports"
    checked = subprocess.run([linter], cwd=_ROOT, capture_output=True, text=True, timeout=100, check=False)

    assert checked.returncode == 0, checked.stdout + checked.stderr


def _imports(module: str, path: Path, modules: Collection[str]) -> set[str]:
    """What a module imports of ours, also inside functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in modules else node.module for name in names}
    return (found & set(modules)) - {module}


def test_no_modules_import_each_other_in_a_cycle() -> None:
    paths = {
        path: path.relative_to(_ROOT / "proto" if "ema_proto" in path.parts else _ROOT) for path in _sources(*_PACKAGES)
    }
    modules = {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for path, name in paths.items()}
    graph = {module: _imports(module, path, modules) for module, path in modules.items()}

    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(graph)  # raises CycleError


@pytest.mark.parametrize(
    ("package", "stays_out"),
    [
        ("trainer_client", {"fastapi", "uvicorn", "httpx2", "safetensors", "typer", "rich", "ema_server"}),
        ("ema_reader", {"torch", "zmq", "fastapi", "uvicorn", "ema_server"}),
        ("ema_proto", {"torch", "zmq", "asyncio", "socket", "threading"}),
        ("ema_cli.main", {"typer", "torch", "zmq", "fastapi"}),
    ],
)
@pytest.mark.process
def test_importing_a_side_imports_nothing_of_the_others(package: str, stays_out: set[str]) -> None:
    program = f"import sys, {package}; print(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert stays_out & set(result.stdout.split()) == set()


def test_proto_folder_is_not_a_package() -> None:
    assert not (_ROOT / "proto" / "__init__.py").exists()  # proto-plus owns that import name


def test_every_package_is_marked_as_typed() -> None:
    assert [package for package in _PACKAGES if not (_ROOT / package / "py.typed").exists()] == []


def test_trainer_install_does_not_choose_torch() -> None:
    extras = _PROJECT["optional-dependencies"]

    assert _PROJECT["dependencies"] == []
    assert not any(requirement.startswith("torch") for requirement in extras["trainer"] + extras["reader"])


def test_no_extra_replaces_an_installed_torch() -> None:
    requirements = itertools.chain.from_iterable(_PROJECT["optional-dependencies"].values())

    assert {each for each in requirements if re.match(r"torch\b", each)} == {"torch>=2.4"}


def test_files_and_functions_stay_small() -> None:
    offenders = []
    for path in _sources(*_PACKAGES):
        source, name = path.read_text(), path.relative_to(_ROOT)
        if (lines := len(source.splitlines())) > _FILE_LINES_MAX:
            offenders.append(f"{name} has {lines} lines")
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, _Function)]
        offenders += [f"{name}: {f.name} is long" for f in functions if _lines(f) > _FUNCTION_LINES_MAX]
        offenders += [f"{name}: {f.name} is nested deeply" for f in functions if _depth(f) > _NESTING_MAX]

    assert offenders == []


def _undocumented(name: str, value: Any) -> list[str]:
    """The name and its public methods and properties that have no docstring."""
    if not callable(value) or not str(getattr(value, "__module__", "")).startswith(_PUBLIC):
        return []
    missing = [] if value.__doc__ else [name]
    if inspect.isclass(value):
        members = {
            n: m for n, m in vars(value).items() if not n.startswith("_") and (callable(m) or isinstance(m, property))
        }
        missing += [f"{name}.{n}" for n, member in members.items() if not member.__doc__]
    return missing


@pytest.mark.parametrize("name", _PUBLIC)
def test_every_export_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)

    assert [each for exported in module.__all__ for each in _undocumented(exported, getattr(module, exported))] == []


def _subpackages() -> list[Path]:
    inits = [init for folder in _PACKAGES for init in (_ROOT / folder).rglob("*/__init__.py")]
    return sorted(init.parent for init in inits)


@pytest.mark.parametrize("package", _subpackages(), ids=lambda path: str(path.relative_to(_ROOT)))
def test_package_docstring_lists_its_modules(package: Path) -> None:
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}

    assert set(re.findall(r"^- `(\w+)`", text, flags=re.MULTILINE)) == modules - {"__init__", "__main__"}
