"""Wire dtypes as torch's: the server's only such table."""

from __future__ import annotations

import torch

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def view(data: torch.Tensor, dtype: str, offset: int, count: int) -> torch.Tensor:
    """`count` elements of wire dtype `dtype` from byte `offset` of a uint8 tensor; not a copy."""
    torch_dtype = TORCH_DTYPES[dtype]
    return data.narrow(0, offset, count * torch_dtype.itemsize).view(torch_dtype)
