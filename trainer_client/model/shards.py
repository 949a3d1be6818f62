"""The part of a sharded tensor that this rank holds: its memory, and which box of the whole it is.

DTensors (FSDP2, HSDP, tensor and expert parallelism) are recognised without importing them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ema_proto.wire.boxes import Box, lies_within, whole
from trainer_client.errors import PlanError
from trainer_client.model.wrappers import Stages


def is_sharded(tensor: object) -> bool:
    """Whether the tensor is a DTensor: a tensor of a device mesh, of which this rank has a local part."""
    return type(tensor).__name__ == "DTensor" and hasattr(tensor, "device_mesh")


def holds_part(model: nn.Module) -> bool:
    """Whether this rank holds a part of the model: stages of a pipeline, or shards, also while they are gathered."""
    if isinstance(model, Stages) or any(is_sharded(parameter) for parameter in model.parameters()):
        return True
    return any(type(module).__name__.startswith("FSDP") and hasattr(module, "reshard") for module in model.modules())


def as_module(model: nn.Module | Sequence[nn.Module]) -> nn.Module:
    """The model, or the stages of a pipeline as one."""
    return Stages(model) if isinstance(model, Sequence) else model


def local_of(tensor: Tensor) -> Tensor:
    """The memory of a tensor on this rank; the tensor itself if it is not sharded. Not a copy.

    An optimizer's step raises the version of the DTensor, not that of this.
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def box_of(name: str, tensor: Tensor) -> Box | None:
    """The box that this rank holds; None if that is the whole tensor.

    Raises:
        PlanError: the tensor holds partial sums, or torch's own account of the box is wrong.
    """
    if not is_sharded(tensor):
        return None
    placements = tensor.placements  # type: ignore[attr-defined]
    if any(type(each).__name__ == "Partial" for each in placements):
        raise PlanError(f"tensor {name!r} holds partial sums ({placements}): a parameter has a value of its own")
    chunks = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    local = local_of(tensor)
    box = Box(tuple(chunks[0].offsets), tuple(chunks[0].sizes)) if len(chunks) == 1 else None
    # Under FSDP with tensor parallelism torch computes the wrong box for some uneven shapes (pytorch#161368).
    if box is None or box.sizes != tuple(local.shape) or not lies_within(box, tensor.shape):
        what = "nothing" if box is None else f"{box} of {list(tensor.shape)}"
        raise PlanError(
            f"tensor {name!r} is sharded as {placements} and has a local shape of {list(local.shape)}, for which torch "
            f"reports {what}: choose sizes that the mesh divides, or leave the tensor out with exclude="
        )
    return None if box == whole(tensor.shape) else box
