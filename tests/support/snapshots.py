"""Reading a snapshot's bytes back, with safetensors' own reader instead of ours."""

from __future__ import annotations

import json
import struct

import safetensors.torch
from torch import Tensor

from ema_proto.wire.manifest import Manifest


def decode(manifest: Manifest, data: bytes | memoryview) -> dict[str, Tensor]:
    """The tensors of a snapshot by name: put a safetensors header before its bytes and load that."""
    header = {
        spec.name: {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [spec.offset, spec.end]}
        for spec in manifest.tensors
    }
    text = json.dumps(header).encode()
    return safetensors.torch.load(struct.pack("<Q", len(text)) + text + bytes(data))
