"""Wire dtypes: safetensors' names and item sizes. Each side maps them to torch's dtypes."""

from __future__ import annotations

ITEM_BYTES: dict[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

FLOATS: frozenset[str] = frozenset({"F64", "F32", "BF16", "F16"})
