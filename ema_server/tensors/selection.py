"""What an average does with each tensor: its form in memory, and which tensors it averages. Pure.

Rules (`ema_proto.averages.specs`), the manifest of a run and the names of its exempt tensors give forms, names, and
the segments of a snapshot with a mask of the averages that average them; what an average does not average, it copies.
"""

from __future__ import annotations

from collections.abc import Sequence

from ema_proto.averages.rules import AverageSpec, Raw
from ema_proto.patterns import is_chosen
from ema_proto.wire.manifest import Manifest, Role, TensorSpec
from ema_server.tensors.layout import Form, Segment, is_averaged, segments


def form_of(rule: AverageSpec) -> Form:
    """How an average of this rule is held: `raw` keeps the wire's bytes, the others are as wide as they ask for."""
    if isinstance(rule, Raw):
        return Form.WIRE
    return Form.EXACT if rule.accumulator == "float64" else Form.WIDE


def averages(rule: AverageSpec, tensor: TensorSpec) -> bool:
    """Whether an average of this rule averages a tensor that can be; otherwise it takes the tensor's newest value."""
    if isinstance(rule, Raw) or (tensor.role is Role.BUFFER and rule.buffers == "copy"):
        return False
    return is_chosen(tensor.name, rule.include, rule.exclude)


def averaged_names(manifest: Manifest, rule: AverageSpec) -> frozenset[str]:
    """Names of the tensors that an average of this rule averages where they can be.

    To be kept with the average: each name is compared with each pattern.
    """
    return frozenset(tensor.name for tensor in manifest.tensors if averages(rule, tensor))


def segments_for(manifest: Manifest, exempt: frozenset[str], averaged: Sequence[frozenset[str]]) -> tuple[Segment, ...]:
    """The segments of a snapshot for averages, numbered as they are given, which average the tensors of these names."""

    def averaged_by(tensor: TensorSpec) -> int:
        if not is_averaged(tensor, exempt):
            return 0
        return sum((tensor.name in names) << number for number, names in enumerate(averaged))

    return segments(manifest, averaged_by)
