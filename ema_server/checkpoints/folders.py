"""Finds checkpoints: the files that hold their weights, and their steps."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ema_proto.limits import STEP_MAX
from ema_server.checkpoints.errors import ArgumentError, CheckpointError

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
STEMS = ("model", "diffusion_pytorch_model", "adapter_model")  # of the files that frameworks write, preferred first

_STEP_WORDS = "checkpoint|ckpt|global_?step|step|iteration|iter|epoch"
_STEP_FOLDER = re.compile(rf"(?:.*[-_.])?(?:{_STEP_WORDS})[-_=]?([0-9]{{1,16}})|([0-9]{{1,16}})", re.IGNORECASE)
_ENDS_IN_NUMBER = re.compile(r"(?:.*[-_=])([0-9]{1,16})")
_PART = re.compile(r"-[0-9]+-of-[0-9]+")
_SHARD = re.compile(rf".*{_PART.pattern}")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARDED_BY = {"*.distcp": "torch.distributed.checkpoint", "pytorch_model_fsdp_*": "FSDP", "global_step*": "DeepSpeed"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint on disk.

    Args:
        path: as it was given, or found in the folder that was given.
        step: its step; without one, its number in the order given, from 1.
        files: the safetensors files with its weights.
        index: the JSON file that lists the tensors of several files.
        owns_folder: the files beside the weights belong to it.
    """

    path: Path
    step: int
    files: tuple[Path, ...]
    index: Path | None
    owns_folder: bool

    @property
    def folder(self) -> Path:
        return self.files[0].parent


def find(paths: Sequence[Path], steps: Sequence[int] | None = None, *, in_order: bool = False) -> list[Checkpoint]:
    """The checkpoints at these paths, by step.

    Args:
        paths: checkpoints, or one folder whose sub-folders (or safetensors files) are checkpoints.
        steps: the steps of the checkpoints in the order given, instead of those in their names.
        in_order: other arguments belong to the checkpoints in the order given, so it must be that of their steps. A
            checkpoint without a step in its name is allowed then.

    Raises:
        ArgumentError: the checkpoints have no steps, the same step or another order, or there are fewer than two.
        CheckpointError: a path holds no weights in safetensors files.
    """
    chosen = _expanded(paths)
    if steps is None:
        named = [step_of(path) for path in chosen]
        if in_order and None in named:
            named = list(range(1, len(chosen) + 1))
    elif len(steps) != len(chosen):
        raise ArgumentError(f"--steps has {len(steps)} steps for {len(chosen)} checkpoints: give one for each")
    else:
        named, in_order = list(steps), True
    found = [_opened(path, step) for path, step in zip(chosen, named, strict=True)]
    return _ordered(found, in_order=in_order)


def is_step_folder(path: Path) -> bool:
    """Whether the name of a folder is one that frameworks give to a checkpoint."""
    return path.is_dir() and _STEP_FOLDER.fullmatch(path.name) is not None


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, from an index.

    Raises:
        CheckpointError: it is not an index.
    """
    try:
        found = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not the index of a safetensors checkpoint: {error!r}") from None


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint: of the file or folder, else of one of the two folders around it."""
    around = (_STEP_FOLDER.fullmatch(name) for name in (path.parent.name, path.parent.parent.name))
    match = _own_step(path) or next(filter(None, around), None)
    step = None if match is None else int(match[match.lastindex or 1])
    return step if step is None or step <= STEP_MAX else None


def _expanded(paths: Sequence[Path]) -> list[Path]:
    """The paths, or the checkpoints in the only one."""
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
    if len(paths) == 1 and paths[0].is_dir():
        inside = sorted(paths[0].iterdir())
        folders = [path for path in inside if is_step_folder(path)]
        found = folders or [path for path in inside if path.suffix == SUFFIX and _own_step(path)]
        if not found:
            raise _none_inside(paths[0], inside)
        return sorted(found, key=lambda path: step_of(path) or 0)
    return list(paths)


def _none_inside(folder: Path, inside: Sequence[Path]) -> ArgumentError | CheckpointError:
    """Why a folder holds no checkpoints with a step in their names."""
    pickled = next((path for path in inside if path.suffix in _PICKLES and _own_step(path)), None)
    if pickled is not None:
        return CheckpointError(_not_safetensors(pickled))
    below = next((path for path in inside if any(map(is_step_folder, path.glob("*")))), None)
    if below is not None:
        return ArgumentError(f"{folder} holds no checkpoints itself, its folder {below.name} does: give {below}")
    return ArgumentError(
        f"{folder} holds no checkpoints with a step in their names (checkpoint-500, step_500, 500): give their paths "
        "one by one, and their steps as in --steps 1000,2000"
    )


def _own_step(path: Path) -> re.Match[str] | None:
    own = path.stem if path.suffix in (SUFFIX, *_PICKLES) else path.name
    return None if _SHARD.fullmatch(own) else _STEP_FOLDER.fullmatch(own) or _ENDS_IN_NUMBER.fullmatch(own)


def _ordered(given: list[Checkpoint], *, in_order: bool) -> list[Checkpoint]:
    ordered = sorted(given, key=lambda one: one.step)
    for first, second in pairwise(ordered):
        if first.step == second.step:
            raise ArgumentError(
                f"{first.path} and {second.path} are both of step {first.step}: leave one out, or give the steps of "
                "all checkpoints with --steps"
            )
    if in_order and given != ordered:
        shown = ", ".join(str(one.step) for one in given)
        raise ArgumentError(
            f"the checkpoints are of steps {shown}: give them in the order of their steps, so that --steps and "
            "--weights belong to the right ones"
        )
    if len(ordered) < 2:
        raise ArgumentError(f"{ordered[0].path} is one checkpoint: give at least two to average")
    return ordered


def _opened(path: Path, step: int | None) -> Checkpoint:
    files, index = _files_of(path)
    if step is None:
        raise ArgumentError(
            f"{path} has no step in its name: give the steps of all checkpoints, as in --steps 1000,2000"
        )
    return Checkpoint(path, step, files, index, owns_folder=path.is_dir() or path.stem in STEMS)


def _files_of(path: Path) -> tuple[tuple[Path, ...], Path | None]:
    """The weights at a path, and the index if there is one."""
    if path.name.endswith(INDEX_SUFFIX):
        return _indexed(path), path
    if not path.is_dir():
        if path.suffix != SUFFIX:
            raise CheckpointError(_not_safetensors(path))
        if _SHARD.fullmatch(path.stem):
            raise CheckpointError(f"{path} is one part of a checkpoint: give its folder, {path.parent}")
        return (path,), None
    for stem in STEMS:
        if (single := path / f"{stem}{SUFFIX}").is_file():
            return (single,), None
        if (index := path / f"{stem}{INDEX_SUFFIX}").is_file():
            return _indexed(index), index
    singles = sorted(path.glob(f"*{SUFFIX}"))
    indexes = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) == 1:
        return _indexed(indexes[0]), indexes[0]
    if len(singles) == 1 and not _SHARD.fullmatch(singles[0].stem):
        return (singles[0],), None
    raise CheckpointError(_no_weights(path, singles))


def _indexed(index: Path) -> tuple[Path, ...]:
    """The files that an index names."""
    names = sorted(set(weight_map(index).values()))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index} names the file {name!r}, which is not beside it: the checkpoint is incomplete"
            )
    if not names:
        raise CheckpointError(f"{index} names no files")
    return tuple(index.parent / name for name in names)


def _no_weights(path: Path, singles: Sequence[Path]) -> str:
    if any(_SHARD.fullmatch(single.stem) for single in singles):
        return f"{path} has parts of a checkpoint and no index of them (*{INDEX_SUFFIX}): the checkpoint is incomplete"
    if singles:
        names = ", ".join(single.name for single in singles[:3])
        return f"{path} has several safetensors files ({names}): give the path of the one to average"
    pickled = next((each for each in sorted(path.iterdir()) if each.suffix in _PICKLES and "model" in each.name), None)
    if pickled is not None:
        return _not_safetensors(pickled)
    for pattern, library in _SHARDED_BY.items():
        if any(path.glob(pattern)):
            return (
                f"{path} is a sharded checkpoint of {library}, with no safetensors files: convert it to safetensors "
                "with that library's script (accelerate merge-weights, zero_to_fp32.py --safe_serialization) first"
            )
    below = sorted({each.parent.name for each in path.glob(f"*/*{SUFFIX}")})
    if below:
        return f"{path} has no weights, its folders {', '.join(below)} have: give one of them, as in {path / below[0]}"
    return f"{path} has no safetensors files"


def _not_safetensors(path: Path) -> str:
    if path.suffix not in _PICKLES:
        return f"{path} is not a safetensors file or a folder"
    is_part = _SHARD.fullmatch(path.stem) is not None
    what, program = ("each checkpoint", _merge(path)) if is_part else ("each", _conversion(path))
    return (
        f"{path} is a pickle, which can run code when it is read, so it is refused: convert {what} with python -c "
        f'"{program}"'
    )


def _conversion(path: Path) -> str:
    """A program that writes the tensors of a pickle beside it."""
    weights = "['state_dict']" if path.suffix == ".ckpt" else ""  # Lightning's
    return (
        f"import torch, safetensors.torch; w = torch.load('{path}', weights_only=True){weights}; "
        f"safetensors.torch.save_file({{n: w[n].clone().contiguous() for n in w}}, '{path.with_suffix(SUFFIX)}')"
    )


def _merge(shard: Path) -> str:
    """A program that writes the tensors of all parts of a checkpoint into one file: parts would need an index."""
    parts = _PART.sub("-*-of-*", shard.name)
    return (
        f"import pathlib, torch, safetensors.torch; files = pathlib.Path('{shard.parent}').glob('{parts}'); "
        "w = {n: t for f in files for n, t in torch.load(f, weights_only=True).items()}; "
        f"safetensors.torch.save_file({{n: w[n].clone().contiguous() for n in w}}, "
        f"'{shard.parent / _PART.sub('', shard.stem)}{SUFFIX}')"
    )
