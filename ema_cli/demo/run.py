"""Runs the demo: starts server, trainer and evaluation worker, watches them, and collects a `Report`.

Its numbers come from files downloaded over HTTP. A failing process ends the demo with its name and the end of its log.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema_cli.demo.child import Child
from ema_reader import Reader

_PUBLISHES = 10
_START_S = 60.0
_STALLED_S = 120.0
_POLL_S = 0.1

Progress = Callable[[str, dict[str, Any]], None]  # a process's name and one of its JSON lines


@dataclass(frozen=True, slots=True)
class Result:
    """One average at the last step: its held-out accuracy in [0, 1], and its difference from the replay."""

    average: str
    version: str
    step: int
    updates: int
    gap_steps: int
    accuracy: float
    difference: float


@dataclass(frozen=True, slots=True)
class Report:
    """Result of the demo; `results` are in the order of the averages in `train`."""

    folder: Path
    steps: int
    applied: int
    gap_steps: int
    versions_evaluated: int
    seconds: float
    results: tuple[Result, ...]

    @property
    def best(self) -> Result:
        return max(self.results, key=lambda result: result.accuracy)


def run(folder: Path, name: str, steps: int, seed: int, progress: Progress) -> Report:
    """Run the demo in `folder`, which exists and is empty, with `name` as the run's name.

    Raises:
        ProcessFailed: one of the three processes failed, or made no progress for two minutes.
        ReaderError: a version could not be read back.
    """
    started = time.monotonic()
    with ExitStack() as processes:
        server = processes.enter_context(_server(folder, steps))
        addresses = server.first_line(_START_S)
        progress(server.name, addresses)
        trainer = processes.enter_context(_trainer(folder, name, steps, seed, addresses["zmq"]))
        worker = processes.enter_context(_worker(folder, name, addresses["http"]))
        evaluated = _watch(server, trainer, worker, progress)
        with Reader(addresses["http"]) as reader:
            known = reader.run(name)
            results = _collect(reader, folder, name, steps)
        server.stop()
    shutil.rmtree(folder / "record")  # large, and needed only for the replay
    seconds = time.monotonic() - started
    return Report(folder, steps, known.applied, known.gap_steps, evaluated, seconds, results)


def _server(folder: Path, steps: int) -> Child:
    arguments = ["-m", "ema_cli", "serve", "--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0"]
    arguments += ["--data", str(folder / "data"), "--publish-every-steps", str(max(1, steps // _PUBLISHES))]
    return Child("server", arguments, folder / "server.log")


def _trainer(folder: Path, run: str, steps: int, seed: int, endpoint: str) -> Child:
    arguments = ["-m", "ema_cli.demo.train", "--endpoint", endpoint, "--run", run]
    arguments += ["--steps", str(steps), "--seed", str(seed), "--record", str(folder / "record")]
    return Child("trainer", arguments, folder / "trainer.log")


def _worker(folder: Path, run: str, url: str) -> Child:
    arguments = ["-m", "ema_cli", "evaluate", "ema_cli.demo.evaluate:accuracy", "--run", run, "--averages", "all"]
    arguments += ["--url", url, "--poll-s", "0.2", "--json"]
    return Child("evaluation worker", arguments, folder / "worker.log")


def _watch(server: Child, trainer: Child, worker: Child, progress: Progress) -> int:
    """Pass on the lines of the processes until trainer and worker end; returns the number of evaluated versions."""
    evaluated, last_line = 0, time.monotonic()
    while True:
        ended = not trainer.running and not worker.running
        for child in (trainer, worker):
            for line in child.lines():
                progress(child.name, line)
                last_line = time.monotonic()
                evaluated += child is worker
        if not server.running:  # first: failures of the others would follow from it
            raise server.failure()
        trainer.check()
        worker.check()
        if ended:
            return evaluated
        if time.monotonic() - last_line > _STALLED_S:
            silent = trainer if trainer.running else worker
            raise silent.failure(f"has made no progress for {_STALLED_S:g} s")
        time.sleep(_POLL_S)


def _collect(reader: Reader, folder: Path, run: str, steps: int) -> tuple[Result, ...]:
    from ema_cli.demo.replay import largest_difference  # here: importing torch would delay every command of `ema`

    results = []
    for average in reader.run(run).averages:
        version = reader.version(run, average.name, f"step-{steps}")
        validated = reader.validate(
            run, average.name, version.id, timeout_s=_STALLED_S
        )  # the worker's result: it is not computed twice
        path = reader.download(version, folder / "downloads" / average.name)
        results.append(
            Result(
                average=average.name,
                version=version.id,
                step=version.step,
                updates=version.updates,
                gap_steps=version.gap_steps,
                accuracy=validated.metrics["accuracy"],
                difference=largest_difference(path, folder / "record"),
            )
        )
    return tuple(results)
