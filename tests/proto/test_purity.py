"""The protocol package is sans-IO: by what it imports, and by the size that keeps it readable."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import ema_proto

PACKAGE = Path(ema_proto.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = {"asyncio", "multiprocessing", "select", "selectors", "socket", "ssl", "subprocess", "threading", "time"}
FORBIDDEN |= {"os", "pathlib", "io", "random", "secrets", "datetime", "logging", "pickle"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


def test_protocol_imports_only_the_standard_library_and_no_io() -> None:
    assert FILES
    for path in FILES:
        others = imported(path) - {"ema_proto", "__future__"}
        assert others <= sys.stdlib_module_names, path.name
        assert not others & FORBIDDEN, path.name


def test_protocol_opens_and_prints_nothing() -> None:
    for path in FILES:
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"open", "print", "input", "eval", "exec"}, path.name
