"""Wrappers put around modules for speed or distribution, whose names must not reach a checkpoint.

Comes in: a module. Goes out: the attribute under which it hides the real one, or a refusal. Recognised by type, never
by name, so a user's own submodule called `module` keeps its name; and only by types that are loaded already: what was
never imported has no instances, and importing torch.compile's costs a second.
"""

from __future__ import annotations

import sys
from typing import Final

from torch import nn

from trainer_client.errors import PlanError

# (file, class, attribute of the wrapped module)
_WRAPPERS: Final = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",  # base of the checkpointing and the offloading one
        "_checkpoint_wrapped_module",
    ),
)
_FSDP1: Final = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")


def wrapped_attribute(module: nn.Module, name: str) -> str | None:
    """The attribute under which `module` holds the module that it wraps; None for anything that is no wrapper.

    Args:
        module: any module.
        name: its name in the model, for the message.

    Raises:
        PlanError: the wrapper flattens and shards the parameters, so that the model's own are not there.
    """
    if _is(module, *_FSDP1):
        where = repr(name) if name else "the model"
        raise PlanError(
            f"{where} is wrapped in FullyShardedDataParallel, and sharded models cannot be streamed: "
            "train it with DistributedDataParallel, or send a gathered copy with update() from rank 0"
        )
    return next((attribute for file, cls, attribute in _WRAPPERS if _is(module, file, cls)), None)


def canonical_name(model: nn.Module, key: str) -> str:
    """The name of a state-dict key without wrappers, however many of their prefixes the key still has.

    Some wrappers drop their own prefix from the state dict and some do not, so the key is followed through the modules.
    """
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
        module, rest = inner, tail
        parts.append(child)


def _is(module: nn.Module, file: str, cls: str) -> bool:
    kind = getattr(sys.modules.get(file), cls, None)
    return kind is not None and isinstance(module, kind)
