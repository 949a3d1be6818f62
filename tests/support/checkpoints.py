"""Checkpoints of a small model as frameworks write them, and a plain implementation of their averages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ema_server.checkpoints.average import Averaged

Run = Callable[..., list[Averaged]]
"""The fixture `run` of tests/server/checkpoints."""


def weights(step: int) -> dict[str, Tensor]:
    """A state dict with tensors of every kind: the name of the tensor says which."""
    generator = torch.Generator().manual_seed(step)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) - 0.5

    return {
        "linear.weight": rand(300, 7),
        "half.weight": rand(11, 3).bfloat16(),
        "double.weight": rand(5).double(),
        "bn.running_mean": rand(4),
        "bn.running_var": rand(4) + 1.0,
        "bn.num_batches_tracked": torch.tensor(step),
        "sn.weight_orig": rand(3, 3),
        "sn.weight_u": rand(3),
        "flags": torch.tensor([step % 2 == 0, True]),
        "empty": torch.zeros(0, 3),
        "scale": torch.tensor(float(step)),
    }


def save(folder: Path, tensors: Mapping[str, Tensor], *, name: str = "model") -> Path:
    """A checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / f"{name}.safetensors", metadata={"format": "pt"})
    return folder


def save_sharded(folder: Path, tensors: Mapping[str, Tensor], shards: int = 3) -> Path:
    """A checkpoint of several files with an index, as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        inside = {name: tensors[name] for name in names[number::shards]}
        weight_map |= dict.fromkeys(inside, file)
        save_file(inside, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_run(parent: Path, steps: Sequence[int]) -> Path:
    """A folder with a checkpoint of `weights` for each step."""
    for step in steps:
        save(parent / f"checkpoint-{step}", weights(step))
    return parent


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by safetensors' own reader."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def summed(checkpoints: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum in float64, added up from the shares; other tensors than floats are those of the last."""
    total = {}
    for name, newest in checkpoints[-1].items():
        if newest.is_floating_point():
            parts = (share * each[name].double() for share, each in zip(shares, checkpoints, strict=True))
            total[name] = sum(parts, torch.zeros_like(newest, dtype=torch.float64))
        else:
            total[name] = newest
    return total
