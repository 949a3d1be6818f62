"""The part of a sharded tensor that this rank holds: its memory, and which box of the whole it is.

DTensors (FSDP2, HSDP, tensor and expert parallelism) are recognised without importing them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ema_proto.wire.boxes import Box, lies_within
from trainer_client.errors import PlanError
from trainer_client.model.wrappers import Stages


def is_sharded(tensor: object) -> bool:
    """Whether the tensor is a DTensor: a tensor of a device mesh, of which this rank has a local part."""
    return _is_sharded_type(type(tensor)) and hasattr(tensor, "device_mesh")


def _is_sharded_type(kind: type) -> bool:
    return kind.__name__ == "DTensor"


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


def locals_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """As `local_of` of each; the sequence itself if none is sharded, which costs a few ns for each tensor."""
    if not any(map(_is_sharded_type, set(map(type, tensors)))):
        return tensors
    return [local_of(tensor) for tensor in tensors]


def box_of(name: str, tensor: Tensor) -> Box | None:
    """The box that this rank holds; None if that is the whole tensor.

    Raises:
        PlanError: the tensor holds partial sums, or it is not known which box this is.
    """
    if not is_sharded(tensor):
        return None
    placements = tensor.placements  # type: ignore[attr-defined]
    if any(type(each).__name__ == "Partial" for each in placements):
        raise PlanError(f"tensor {name!r} holds partial sums ({placements}): a parameter has a value of its own")
    local = local_of(tensor)
    if local.shape == tensor.shape:
        return None
    box = _box_of_fsdp_after_others(tensor) or _box_of_torch(tensor)
    if box is None or box.sizes != tuple(local.shape) or not lies_within(box, tensor.shape):
        what = "nothing" if box is None else f"{box} of {list(tensor.shape)}"
        raise PlanError(
            f"tensor {name!r} is sharded as {placements} and has a local shape of {list(local.shape)}, for which "
            f"torch {torch.__version__} reports {what}: choose sizes that the mesh divides, use a newer torch, or "
            "leave the tensor out with exclude="
        )
    return box


def _box_of_torch(tensor: Tensor) -> Box | None:
    if not hasattr(tensor, "__create_chunk_list__"):  # torch 2.4
        return None
    chunks = tensor.__create_chunk_list__()
    return Box(tuple(chunks[0].offsets), tuple(chunks[0].sizes)) if len(chunks) == 1 else None


def _box_of_fsdp_after_others(tensor: Tensor) -> Box | None:
    """The box if FSDP shards a dimension that tensor or expert parallelism has sharded before; None if not.

    Torch reports a wrong one for some sizes that the mesh does not divide (pytorch#161368). Here FSDP's mesh dimension
    comes first and its placement is a `_StridedShard`, whose `split_factor` is the number of shards before it.
    """
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    strided = [index for index, each in enumerate(placements) if type(each).__name__ == "_StridedShard"]
    if len(strided) != 1:
        return None
    fsdp, dimension = strided[0], placements[strided[0]].dim
    same = [index for index, each in enumerate(placements) if getattr(each, "dim", None) == dimension and index != fsdp]
    if min(same, default=-1) < fsdp or math.prod(map(mesh.size, same)) != placements[fsdp].split_factor:
        return None
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    others = [index for index, each in enumerate(placements) if hasattr(each, "dim") and index != fsdp]
    for index in (*others, fsdp):
        cut = placements[index].dim
        step = -(-sizes[cut] // mesh.size(index))  # as `torch.chunk` does
        start = min(step * mesh.get_coordinate()[index], sizes[cut])
        offsets[cut], sizes[cut] = offsets[cut] + start, min(step, sizes[cut] - start)
    return Box(tuple(offsets), tuple(sizes))
