"""What an average does with each tensor: its form in memory, and which tensors it averages. Pure.

Comes in: rules (`ema_proto.specs`), the manifest of a run, the names of its exempt tensors. Goes out: forms, and the
segments of a snapshot with a mask of the averages that average them; what an average does not average, it copies.
"""

from __future__ import annotations

from collections.abc import Sequence

from ema_proto.averages import AverageSpec, Raw
from ema_proto.manifest import Manifest, Role, TensorSpec
from ema_proto.patterns import is_chosen
from ema_server.layout import Form, Segment, is_averaged, segments


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


def segments_for(manifest: Manifest, exempt: frozenset[str], rules: Sequence[AverageSpec]) -> tuple[Segment, ...]:
    """The segments of a snapshot for these averages, numbered as they are given."""

    def averaged_by(tensor: TensorSpec) -> int:
        if not is_averaged(tensor, exempt):
            return 0
        return sum(averages(rule, tensor) << number for number, rule in enumerate(rules))

    return segments(manifest, averaged_by)
