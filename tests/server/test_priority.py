"""The server lowers its priority where CPUs are few, never raises it, and starts where the system forbids that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ema_server.priority import CPUS_TO_SPARE, NICE_OF_FEW_CPUS, lower_priority, usable_cpus


@pytest.fixture
def nice(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The niceness of a process that is not this one, and how many CPUs it has."""
    state = {"nice": 0, "cpus": CPUS_TO_SPARE - 1}
    monkeypatch.setattr(os, "getpriority", lambda which, who: state["nice"])
    monkeypatch.setattr(os, "setpriority", lambda which, who, value: state.update(nice=value))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(state["cpus"])), raising=False)
    return state


@pytest.mark.parametrize(
    ("setting", "cpus", "before", "after"),
    [
        ("auto", 1, 0, NICE_OF_FEW_CPUS),
        ("auto", CPUS_TO_SPARE - 1, 0, NICE_OF_FEW_CPUS),
        ("auto", CPUS_TO_SPARE, 0, 0),
        ("auto", 1, 15, 15),
        ("0", 1, 0, 0),
        ("0", 1, 5, 5),
        ("19", 64, 0, 19),
        ("3", 64, 7, 7),
    ],
)
def test_niceness_follows_setting_and_cpus(
    nice: dict[str, int], tmp_path: Path, setting: str, cpus: int, before: int, after: int
) -> None:
    nice.update(nice=before, cpus=cpus)

    assert lower_priority(setting, tmp_path) == after
    assert nice["nice"] == after


@pytest.mark.parametrize(("quota", "expected"), [("150000 100000", 1.5), ("max 100000", 8.0), ("1600000 100000", 8.0)])
def test_quota_of_a_container_counts(nice: dict[str, int], tmp_path: Path, quota: str, expected: float) -> None:
    nice["cpus"] = 8
    (tmp_path / "cpu.max").write_text(f"{quota}\n")

    assert usable_cpus(tmp_path) == expected
    assert lower_priority("auto", tmp_path) == (NICE_OF_FEW_CPUS if expected < CPUS_TO_SPARE else 0)


def test_system_that_does_not_permit_it_is_only_logged(
    nice: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", forbidden)

    assert lower_priority("19", tmp_path) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "the scheduling priority stays at nice 0: Operation not permitted"
    ]


@pytest.mark.process
def test_all_threads_have_the_same_niceness_whenever_they_were_started() -> None:
    """In a process of its own, for real: this one's could not be undone."""
    code = (
        "import os, threading\n"
        "from ema_server.priority import lower_priority\n"
        "lowered, found = threading.Event(), []\n"
        "def look():\n"
        "    lowered.wait(30)\n"
        "    found.append(os.getpriority(os.PRIO_PROCESS, 0))\n"
        "earlier = threading.Thread(target=look)\n"
        "earlier.start()\n"
        "found.append(lower_priority('19'))\n"
        "lowered.set()\n"
        "later = threading.Thread(target=look)\n"
        "later.start(); earlier.join(); later.join()\n"
        "assert found == [19, 19, 19], found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
