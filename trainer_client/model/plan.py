"""The plan of one model's snapshots: the manifest that a run is joined with, and the live tensors at each snapshot.

What cannot be streamed is refused by name, and so is any later change of names, dtypes, shapes or ties.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

from ema_proto.errors import LocalProtocolError
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout
from trainer_client.errors import PlanError
from trainer_client.model.dtypes import WIRE_DTYPES, wire_dtype
from trainer_client.model.selection import WHOLE, Selection
from trainer_client.model.sources import Identity, Node, Source, check_state_dict, identity, walk

_WHAT_TO_DO = "a run keeps the tensors that it was joined with: close this client and stream to a run of another name"


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The streamed tensors of one model, tied ones once; build with `Plan.of`."""

    manifest: Manifest
    model: nn.Module
    _sources: tuple[Source, ...] = field(repr=False)
    _ties: tuple[tuple[Source, Source], ...] = field(repr=False)
    _nodes: tuple[Node, ...] = field(repr=False)
    _selection: Selection = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module, selection: Selection = WHOLE) -> Plan:
        """Plan the snapshots of `model` as it is now.

        Args:
            model: the model, wrapped or not.
            selection: which part of it to stream; the rest may be of any kind.

        Raises:
            PlanError: it holds a tensor that cannot be streamed, its state dict is not simply its tensors, two names
                collide, a pattern matches nothing, or there is nothing to stream.
        """
        if not isinstance(model, nn.Module):
            raise PlanError(f"{type(model).__name__} is not a torch.nn.Module: pass the model itself")
        nodes, found = walk(model)
        if not found:
            raise PlanError("the model has no parameters and no buffers: there is nothing to average")
        sources = selection.choose(found)
        dtypes = {source.name: wire_dtype(source.name, _required(source)) for source in sources}
        chosen = {source.name: _required(source) for source in sources}
        check_state_dict(model, chosen, whole=selection.is_whole)
        groups = _tied(sources)
        try:
            manifest = layout(_spec(group, dtypes[group[0].name]) for group in groups)
        except LocalProtocolError as error:
            raise PlanError(str(error)) from None
        ties = tuple((group[0], alias) for group in groups for alias in group[1:])
        return cls(manifest, model, tuple(group[0] for group in groups), ties, nodes, selection.fixed(found))

    def renewed(self, model: nn.Module) -> Plan:
        """This plan if it still describes `model`, else a new one of the same manifest (modules replaced by like ones).

        Raises:
            PlanError: the model has changed in names, dtypes, shapes or ties; the text names the first tensor.
        """
        if model is self.model and all(node.is_intact() for node in self._nodes) and self._ties_hold():
            return self
        fresh = Plan.of(model, self._selection)
        difference = self.manifest.first_difference(fresh.manifest)
        if difference is not None:
            raise PlanError(f"the model has changed: {difference}; {_WHAT_TO_DO}")
        return fresh

    def tensors(self) -> list[Tensor]:
        """The live tensors now, in the manifest's order.

        Raises:
            PlanError: one of them is gone, or has another dtype or shape than in the manifest.
        """
        return list(self._checked_tensors())

    def _checked_tensors(self) -> Iterator[Tensor]:
        for source, spec in zip(self._sources, self.manifest.tensors, strict=True):
            tensor = _required(source)
            if tensor.shape != spec.shape or WIRE_DTYPES.get(tensor.dtype) != spec.dtype:
                raise PlanError(
                    f"the model has changed: tensor {source.name!r} is {tensor.dtype} {list(tensor.shape)}, "
                    f"it was {spec.dtype} {list(spec.shape)}; {_WHAT_TO_DO}"
                )
            yield tensor

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


def _tied(sources: tuple[Source, ...]) -> list[list[Source]]:
    """Group the sources that are one tensor, in the order of their first names."""
    groups: dict[Identity | str, list[Source]] = {}
    for source in sources:
        key = identity(_required(source))
        groups.setdefault(source.name if key is None else key, []).append(source)
    return list(groups.values())


def _spec(group: list[Source], dtype: str) -> TensorSpec:
    first = group[0]
    tensor = _required(first)
    aliases = tuple(alias.name for alias in group[1:])
    return TensorSpec(first.name, dtype, tuple(tensor.shape), _role(first, tensor), 0, aliases)


def _role(source: Source, tensor: Tensor) -> Role:
    if source.is_buffer:
        return Role.STRUCTURAL if source.attribute in _structural_buffers(source.owner) else Role.BUFFER
    return Role.PARAM if tensor.requires_grad else Role.FROZEN


def _structural_buffers(module: nn.Module) -> frozenset[str]:
    """Names of the module's buffers that belong to one set of weights and mean nothing when averaged.

    These are the singular vectors of both forms of spectral norm. (RNG states are integers, which are copied anyway.)
    """
    if isinstance(module, parametrizations._SpectralNorm):
        return frozenset({"_u", "_v"})
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    return frozenset(f"{hook.name}_{vector}" for hook in hooks for vector in "uv")
