"""What is read and written: whether the checkpoints match, how each tensor is averaged, and the files of an average."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ema_proto.averages.rules import Raw, check_matches
from ema_proto.dtypes import FLOATS, ITEM_BYTES
from ema_proto.errors import LocalProtocolError
from ema_proto.wire.manifest import Role, TensorSpec, layout
from ema_server.checkpoints.errors import ArgumentError, CheckpointError
from ema_server.checkpoints.folders import STEMS
from ema_server.checkpoints.source import OpenCheckpoint
from ema_server.checkpoints.weights import Weighing
from ema_server.tensors.file_plan import MODEL_FILE
from ema_server.tensors.safetensors_file import FORMAT_PT, Stored, describe, read_metadata
from ema_server.tensors.selection import averaged_names, can_be_averaged

_STATISTICS = ("running_mean", "running_var")
_VECTORS = ("_u", "_v")  # of spectral norm
_MASK = "_mask"  # of pruning


@dataclass(frozen=True, slots=True)
class Work:
    """One tensor: which averages average it, and which checkpoints are read for it.

    Args:
        stored: the tensor in the newest checkpoint.
        averaged: average number i averages it if bit i is set, and else copies it.
        weights: for each checkpoint that is read, by its number, its weight in every average: 0 leaves the average
            unchanged, None replaces it.
    """

    stored: Stored
    averaged: int
    weights: tuple[tuple[int, tuple[float | None, ...]], ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.stored.nbytes * len(self.weights)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of an average, and its tensors by their places in it."""

    name: str
    header: bytes
    tensors: tuple[Stored, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(stored.nbytes for stored in self.tensors)


def used_by(weighings: Sequence[Weighing]) -> list[int]:
    """Numbers of the checkpoints that have a weight in an average, and of the newest."""
    numbers = range(len(weighings[0].weights))
    return [number for number in numbers if number == numbers[-1] or any(w.weights[number] != 0.0 for w in weighings)]


def check_alike(newest: OpenCheckpoint, other: OpenCheckpoint) -> None:
    """Refuse checkpoints with different tensors.

    Raises:
        CheckpointError: the text names the first tensor that differs.
    """
    one, two = newest.checkpoint.path, other.checkpoint.path
    for name, located in newest.tensors.items():
        if name not in other.tensors:
            raise CheckpointError(f"{two} has no tensor {name!r}, which {one} has: they are of different models")
        mine, theirs = located.stored, other.tensors[name].stored
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            raise CheckpointError(
                f"tensor {name!r} is {theirs.dtype}{list(theirs.shape)} in {two} and {mine.dtype}{list(mine.shape)} in "
                f"{one}: they are of different models, or were saved in different dtypes"
            )
    for name in other.tensors:
        if name not in newest.tensors:
            raise CheckpointError(f"{two} has tensor {name!r}, which {one} does not have: they are of different models")


def plan_work(newest: OpenCheckpoint, weighings: Sequence[Weighing]) -> list[Work]:
    """The work for each tensor, in the order of the newest checkpoint's files.

    Raises:
        CheckpointError: a tensor has a name, dtype or shape that cannot be averaged.
        ArgumentError: a pattern of a rule matches no tensor.
    """
    stored = [located.stored for located in newest.tensors.values()]
    try:
        manifest = layout(TensorSpec(s.name, s.dtype, s.shape, role_of(s.name, newest.tensors), 0) for s in stored)
    except LocalProtocolError as error:
        raise CheckpointError(f"{newest.checkpoint.path}: {error}") from None
    try:
        check_matches([weighing.rule for weighing in weighings], [s.name for s in stored])
    except LocalProtocolError as error:
        raise ArgumentError(str(error)) from None
    chosen = [averaged_names(manifest, weighing.rule) for weighing in weighings]
    weights: dict[int, tuple[tuple[int, tuple[float | None, ...]], ...]] = {}  # by mask: most tensors have the same
    work = []
    for spec, one in zip(manifest.tensors, stored, strict=True):
        mask = sum((one.name in names) << number for number, names in enumerate(chosen)) if can_be_averaged(spec) else 0
        if mask not in weights:
            weights[mask] = tuple(_weights(weighings, mask).items())
        work.append(Work(one, mask, weights[mask]))
    return work


def role_of(name: str, names: Collection[str] | Mapping[str, object]) -> Role:
    """The role of a tensor. Files do not say which tensors are buffers: names that torch's modules use do.

    The statistics of batch norm are buffers; the vectors of spectral norm and the masks of pruning, which belong to one
    set of weights, are structural. All other tensors are parameters.
    """
    parent, _, last = name.rpartition(".")
    if last in _STATISTICS:
        return Role.BUFFER
    if last in _VECTORS:
        return Role.STRUCTURAL if ".parametrizations." in f".{parent}." else Role.PARAM
    for ending in (*_VECTORS, _MASK):
        if last.endswith(ending) and name.removesuffix(ending) + "_orig" in names:
            return Role.STRUCTURAL
    return Role.PARAM


def output_files(newest: OpenCheckpoint, weighing: Weighing, *, keep_dtype: bool) -> tuple[OutputFile, ...]:
    """The files of an average: those of the newest checkpoint, with floats in float32 unless dtypes are kept.

    The tensors of a file lie by item size, large first, so that each is aligned, and else as in the newest checkpoint.
    """
    as_stored = keep_dtype or isinstance(weighing.rule, Raw)
    made = []
    for file in newest.files:
        held = [located.stored for located in newest.tensors.values() if located.file is file]
        described = [(s.name, s.dtype if as_stored or s.dtype not in FLOATS else "F32", s.shape) for s in held]
        described.sort(key=lambda each: -ITEM_BYTES[each[1]])
        header, placed = describe(described, {**FORMAT_PT, **read_metadata(file.path)})
        is_usual = newest.checkpoint.index is not None or file.path.stem in STEMS
        made.append(OutputFile(file.path.name if is_usual else MODEL_FILE, header, placed))
    return tuple(made)


def _weights(weighings: Sequence[Weighing], mask: int) -> dict[int, tuple[float | None, ...]]:
    """The weights of the checkpoints that count for a tensor. A copied one needs the newest of its average alone."""
    found = {}
    for number in used_by(weighings):
        weights = tuple(
            weighing.weights[number] if mask >> bit & 1 else None if number == weighing.newest else 0.0
            for bit, weighing in enumerate(weighings)
        )
        if any(weight != 0.0 for weight in weights):
            found[number] = weights
    return found
