"""The weight of a snapshot is one minus the decay to the power of the steps since the last one, in float64."""

from __future__ import annotations

import pytest

from ema_proto.specs import Ema, Raw
from ema_server.layout import Form
from ema_server.rules import form_of, weight_of


@pytest.mark.parametrize(
    ("decay", "delta", "weight"),
    [
        (0.9, 1, 0.1),
        (0.9, 2, 0.19),
        (0.9999, 10, 1 - 0.99900045),
        (0.9999, 100, 1 - 0.99004934),
        (0.5, 60, 1.0),
        (0.0, 1, 1.0),
    ],
)
def test_known_weights(decay: float, delta: int, weight: float) -> None:
    assert weight_of(Ema(decay), delta) == pytest.approx(weight, abs=5e-9)


def test_k_steps_at_once_weigh_as_much_as_k_single_ones() -> None:
    """Updates by the same weights: what is left of the old average is the product of what each step leaves."""
    single = weight_of(Ema(0.999), 1)
    many = weight_of(Ema(0.999), 250)

    assert single is not None
    assert many is not None
    assert 1 - many == pytest.approx((1 - single) ** 250, rel=1e-12)


def test_a_huge_gap_takes_the_new_weights() -> None:
    assert weight_of(Ema(0.9999), 10**9) == 1.0


def test_raw_has_no_weight_and_keeps_the_wires_bytes() -> None:
    assert weight_of(Raw(), 7) is None
    assert form_of(Raw()) is Form.WIRE
    assert form_of(Ema(0.9)) is Form.WIDE


@pytest.mark.parametrize("delta", [0, -3])
def test_an_update_follows_an_earlier_step(delta: int) -> None:
    with pytest.raises(ValueError, match=f"{delta} steps"):
        weight_of(Ema(0.9), delta)
