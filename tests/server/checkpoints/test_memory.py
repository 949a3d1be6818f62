"""Memory does not depend on the size of the tensors, nor on the number of checkpoints beyond those read at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SMALL, _LARGE = 1 << 20, 48 << 20  # elements of float32: 4 MiB and 192 MiB
_GROWTH_MAX = 48 << 20


def _sparse(folder: Path, elements: int) -> None:
    """A checkpoint of one tensor of zeros, which takes no space on the disk."""
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * elements)


def _peak_bytes(parent: Path, elements: int) -> int:
    """The most memory that `ema average` of three checkpoints used at one time."""
    for step in (1, 2, 3):
        _sparse(parent / f"checkpoint-{step}", elements)
    program = (
        "import resource, sys; from ema_cli.app import build, run; code = run(build()); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    arguments = ["average", str(parent), "--rule", "swa", "--rule", "ema:0.9", "-o", str(parent / "out")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=100, check=True
    )
    return int(done.stdout.split()[-1]) << 10


@pytest.mark.process
@pytest.mark.slow
def test_memory_does_not_grow_with_the_size_of_a_tensor(tmp_path: Path) -> None:
    small, large = _peak_bytes(tmp_path / "small", _SMALL), _peak_bytes(tmp_path / "large", _LARGE)

    assert large - small < _GROWTH_MAX  # a quarter of one tensor
