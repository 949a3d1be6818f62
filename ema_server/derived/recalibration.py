"""A version with other buffers: the same weights, with statistics that a client computed for them.

It is a derived version of the average `{average}-bn`. Uploaded buffers must fit the version and be finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ema_proto.wire.manifest import Manifest, Role, TensorSpec
from ema_server.derived.queue import DerivationQueue
from ema_server.derived.run_model import model_of
from ema_server.derived.store import Derivation
from ema_server.storage.catalog import Version
from ema_server.storage.companions import sources_in
from ema_server.storage.disk import sha256
from ema_server.storage.records import CONFIG_FILE, BrokenGeneration
from ema_server.tensors.dtypes import TORCH_DTYPES
from ema_server.tensors.file_plan import MODEL_FILE
from ema_server.tensors.safetensors_file import Stored, read_header, replaced

RECALIBRATED = "recalibrated"
SUFFIX = "-bn"
BUFFERS_BYTES_MAX = 16 << 20  # a ResNet-152 has 1.2 MB of statistics


class BadBuffers(ValueError):
    """The upload cannot replace the buffers of the version; the text says which tensor and why."""


def recalibrate(deriving: DerivationQueue, base: Version, data: bytes) -> tuple[Version, bool]:
    """Write `base` with the buffers in `data` as a new version; returns it, and whether it did not exist before.

    Args:
        deriving: the queue, whose thread calls this.
        base: the version, which is not deleted meanwhile.
        data: a safetensors file.

    Raises:
        BadBuffers: `data` does not fit.
        BrokenGeneration, BadModelFile: a stored file is damaged.
        OSError: the disk fails.
        VersionGone: the base was deleted, or the run was set aside.
    """
    catalog = deriving.store.catalog
    with catalog.hold(base):
        path = base.folder / MODEL_FILE
        _verify(base, path)
        buffers = checked(data, read_header(path), model_of(catalog, base.run).manifest)
        known = {version.id for version in catalog.derived(base.run)}
        config = base.folder / CONFIG_FILE
        version = deriving.store.write(
            _derivation(base, sorted(buffers)),
            deriving.pieces(replaced(path, buffers)),
            config.read_bytes() if config.exists() else None,
            sources_in(base),
        )
    return version, version.id not in known


def checked(data: bytes, stored: tuple[Stored, ...], manifest: Manifest) -> dict[str, bytes]:
    """The bytes of the uploaded buffers, under every name that each one has in the version's file.

    Raises:
        BadBuffers: `data` is not a safetensors file or is empty, or a tensor in it is not a buffer, has another dtype
            or shape, or is not finite.
    """
    try:
        uploaded = load(data)
    except SafetensorError as error:
        raise BadBuffers(f"the body is not a safetensors file: {error}") from None
    if not uploaded:
        raise BadBuffers("the body holds no tensor: send the buffers that changed")
    places = {place.name: place for place in stored}
    specs = {name: tensor for tensor in manifest.tensors for name in tensor.names}
    found: dict[str, bytes] = {}
    for name, tensor in uploaded.items():
        spec = _buffer(name, specs)
        _check_tensor(name, tensor, places[name])
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        for each in spec.names:
            if found.setdefault(each, content) != content:
                raise BadBuffers(f"{name!r} and {spec.name!r} are one tensor of the model, with two values here")
    return found


def _buffer(name: str, specs: Mapping[str, TensorSpec]) -> TensorSpec:
    spec = specs.get(name)
    if spec is None:
        raise BadBuffers(f"the model has no tensor {name[:100]!r}: names are those of its state dict")
    if spec.role is not Role.BUFFER:
        raise BadBuffers(f"{name!r} is a {spec.role.value} of the model: only buffers can be replaced")
    return spec


def _check_tensor(name: str, tensor: Tensor, place: Stored) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (TORCH_DTYPES[place.dtype], place.shape):
        wanted = f"{TORCH_DTYPES[place.dtype]} {list(place.shape)}"
        raise BadBuffers(f"{name!r} is {tensor.dtype} {list(tensor.shape)}, and {wanted} in the version")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise BadBuffers(f"{name!r} holds NaN or Inf")


def _verify(base: Version, path: Path) -> None:
    """The copy gets a digest of its own, so damage must be found here."""
    known = base.file(MODEL_FILE)
    if known is None or known.sha256 != sha256(path):
        raise BrokenGeneration(f"{MODEL_FILE} of version {base.id} is damaged: its sha256 is another one")


def _derivation(base: Version, replaced_names: list[str]) -> Derivation:
    return Derivation(
        run=base.run,
        average=base.average + SUFFIX,
        spec=base.spec,
        step=base.step,
        updates=base.updates,
        gap_steps=base.gap_steps,
        kind=RECALIBRATED,
        provenance={
            "from": {"average": base.average, "step": base.step, "id": base.id},
            "replaced": replaced_names,
        },
    )
