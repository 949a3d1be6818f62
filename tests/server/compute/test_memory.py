"""Host memory, and how much the machine and the container have left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ema_server.compute.memory import allocate, available_bytes, host_memory

_GIB = 1 << 30


def _machine(folder: Path, available_kib: int) -> Path:
    path = folder / "meminfo"
    path.write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {available_kib} kB\nCached: 5 kB\n")
    return path


def _container(folder: Path, limit: str, current: int, inactive: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\nactive_file 9\n")
    return folder


@pytest.mark.parametrize(
    ("limit", "current", "inactive", "expected"),
    [
        ("max", 5 * _GIB, 0, 8 * _GIB),
        (str(6 * _GIB), 5 * _GIB, 0, _GIB),
        (str(6 * _GIB), 5 * _GIB, 2 * _GIB, 3 * _GIB),
        (str(6 * _GIB), 7 * _GIB, 0, 0),
        (str(60 * _GIB), 5 * _GIB, 0, 8 * _GIB),
    ],
)
def test_available_memory_is_the_smaller_limit(
    tmp_path: Path, limit: str, current: int, inactive: int, expected: int
) -> None:
    assert available_bytes(_machine(tmp_path, 8 << 20), _container(tmp_path, limit, current, inactive)) == expected


def test_available_memory_is_none_if_nothing_reports_it(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "meminfo", tmp_path) is None


def test_oversized_allocation_is_refused_before_a_page_is_touched() -> None:
    """On this machine, for real: without the check the kernel would kill this process."""
    available = available_bytes()
    if available is None:
        pytest.skip("the kernel does not say how much memory is left")
    with pytest.raises(MemoryError, match=r"cannot allocate \d+ bytes: only \d+ are available"):
        allocate(available + _GIB, touch=True)


def test_memory_is_zeroed_and_tensor_and_view_share_bytes() -> None:
    memory = allocate(10_000, touch=True)
    memory.data[5] = 7
    memory.view[6] = 8

    assert memory.nbytes == 10_000
    assert memory.data.sum().item() == 15
    assert bytes(memory.view[4:8]) == bytes([0, 7, 8, 0])


def test_view_of_a_torch_tensor_shares_its_bytes() -> None:
    data = torch.zeros(1000, dtype=torch.uint8)
    memory = host_memory(data)
    memory.view[10:14] = b"abcd"
    memory.fill(500, 502, lambda piece, at: piece.__setitem__(slice(None), b"xy"))

    assert (memory.nbytes, memory.view.format, memory.view.readonly) == (1000, "B", False)
    assert bytes(data[10:14].tolist()) == b"abcd"
    assert bytes(data[499:503].tolist()) == b"\0xy\0"
