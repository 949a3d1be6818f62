"""A core that is killed by SIGKILL at every single call to the disk, one process for each.

    python -m support.crashing ROOT SCENARIO

Forks a process for call 1, one for call 2, and so on, until one ends normally. Each works in `ROOT/{call}/data` and
writes what was reported as durable to `ROOT/{call}/reported`. Prints how many were killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_server.averager.jobs import Deleted
from ema_server.derived.blend import Weighted, blend
from ema_server.evaluation.metric_store import Report, Subject
from support.server_core import WAIT_S, durable, joined, manifest_of, running_core
from support.waiting import eventually

_CALLS = ("mkdir", "open", "pwrite", "fsync", "rename", "link", "unlink", "rmdir")


def weights(step: int) -> dict[str, Tensor]:
    """The trainer's weights."""
    generator = torch.Generator().manual_seed(step)
    return {
        "w": torch.rand(64, generator=generator),
        "d": torch.rand(3, generator=generator, dtype=torch.float64),
        "n": torch.tensor(step),
    }


def publishing(data: Path, report: Callable[[str], None]) -> None:
    """Four generations, the third by a rewind; all but one of them are deleted on the way."""
    with running_core(data, keep_generations=1, kernel="torch") as core:  # a hundred processes need not load another
        joined(core.join("r", manifest_of(weights(1), aliases={"w": ("w.tied",)}), ["ema:0.9"]))
        for step in (1, 2, 3, 4):
            core.apply("r", step, weights(step))
            if step in (2, 4):
                report(f"step {durable(core.publish('r', 'checkpoint' if step == 2 else 'request')).step}")
        core.rewind("r", 3)
        report("rewound to 2")
        core.apply("r", 7, weights(7))
        report(f"finished at {durable(core.finish('r')).step}")


def deleting(data: Path, report: Callable[[str], None]) -> None:
    """A run with a generation, a ring and metrics is deleted while another stays."""
    averages = ["power:sigma_rel=0.05", "power:sigma_rel=0.1"]
    with running_core(data, kernel="torch") as core:
        for run in ("r", "other"):
            joined(core.join(run, manifest_of(weights(1)), averages))
            core.apply(run, 1, weights(1))
            version = durable(core.finish(run)).versions[0]
            subject = Subject(run, version.average, version.id, version.step)
            row = Report(subject, "default", None, {"loss": 1.0}, None, None, None, version.created)
            core.server.services.metrics.add(row).result(WAIT_S)
        report("finished")
        assert core.delete("r") == Deleted()
        report("deleted")
        eventually(lambda: not core.data_dir.deleted(), "its files are erased", WAIT_S)


def blending(data: Path, report: Callable[[str], None]) -> None:
    """Two blends of two averages, the second of which is deleted."""
    with running_core(data, kernel="torch") as core:
        joined(core.join("r", manifest_of(weights(1)), ["raw", "ema:0.9"], config="{}"))
        for step in (1, 2):
            core.apply("r", step, weights(step))
        raw, ema = durable(core.finish("r")).versions
        report("finished")
        deriving = core.server.services.deriving
        for share in (0.5, 0.25):
            version, _ = blend(deriving, [Weighted(ema, 1 - share), Weighted(raw, share)], f"blend-{share}")
            report(f"{version.average} {version.id}")
        report(f"deleting {version.average}")
        assert deriving.store.delete(version)
        report(f"deleted {version.average}")


_SCENARIOS = {"publishing": publishing, "deleting": deleting, "blending": blending}


def _die_at(fatal_call: int) -> None:
    """Count every call that changes the disk, and die before the fatal one; a write dies half-way.

    `fsync` is counted and left out: what the kernel has taken survives a process that is killed.
    """
    calls = 0

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if name == "open" and not args[1] & os.O_CREAT:
                return original(*args, **kwargs)
            calls += 1
            if calls == fatal_call:
                if name == "pwrite":
                    original(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return None if name == "fsync" else original(*args, **kwargs)

        return call

    for name in _CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def _child(folder: Path, fatal_call: int, scenario: Callable[[Path, Callable[[str], None]], None]) -> None:
    folder.mkdir(parents=True)
    fd = os.open(folder / "reported", os.O_WRONLY | os.O_CREAT)
    _die_at(fatal_call)
    scenario(folder / "data", lambda text: void(os.write(fd, text.encode() + b"\n")))


def void(_: object) -> None:
    """Ignore a result."""


def main(root: Path, scenario: str) -> int:
    """Fork and wait until a process is not killed; returns how many were."""
    killed = 0
    while True:
        process = os.fork()
        if process == 0:
            _child(root / f"{killed + 1:03d}", killed + 1, _SCENARIOS[scenario])
            os._exit(0)
        status = os.waitpid(process, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            killed += 1
        elif status == 0:
            return killed
        else:
            raise SystemExit(f"process {killed + 1} failed with status {status}")


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), sys.argv[2]))
