"""The plan of one model's snapshots: the manifest that a run is joined with, and the live tensors at each snapshot.

What cannot be streamed is refused by name, and so is a later change of names, dtypes or shapes, or the end of a tie.
Weights that become tied later are still streamed under each of their names.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

from ema_proto.errors import LocalProtocolError
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout
from ema_proto.wire.parts import part_of
from trainer_client.errors import GatheredError, PlanError
from trainer_client.model.adapters import Adapter
from trainer_client.model.dtypes import TORCH_DTYPES, WIRE_DTYPES, wire_dtype
from trainer_client.model.selection import WHOLE, Selection
from trainer_client.model.shards import box_of, holds_part, is_sharded
from trainer_client.model.sources import Identity, Node, Source, Table, check_state_dict, identity, tables, walk

log = logging.getLogger("ema")

_WHAT_TO_DO: Final = (
    "a run keeps the tensors that it was joined with: join after the change (after a forward pass, if that makes it), "
    "leave such tensors out with exclude=, or pass on_change='restart' to begin a new run with it"
)


@dataclass(frozen=True, eq=False)
class Plan:
    """The streamed tensors of one model, tied ones once; build with `Plan.of`.

    Attributes:
        manifest: of what is sent. On one rank of several, that is some of what it holds, see `part`.
        held: of all that this rank holds.
    """

    manifest: Manifest
    held: Manifest
    model: nn.Module
    _sources: tuple[Source, ...] = field(repr=False)
    _ties: tuple[tuple[Source, Source], ...] = field(repr=False)
    _nodes: tuple[Node, ...] = field(repr=False)
    _selection: Selection = field(repr=False)
    _extra_state: tuple[str, ...] = field(repr=False)
    adapter: Adapter | None = field(default=None, repr=False)  # if that is what is streamed

    @classmethod
    def of(cls, model: nn.Module, selection: Selection = WHOLE) -> Plan:
        """Plan the snapshots of `model` as it is now. The whole of a model with adapters is its active adapter.

        Args:
            model: the model, wrapped or not.
            selection: which part of it to stream; the rest may be of any kind.

        Raises:
            PlanError: it holds a tensor that cannot be streamed, its state dict is not simply its tensors, two names
                collide, a pattern matches nothing, several adapters are active, or there is nothing to stream.
        """
        plan = cls._of(model, selection, None)
        if plan._extra_state:
            text = (
                "ema: %s is not streamed, like any extra state (of %d modules): it is not averaged, nor in the versions"
            )
            log.warning(text, plan._extra_state[0], len(plan._extra_state))
        if plan.adapter is not None:
            text = "ema: of the model, the adapter %r is streamed, as PEFT saves it (%d tensors); see include="
            log.info(text, plan.adapter.name, len(plan.manifest.tensors))
        return plan

    @classmethod
    def _of(cls, model: nn.Module, selection: Selection, tied: Mapping[str, str] | None) -> Plan:
        """See `of`; `tied` maps each name to the first name of its tensor, to separate weights tied since then."""
        if not isinstance(model, nn.Module):
            raise PlanError(f"{type(model).__name__} is not a torch.nn.Module: pass the model itself")
        nodes, found = walk(model)
        if holds_part(model):
            model.state_dict()  # has FSDP put back the shards of what it gathered for a forward pass
        if not found:
            raise PlanError("the model has no parameters and no buffers: there is nothing to average")
        adapter = Adapter.of(model) if selection.is_whole else None
        found = found if adapter is None else adapter.choose(found)
        sources = selection.choose(found)
        dtypes = {source.name: wire_dtype(source.name, _required(source)) for source in sources}
        chosen = {source.name: _required(source) for source in sources}
        extra_state = check_state_dict(model, chosen, whole=selection.is_whole) if adapter is None else ()
        groups = _tied(sources, tied)
        try:
            manifest = layout(_spec(group, dtypes[group[0].name]) for group in groups)
        except LocalProtocolError as error:
            raise PlanError(str(error)) from None
        ties = tuple((group[0], alias) for group in groups for alias in group[1:])
        firsts = tuple(group[0] for group in groups)
        return cls(manifest, manifest, model, firsts, ties, nodes, selection.fixed(found), extra_state, adapter)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the model: shards, or the stages of a pipeline."""
        return holds_part(self.model)

    def part(self, indices: Sequence[int]) -> Plan:
        """The plan of what this rank sends, by indices into the tensors that it holds."""
        part = part_of(self.held, indices)
        sources = tuple(self._sources[index] for index in indices)
        return replace(self, manifest=Manifest(part.tensors), _sources=sources)

    def renewed(self, model: nn.Module) -> Plan:
        """This plan if it still describes `model`, else a new one of the same manifest (modules replaced by like ones).

        Raises:
            PlanError: names, dtypes or shapes have changed, or weights are tied no longer; the first is named.
        """
        is_same_adapter = self.adapter is None or self.adapter.is_active()
        if (
            model is self.model
            and is_same_adapter
            and all(node.is_intact() for node in self._nodes)
            and self._ties_hold()
        ):
            return self
        tied = {name: spec.name for spec in self.held.tensors for name in (spec.name, *spec.aliases)}
        fresh = Plan._of(model, self._selection, tied)
        difference = self.held.first_difference(fresh.held)
        if self.adapter is not None and fresh.adapter is not None and self.adapter.name != fresh.adapter.name:
            difference = f"the adapter {fresh.adapter.name!r} is active, it was {self.adapter.name!r}"
        if difference is not None:
            raise PlanError(f"the model has changed: {difference}; {_WHAT_TO_DO}")
        if self.manifest is self.held:
            return fresh
        places = {spec.name: index for index, spec in enumerate(self.held.tensors)}
        return fresh.part([places[spec.name] for spec in self.manifest.tensors])

    def tensors(self) -> list[Tensor]:
        """The live tensors now, in the manifest's order, checked.

        Raises:
            PlanError: one of them is gone, or has another dtype or shape than in the manifest.
            GatheredError: FSDP has gathered a sharded one for a forward pass.
        """
        tensors = self.live()
        self.check(tensors)
        return tensors

    def live(self) -> list[Tensor]:
        """The live tensors now, in the manifest's order: to be checked before their memory is read.

        Raises:
            PlanError: one of them is gone.
        """
        try:
            return [tensor for table in self._tables for tensor in table.read()]
        except KeyError:
            return [_required(source) for source in self._sources]  # which names the one that is gone

    def check(self, tensors: Sequence[Tensor], indices: Sequence[int] | None = None) -> None:
        """Check what `live` returned, or some of it by its indices, for what `tensors` raises."""
        dtypes, shapes = self._kinds
        if indices is not None:
            tensors = [tensors[index] for index in indices]
            dtypes, shapes = [dtypes[index] for index in indices], [shapes[index] for index in indices]
        # Compared as lists, because this runs for each tensor of each snapshot.
        same = [tensor.dtype for tensor in tensors] == dtypes and [tensor.shape for tensor in tensors] == shapes
        if same and not self._has_boxes:
            return
        for index, tensor in zip(range(len(tensors)) if indices is None else indices, tensors, strict=True):
            source, spec = self._sources[index], self.manifest.tensors[index]
            if spec.box is not None and not is_sharded(tensor):
                raise GatheredError(source.name)
            if tensor.shape != spec.shape or WIRE_DTYPES.get(tensor.dtype) != spec.dtype:
                raise PlanError(
                    f"the model has changed: tensor {source.name!r} is {tensor.dtype} {list(tensor.shape)}, "
                    f"it was {spec.dtype} {list(spec.shape)}; {_WHAT_TO_DO}"
                )

    @cached_property
    def _tables(self) -> tuple[Table, ...]:
        return tables(self._sources)

    @cached_property
    def _kinds(self) -> tuple[list[torch.dtype], list[tuple[int, ...]]]:
        specs = self.manifest.tensors
        return [TORCH_DTYPES[spec.dtype] for spec in specs], [spec.shape for spec in specs]

    @cached_property
    def _has_boxes(self) -> bool:
        return any(spec.box is not None for spec in self.manifest.tensors)

    def _ties_hold(self) -> bool:
        for first, alias in self._ties:
            tensor, other = first.maybe_tensor(), alias.maybe_tensor()
            if tensor is not other and (tensor is None or other is None or identity(tensor) != identity(other)):
                return False
        return True


def _required(source: Source) -> Tensor:
    tensor = source.maybe_tensor()
    if tensor is None:
        raise PlanError(f"the model has changed: tensor {source.name!r} is gone; {_WHAT_TO_DO}")
    return tensor


def _tied(sources: tuple[Source, ...], tied: Mapping[str, str] | None) -> list[list[Source]]:
    """Group the sources that are one tensor, in the order of their first names; only those in `tied`, if given."""
    groups: dict[tuple[Identity | str, str | None], list[Source]] = {}
    addresses = [_address(_required(source)) for source in sources]
    counts = Counter(addresses)
    for source, address in zip(sources, addresses, strict=True):
        key = identity(_required(source)) if counts[address] > 1 else None
        was = None if tied is None else tied.get(source.name, source.name)
        groups.setdefault((source.name if key is None else key, was), []).append(source)
    return list(groups.values())


def _address(tensor: Tensor) -> int:
    """A number that two tensors share if they are one, and maybe also if they are not."""
    return id(tensor) if is_sharded(tensor) else tensor.untyped_storage().data_ptr()


def _spec(group: list[Source], dtype: str) -> TensorSpec:
    first = group[0]
    tensor = _required(first)
    aliases = tuple(alias.name for alias in group[1:])
    shape, box = tuple(tensor.shape), box_of(first.name, tensor)
    return TensorSpec(first.name, dtype, shape, _role(first, tensor), 0, aliases, box)


def _role(source: Source, tensor: Tensor) -> Role:
    if source.is_buffer:
        return Role.STRUCTURAL if source.attribute in _structural_buffers(source.owner) else Role.BUFFER
    return Role.PARAM if tensor.requires_grad else Role.FROZEN


def _structural_buffers(module: nn.Module) -> frozenset[str]:
    """Names of the module's buffers that belong to one set of weights and mean nothing when averaged.

    These are the singular vectors of both forms of spectral norm and the 0/1 masks of pruning. (RNG states are
    integers, which are copied anyway.)
    """
    if isinstance(module, parametrizations._SpectralNorm):
        return frozenset({"_u", "_v"})
    names = set()
    pruning = getattr(sys.modules.get("torch.nn.utils.prune"), "BasePruningMethod", ())  # not imported: not used
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            names |= {f"{hook.name}_u", f"{hook.name}_v"}
        elif isinstance(hook, pruning):
            names.add(f"{hook._tensor_name}_mask")
    return frozenset(names)
