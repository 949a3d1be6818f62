"""Which kernel a server uses for each setting, and what it logs."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import httpx2
import pytest
import torch

from ema_server.compute.arithmetic import BY_TORCH
from ema_server.compute.select import KernelUnavailableError, choose
from ema_server.config import Kernel
from support.arithmetics import WITHOUT_NUMBA
from support.processes import ServerProcess
from support.toy import Toy
from trainer_client import EmaClient

_CPU = torch.device("cpu")
_WAIT_S = 60.0


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ema_server.compute.compiled", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)


def test_auto_uses_the_compiled_kernel_if_available() -> None:
    pytest.importorskip("numba", reason=WITHOUT_NUMBA)

    assert [choose(setting, _CPU).name for setting in get_args(Kernel)] == ["compiled", "torch", "compiled"]


@pytest.mark.usefixtures("without_numba")
def test_auto_without_numba_uses_torch_and_logs_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chosen = choose("auto", _CPU)

    assert chosen is BY_TORCH
    said = r"averaging kernel: torch \(the compiled kernel is not available: .*numba.*\)"
    assert re.fullmatch(said, caplog.messages[0])


@pytest.mark.usefixtures("without_numba")
def test_compiled_kernel_without_numba_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        KernelUnavailableError,
        match=r"numba.*: in a clone of ema-sidecar, pip install '\.\[fast\]', or use --kernel auto",
    ):
        choose("compiled", _CPU)


def test_numba_with_wrong_results_counts_as_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = pytest.importorskip("ema_server.compute.compiled", reason=WITHOUT_NUMBA)
    monkeypatch.setattr(compiled, "_lerp_same", lambda *_: None)

    assert choose("auto", _CPU) is BY_TORCH
    with pytest.raises(KernelUnavailableError, match="computes"):
        choose("compiled", _CPU)


def test_averages_on_another_device_are_computed_by_torch() -> None:
    device = torch.device("cuda:1")

    assert [choose(setting, device) for setting in ("auto", "torch")] == [BY_TORCH, BY_TORCH]
    with pytest.raises(KernelUnavailableError, match="on the CPU, not on cuda:1: use --kernel auto"):
        choose("compiled", device)


@pytest.mark.process
def test_server_with_compiled_kernel_and_no_numba_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('no numba here')\n")
    command = [sys.executable, "-m", "ema_cli", "serve", "--data", str(tmp_path / "data"), "--kernel", "compiled"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_WAIT_S, check=False)

    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("ema serve: the compiled kernel is not available (no numba here)")


@pytest.mark.parametrize("kernel", ["torch", "compiled"])
@pytest.mark.process
def test_server_logs_its_kernel(tmp_path: Path, kernel: str) -> None:
    pytest.importorskip("numba", reason=WITHOUT_NUMBA)
    with ServerProcess(tmp_path / "data", "--kernel", kernel) as server:
        with EmaClient(server.zmq, "r", ["ema:0.5", "ema:0.9"], when_behind="wait") as client:
            for step in (1, 2, 3):
                client.update(Toy().at(step), step)
            assert client.flush(_WAIT_S)
        exposed = httpx2.get(f"{server.http}/metrics", timeout=_WAIT_S).text

    assert re.search(rf'^ema_build_info{{kernel="{kernel}",version="[^"]+"}} 1.0$', exposed, re.MULTILINE)
    assert any(f"averaging kernel: {kernel}" in line for line in server.errors)
