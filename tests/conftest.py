"""For all tests: isolates them from the settings of the calling shell, and marks what a test needs."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from support.examples import load_profile

_TESTS = Path(__file__).parent
# Most tests in these folders start servers, trainers or commands.
_PROCESS_FOLDERS = ("bad_input", "cli", "integrations", "parity", "system", "timm")


def pytest_configure(config: pytest.Config) -> None:
    # A crash of the machine is not simulated, and a busy disk makes each call wait: tests for that have processes.
    setattr(os, "fsync", os.fstat)  # noqa: B010 -- which checks the file descriptor
    load_profile(inner_loop=_is_inner_loop(config))
    # A shell starts background jobs with SIGINT ignored, and every child process inherits that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the folders of which `-m "not process"` runs nothing: to import what they test takes seconds."""
    leaves_out = re.fullmatch(r"not process( and .*)?", config.option.markexpr or "") is not None
    return (
        True if leaves_out and collection_path.parent == _TESTS and collection_path.name in _PROCESS_FOLDERS else None
    )


def _is_inner_loop(config: pytest.Config) -> bool:
    """Whether only tests without processes run: `-m "not process"`, or that and more."""
    return re.fullmatch(r"not process( and .*)?", config.option.markexpr or "") is not None


def pytest_collection_finish() -> None:
    """Exempt what was imported from garbage collection: tests that collect garbage would look at it each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(_TESTS).parts[0] in _PROCESS_FOLDERS:
            item.add_marker(pytest.mark.process)
        if item.path.is_relative_to(_TESTS / "integrations"):
            item.add_marker(pytest.mark.integration)
            item.add_marker(
                pytest.mark.filterwarnings("default")
            )  # the frameworks' own warnings are not this project's
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # a keyword is also each folder's name
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("EMA_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("EMA_NICE", "0")  # beside other work of a small machine, a nice server starts too late
    monkeypatch.setenv("EMA_KERNEL", "torch")  # the compiled one adds a second to each server start


@pytest.fixture(autouse=True)
def _processes_are_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests with the marker `process` start processes, so that `-m "not process"` stays fast."""
    if request.node.get_closest_marker("process") is not None:
        return

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        pytest.fail(f"{request.node.nodeid} starts a process: mark it with pytest.mark.process")

    monkeypatch.setattr(subprocess.Popen, "_execute_child", refuse)
