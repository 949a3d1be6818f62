"""Modules wrapped around others for speed or distribution, whose prefixes are dropped from tensor names.

Wrappers are recognised by type, so that a user's own submodule called `module` keeps its name, and only by types that
are imported already: a class that was never imported has no instances, and importing torch.compile's takes a second.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Final

from torch import nn

from trainer_client.errors import PlanError

# (file, class, attribute of the wrapped module)
_WRAPPERS: Final = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("lightning.fabric.wrappers", "_FabricModule", "_original_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_original_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",  # base of the checkpointing and the offloading one
        "_checkpoint_wrapped_module",
    ),
)
_FSDP1: Final = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")


class Stages(nn.Module):
    """The modules that a rank of a pipeline holds, each with the names that its tensors have in the whole model."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            self.add_module(str(index), module)


def wrapped_attribute(module: nn.Module, name: str) -> str | None:
    """The attribute under which a wrapper holds the wrapped module; None if `module`, named `name`, is no wrapper.

    Raises:
        PlanError: the wrapper replaces the model's parameters by flattened shards (FSDP 1).
    """
    if _is(module, *_FSDP1):
        where = repr(name) if name else "the model"
        raise PlanError(
            f"{where} is wrapped in FullyShardedDataParallel (FSDP 1), whose flattened parameters cannot be streamed: "
            "shard it with fully_shard (FSDP 2), or send a gathered copy with update() from rank 0"
        )
    return next((attribute for file, cls, attribute in _WRAPPERS if _is(module, file, cls)), None)


def canonical_names(model: nn.Module, keys: Iterable[str]) -> Iterator[str]:
    """The names of state-dict keys without the prefixes of wrappers; each module is found once for its tensors."""
    prefixes: dict[str, str] = {}
    for key in keys:
        owner, _, attribute = key.rpartition(".")
        if owner not in prefixes:
            prefixes[owner] = _canonical_name(model, key).removesuffix(attribute)
        yield prefixes[owner] + attribute


def _canonical_name(model: nn.Module, key: str) -> str:
    # Some wrappers drop their own prefix from the state dict, so the key is followed through the modules.
    module, rest, parts = model, key, list[str]()
    while True:
        attribute = wrapped_attribute(module, ".".join(parts))
        if attribute is not None:
            module, rest = getattr(module, attribute), rest.removeprefix(attribute + ".")
            continue
        child, dot, tail = rest.partition(".")
        inner = module._modules[child] if dot and child in module._modules else None
        if inner is None:
            return ".".join([*parts, rest])
        if not isinstance(module, Stages):
            parts.append(child)
        module, rest = inner, tail


def _is(module: nn.Module, file: str, cls: str) -> bool:
    kind = getattr(sys.modules.get(file), cls, None)
    return kind is not None and isinstance(module, kind)
