"""Which tensors can be streamed, and under which wire dtype; for the others, what to do instead."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trainer_client.errors import PlanError
from trainer_client.model.shards import local_of

WIRE_DTYPES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {name: dtype for dtype, name in WIRE_DTYPES.items()}


def wire_dtype(name: str, tensor: Tensor) -> str:
    """The dtype under which `tensor` is sent.

    Raises:
        PlanError: a snapshot cannot hold a tensor of this kind.
    """
    local = local_of(tensor)
    problem = _kind_problem(local) or _dtype_problem(local)
    if problem is not None:
        raise PlanError(f"tensor {name!r} {problem}")
    return WIRE_DTYPES[tensor.dtype]


def _kind_problem(tensor: Tensor) -> str | None:
    if is_lazy(tensor):
        return "has no shape yet (a lazy module): run one forward pass first"
    if getattr(tensor, "ds_numel", tensor.numel()) != tensor.numel():
        return "is partitioned by DeepSpeed (ZeRO stage 3): send a full copy of the model with update() from rank 0"
    if hasattr(tensor, "ds_id"):
        return "is sharded (DeepSpeed ZeRO-3): send a full copy of the model with update() from rank 0"
    if _is_wrapper(tensor):
        return f"is a {type(tensor).__name__}, not a plain tensor: average the model before it is converted"
    if tensor.is_meta:
        return "is on the meta device and has no values: give the model real weights first, for example with to_empty()"
    if tensor.is_quantized:
        return f"is quantized ({_short(tensor.dtype)}): average the float model and quantize the average"
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else f"sparse ({_short(tensor.layout)})"
        return f"is {kind}: keep it dense, or register it with persistent=False if it is a buffer"
    return None


def _dtype_problem(tensor: Tensor) -> str | None:
    if tensor.dtype in WIRE_DTYPES:
        return None
    dtype = _short(tensor.dtype)
    if tensor.is_complex():
        return f"is complex ({dtype}): hold it as real numbers, torch.view_as_real(x)"
    if dtype.startswith("float8"):
        return f"is {dtype}, too coarse to average: stream the weights that the optimizer keeps in bfloat16 or float32"
    return f"is {dtype}; supported are {', '.join(_short(known) for known in WIRE_DTYPES)}"


def _is_wrapper(tensor: object) -> bool:  # not inline: torch's type guard makes the code after it unreachable
    return is_traceable_wrapper_subclass(tensor)


def _short(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")
