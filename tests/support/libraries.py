"""The averaging classes of installed libraries, without the rest of those libraries.

Most of them import large dependencies (torchvision, transformers, a web dashboard) that an averaging class does not
use. So the source of the class is taken from the installed file and executed alone.
"""

from __future__ import annotations
import __future__

import ast
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest

_WAY = "`pip install --no-deps --group parity` installs it"


@cache
def library(name: str) -> Any:
    """The module `name`, imported; skips the test where it is not installed."""
    _folder(name.partition(".")[0])
    return importlib.import_module(name)


def taken_from(package: str, file: str, *names: str, **needed: object) -> dict[str, Any]:
    """Top-level classes and functions of one file of an installed package, which is not imported.

    Args:
        package: name of the package.
        file: path of the file in it.
        names: the classes and functions to take.
        needed: the names that they use at run time; annotations are not evaluated.

    Raises:
        AssertionError: the file no longer has them.
    """
    path = _folder(package) / file
    nodes = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in names]
    assert len(nodes) == len(names), f"{path} has {[getattr(node, 'name', '') for node in nodes]}, not {names}"
    flags = __future__.annotations.compiler_flag
    code = compile(ast.Module(nodes, []), str(path), "exec", flags=flags, dont_inherit=True)
    found: dict[str, Any] = {"__name__": f"taken_from_{package}", **needed}
    exec(code, found)  # noqa: S102  # the installed library's own source
    return found


@cache
def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed ({_WAY})")
    return Path(found.origin).parent
