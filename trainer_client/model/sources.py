"""Where the tensors of a model live: which module holds each, under which attribute, and by which canonical name.

A plan keeps these places and not the tensors, because training code replaces buffers and `.data`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Final, TypeAlias, cast

import torch
from torch import Tensor, nn

from trainer_client.errors import PlanError
from trainer_client.model.shards import is_sharded, local_of
from trainer_client.model.wrappers import Stages, canonical_names, wrapped_attribute

Identity: TypeAlias = tuple[object, ...]

EXTRA_STATE: Final = "_extra_state"  # the key under which torch keeps what a module's get_extra_state() returns


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    owner: nn.Module
    attribute: str
    is_buffer: bool

    def maybe_tensor(self) -> Tensor | None:
        table = self.owner._buffers if self.is_buffer else self.owner._parameters
        if self.attribute not in table:  # not .get(): the tables of scripted modules have none
            return None
        return table[self.attribute]


@dataclass(frozen=True, slots=True)
class Table:
    """Some parameters of a module, or some buffers."""

    owner: nn.Module
    is_buffer: bool
    attributes: tuple[str, ...]

    def read(self) -> list[Tensor]:
        """The tensors now.

        Raises:
            KeyError: one of them is gone.
        """
        table = self.owner._buffers if self.is_buffer else self.owner._parameters
        found = [table[attribute] for attribute in self.attributes]
        if type(None) in set(map(type, found)):
            raise KeyError
        return cast("list[Tensor]", found)


def tables(sources: Iterable[Source]) -> tuple[Table, ...]:
    """The same tensors in the same order, in as few tables as possible."""
    grouped = groupby(sources, lambda source: (id(source.owner), source.is_buffer))
    runs = (list(group) for _, group in grouped)
    return tuple(Table(run[0].owner, run[0].is_buffer, tuple(each.attribute for each in run)) for run in runs)


@dataclass(frozen=True, slots=True)
class Node:
    """A module as it was when the plan was made: the names of its tensors, and its children by identity."""

    module: nn.Module
    parameters: list[str]
    buffers: list[str]
    children: list[nn.Module | None]  # keeps them alive, so that no other object can get one of the ids
    children_ids: list[int]

    @classmethod
    def of(cls, module: nn.Module) -> Node:
        children = list(module._modules.values())
        return cls(module, _parameters(module), _buffers(module), children, list(map(id, children)))

    def is_intact(self) -> bool:
        """Whether the module is still like that. Runs for every module at every snapshot."""
        module = self.module
        return (
            list(map(id, module._modules.values())) == self.children_ids
            and _parameters(module) == self.parameters
            and _buffers(module) == self.buffers
        )


def walk(model: nn.Module) -> tuple[tuple[Node, ...], tuple[Source, ...]]:
    """Every module and every tensor of the state dict, in its order; a tied tensor once for each of its names.

    Raises:
        PlanError: two tensors get the same name, or a wrapper hides the parameters.
    """
    nodes: list[Node] = []
    sources: dict[str, Source] = {}
    for prefix, node in _nodes(model, ""):
        nodes.append(node)
        for attribute in (*node.parameters, *node.buffers):
            source = Source(prefix + attribute, node.module, attribute, attribute in node.buffers)
            if source.name in sources:
                raise PlanError(
                    f"two tensors are named {source.name!r} once the wrappers' prefixes are dropped: rename a module"
                )
            sources[source.name] = source
    return tuple(nodes), tuple(sources.values())


def identity(tensor: Tensor) -> Identity | None:
    """A key that two tensors share if and only if they are the same view of the same memory; None if empty.

    Sharded tensors are the same if they are one object: a rank that holds nothing of them must find the same ties.
    """
    if is_sharded(tensor):
        return (id(tensor),)
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    place = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*place, tensor.dtype, tensor.shape, tensor.stride())


def storage_address(tensor: Tensor) -> int | None:
    """The address of the tensor's storage on this rank; None if it has none (sparse): such are not streamed."""
    try:
        return local_of(tensor).untyped_storage().data_ptr()
    except RuntimeError:  # NotImplementedError is one
        return None


def version_of(tensor: Tensor) -> int:
    """The tensor's count of in-place writes (not those through `.data`); always 0 for an inference tensor."""
    return 0 if tensor.is_inference() else tensor._version


def check_state_dict(model: nn.Module, tensors: dict[str, Tensor], *, whole: bool = True) -> tuple[str, ...]:
    """Check that the model's `state_dict()` holds exactly the tensors that were found, besides extra state.

    A module may rename, add or compute entries of its state dict; a stream of its parameters and buffers would then
    give files that it cannot load.

    Args:
        model: the model.
        tensors: its tensors by canonical name, or some of them.
        whole: whether these are all; if not, other entries are not checked.

    Returns:
        The names of the entries made by `get_extra_state`, which are left out.

    Raises:
        PlanError: an entry of the state dict is not one of the tensors, or one of them is missing there.
    """
    missing, extra_state = dict(tensors), list[str]()
    entries = model.state_dict()
    for name, value in zip(canonical_names(model, entries), entries.values(), strict=True):
        if not whole and name not in tensors:
            continue
        if name not in tensors and name.rpartition(".")[2] == EXTRA_STATE:
            extra_state.append(name)
            continue
        if name not in tensors or not isinstance(value, Tensor) or not _is_same(value, tensors[name]):
            raise PlanError(
                f"the state dict's {name!r} is not a parameter or buffer of the model but made by its own state_dict() "
                "or a hook: stream the module inside, whose state dict is plain"
            )
        missing.pop(name, None)
    if missing:
        raise PlanError(
            f"{next(iter(missing))!r} is a parameter or buffer of the model, but its own state_dict() or a hook leaves "
            "it out: register it with persistent=False, or stream the module inside, whose state dict is plain"
        )
    return tuple(extra_state)


def _is_same(entry: Tensor, tensor: Tensor) -> bool:
    """Whether an entry of a state dict is this tensor, detached."""
    if type(entry) is Tensor and type(tensor) in (Tensor, nn.Parameter) and entry.dtype == tensor.dtype:
        return entry.is_set_to(tensor)  # the same memory, shape and strides
    if is_sharded(entry) and is_sharded(tensor):
        return entry.shape == tensor.shape and identity(local_of(entry)) == identity(local_of(tensor))
    return identity(entry) == identity(tensor)


def _nodes(module: nn.Module, prefix: str) -> Iterator[tuple[str, Node]]:
    node = Node.of(module)
    yield prefix, node
    inner, stages = wrapped_attribute(module, prefix.removesuffix(".")), isinstance(module, Stages)
    for name, child in module._modules.items():
        # The stages of a pipeline have the names that they have in the whole model.
        # Another child of a wrapper holds the wrapped module once more: Fabric's has it also in DDP.
        if child is not None and inner in (None, name):
            yield from _nodes(child, prefix if name == inner or stages else f"{prefix}{name}.")


def _parameters(module: nn.Module) -> list[str]:
    if not module._parameters:
        return []
    return [name for name, tensor in module._parameters.items() if tensor is not None]


def _buffers(module: nn.Module) -> list[str]:
    if not module._buffers:
        return []
    hidden = module._non_persistent_buffers_set
    return [name for name, tensor in module._buffers.items() if tensor is not None and name not in hidden]
