"""From paths and rules to averages on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ema_proto.averages.rules import Ema, PowerEma, Raw
from ema_server.checkpoints.combine import combine
from ema_server.checkpoints.errors import ArgumentError, CheckpointError
from ema_server.checkpoints.folders import Checkpoint
from ema_server.checkpoints.output import AverageWriter, Input, check_target, replacing, write_extras
from ema_server.checkpoints.plan import OutputFile, Work, check_alike, output_files, plan_work, used_by
from ema_server.checkpoints.source import OpenCheckpoint
from ema_server.checkpoints.weights import Weighing
from ema_server.compute.select import choose
from ema_server.rules.initial_share import initial_share_warning
from ema_server.storage.disk import allow_open_files, shortage


class Progress(Protocol):
    """Receives the progress, to show it."""

    def start(self, nbytes: int) -> None:
        """So many bytes will be read."""

    def advance(self, nbytes: int) -> None:
        """So many more were read."""


@dataclass(frozen=True, slots=True)
class Averaged:
    """One average on disk; `version` is the content of its `version.json`."""

    folder: Path
    weighing: Weighing
    version: dict[str, Any]


def average(
    checkpoints: Sequence[Checkpoint],
    weighings: Sequence[Weighing],
    output: Path,
    progress: Progress,
    *,
    keep_dtype: bool = False,
    force: bool = False,
) -> list[Averaged]:
    """Average checkpoints into `output`, or into a sub-folder for each average if there are several.

    Args:
        checkpoints: by step.
        weighings: how each average weighs them.
        output: appears when all averages are complete and durable.
        progress: receives the number of bytes read.
        keep_dtype: write floats in their own dtype instead of float32.
        force: replace `output` if it has content.

    Raises:
        ArgumentError: `output` exists, is one of the checkpoints, or a pattern of a rule matches no tensor.
        CheckpointError: the checkpoints do not match, are damaged, or have NaN or Inf; or the disk is too small.
        OSError: the disk fails. Nothing is left of the output.
    """
    _check_outside(output, checkpoints)
    check_target(output, force=force)
    allow_open_files()
    with ExitStack() as stack:
        numbers = used_by(weighings)
        opened = {number: stack.enter_context(OpenCheckpoint(checkpoints[number])) for number in numbers}
        newest = opened[numbers[-1]]
        for number in numbers[:-1]:
            check_alike(newest, opened[number])
        work = plan_work(newest, weighings)
        files = [output_files(newest, weighing, keep_dtype=keep_dtype) for weighing in weighings]
        folder = stack.enter_context(replacing(output, force=force))
        _check_space(folder, files)
        folders = [folder if len(weighings) == 1 else folder / weighing.name for weighing in weighings]
        progress.start(sum(one.nbytes for one in work))
        _write(opened, weighings, work, list(zip(folders, files, strict=True)), progress.advance)
        inputs = {number: Input(one.checkpoint, one.entries()) for number, one in opened.items()}
        versions = [
            write_extras(each, newest.checkpoint, made, weighing, inputs)
            for each, made, weighing in zip(folders, files, weighings, strict=True)
        ]
    return [
        Averaged(output / each.relative_to(folder), weighing, version)
        for each, weighing, version in zip(folders, weighings, versions, strict=True)
    ]


def warnings_of(weighings: Sequence[Weighing]) -> list[str]:
    """What the user should know about these averages."""
    found = []
    for weighing in weighings:
        first = weighing.weights.index(None)
        text = initial_share_warning(weighing.shares[first]) if isinstance(weighing.rule, Ema) else None
        if text is not None:
            found.append(f"{weighing.name} begins with the checkpoint of step {weighing.steps[first]}: {text}")
        if weighing.shares[weighing.newest] == 1.0 and not isinstance(weighing.rule, Raw):
            found.append(f"{weighing.name} consists of one checkpoint, that of step {weighing.steps[weighing.newest]}")
        if weighing.steps[0] == 0 and weighing.shares[0] == 0.0 and isinstance(weighing.rule, Ema | PowerEma):
            found.append(
                f"{weighing.name} has nothing of the checkpoint of step 0, which is that of before the first step: "
                "if it is not, give the steps with --steps"
            )
    return found


class _Writers:
    """The sink of `combine`: a writer for each average."""

    def __init__(self, writers: Sequence[AverageWriter]) -> None:
        self._writers = writers

    def write(self, average: int, name: str, start: int, values: torch.Tensor) -> None:
        self._writers[average].write(name, start, values)


def _write(
    opened: dict[int, OpenCheckpoint],
    weighings: Sequence[Weighing],
    work: Sequence[Work],
    outputs: Sequence[tuple[Path, tuple[OutputFile, ...]]],
    on_read: Callable[[int], None],
) -> None:
    arithmetic = choose("auto", torch.device("cpu"))
    with ExitStack() as stack:
        writers = list[AverageWriter]()
        for folder, files in outputs:
            folder.mkdir(exist_ok=True)
            writers.append(stack.enter_context(closing(AverageWriter(folder, files))))
        combine(opened, weighings, work, _Writers(writers), arithmetic, on_read)
        for writer in writers:
            writer.complete()


def _check_outside(output: Path, checkpoints: Sequence[Checkpoint]) -> None:
    target = output.resolve()
    for checkpoint in checkpoints:
        for path in (checkpoint.path.resolve(), checkpoint.folder.resolve()):
            if (
                path == target
                or path.is_relative_to(target)
                or (checkpoint.owns_folder and target.is_relative_to(path))
            ):
                raise ArgumentError(
                    f"{output} is, holds or is part of the checkpoint {checkpoint.path}: choose another output"
                )


def _check_space(folder: Path, averages: Sequence[Sequence[OutputFile]]) -> None:
    problem = shortage(folder, sum(file.nbytes for files in averages for file in files))
    if problem is not None:
        raise CheckpointError(f"the averages do not fit: {problem}")
