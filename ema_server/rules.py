"""What each averaging rule asks of the kernel. Pure arithmetic in float64; no tensor, no clock.

Comes in: the rule (`ema_proto.specs`) and the steps since the last update. Goes out: the weight of the new snapshot.
"""

from __future__ import annotations

from ema_proto.specs import AverageSpec, Raw
from ema_server.layout import Form


def form_of(rule: AverageSpec) -> Form:
    """How an average of this rule is held: `raw` keeps the wire's bytes, the others are wide."""
    return Form.WIRE if isinstance(rule, Raw) else Form.WIDE


def weight_of(rule: AverageSpec, delta: int) -> float | None:
    """Share of the new snapshot in the updated average, in float64; None where the snapshot replaces it.

    The steps between count as if they had had the new weights: `average = d**delta * average + (1 - d**delta) * new`
    is what `delta` updates by the same weights give, exactly.

    Args:
        rule: the averaging rule.
        delta: steps of the trainer since the last update, at least 1.

    Raises:
        ValueError: `delta` is below 1.
    """
    if delta < 1:
        raise ValueError(f"{delta} steps since the last update: an update follows an earlier step")
    return None if isinstance(rule, Raw) else float(1.0 - rule.decay**delta)
