"""Which tensors an average averages; of the others it holds the newest value.

A tensor can be averaged if it is a float, is not structural and is not exempt from averaging in this run. Of these, a
rule leaves out those that its patterns or its `buffers="copy"` name; `raw` averages none.
"""

from __future__ import annotations

from collections.abc import Sequence

from ema_proto.averages.rules import AverageSpec, Raw
from ema_proto.names import is_chosen
from ema_proto.wire.manifest import Manifest, Role, TensorSpec
from ema_server.tensors.layout import Form, Segment, segments


def form_of(rule: AverageSpec) -> Form:
    """How an average of this rule is held: `raw` keeps the wire's bytes, the others are as wide as they ask for."""
    if isinstance(rule, Raw):
        return Form.WIRE
    return Form.EXACT if rule.accumulator == "float64" else Form.WIDE


def can_be_averaged(tensor: TensorSpec, exempt: frozenset[str] = frozenset()) -> bool:
    """Whether rules apply to a tensor of a run with these exempt tensors."""
    return tensor.is_float and tensor.role is not Role.STRUCTURAL and tensor.name not in exempt


def averaged_names(manifest: Manifest, rule: AverageSpec) -> frozenset[str]:
    """Names of the tensors that an average of this rule averages where they can be.

    Compute it once per average: it compares each name with each pattern.
    """
    return frozenset(tensor.name for tensor in manifest.tensors if _averages(rule, tensor))


def copied_names(manifest: Manifest, exempt: frozenset[str], rule: AverageSpec) -> frozenset[str]:
    """Names, tied ones too, of the tensors that a weighted sum of averages of this rule takes from the newest of them.

    Frozen tensors are among them: a sum, or a narrower dtype, could only round them.
    """
    averaged = averaged_names(manifest, rule)
    copied = (
        tensor
        for tensor in manifest.tensors
        if tensor.role is Role.FROZEN or tensor.name not in averaged or not can_be_averaged(tensor, exempt)
    )
    return frozenset(name for tensor in copied for name in tensor.names)


def segments_for(manifest: Manifest, exempt: frozenset[str], averaged: Sequence[frozenset[str]]) -> tuple[Segment, ...]:
    """The segments of a snapshot for several averages.

    Args:
        manifest: the run's manifest.
        exempt: names of tensors that no average averages.
        averaged: `averaged_names` of each average; the first has bit 0 of the segments' masks.
    """

    def mask(tensor: TensorSpec) -> int:
        if not can_be_averaged(tensor, exempt):
            return 0
        return sum((tensor.name in names) << number for number, names in enumerate(averaged))

    return segments(manifest, mask)


def _averages(rule: AverageSpec, tensor: TensorSpec) -> bool:
    if isinstance(rule, Raw) or (tensor.role is Role.BUFFER and rule.buffers == "copy"):
        return False
    return is_chosen(tensor.name, rule.include, rule.exclude)
