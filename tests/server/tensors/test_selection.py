"""Which tensors an average averages, and in which form it is held."""

from __future__ import annotations

import pytest

from ema_proto.averages.rules import AverageSpec, Ema, Raw
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout
from ema_server.tensors.layout import Form, Segment
from ema_server.tensors.selection import averaged_names, form_of, segments_for

_WEIGHT = TensorSpec("body.weight", "F32", (4,), Role.PARAM, 0)
_STATISTIC = TensorSpec("norm.running_mean", "F32", (4,), Role.BUFFER, 0)


def _segments(manifest: Manifest, *rules: AverageSpec, exempt: frozenset[str] = frozenset()) -> tuple[Segment, ...]:
    return segments_for(manifest, exempt, [averaged_names(manifest, rule) for rule in rules])


@pytest.mark.parametrize(
    ("rule", "tensor", "expected"),
    [
        (Ema(0.9), _WEIGHT, True),
        (Ema(0.9), _STATISTIC, True),
        (Ema(0.9, buffers="copy"), _WEIGHT, True),
        (Ema(0.9, buffers="copy"), _STATISTIC, False),
        (Raw(), _WEIGHT, False),
    ],
)
def test_rule_determines_which_tensors_it_averages(rule: AverageSpec, tensor: TensorSpec, expected: bool) -> None:
    assert averaged_names(layout([tensor]), rule) == ({tensor.name} if expected else set())


def test_raw_keeps_the_wire_bytes_and_the_others_are_wide() -> None:
    assert form_of(Raw()) is Form.WIRE
    assert form_of(Ema(0.9)) is Form.WIDE


def test_tensors_that_cannot_be_averaged_are_copied_by_all_averages() -> None:
    manifest = layout(
        [
            _WEIGHT,
            TensorSpec("spectral.u", "F32", (3,), Role.STRUCTURAL, 0),
            TensorSpec("mask", "F32", (3,), Role.BUFFER, 0),
            TensorSpec("count", "I64", (), Role.BUFFER, 0),
        ]
    )

    found = _segments(manifest, Ema(0.9), Raw(), exempt=frozenset({"mask"}))

    assert [(segment.dtype, segment.averaged, segment.count) for segment in found] == [
        ("I64", 0, 1),
        ("F32", 0b01, 4),
        ("F32", 0, 6),
    ]


def test_segments_stay_long_if_all_averages_agree() -> None:
    layers = [TensorSpec(f"layer{i}.{name}", "F32", (4,), role, 0) for i in range(9) for name, role in _ROLES.items()]

    assert len(_segments(layout(layers), Ema(0.9), Ema(0.99), Raw())) == 1
    assert len(_segments(layout(layers), Ema(0.9), Ema(0.99, buffers="copy"))) == 18


_ROLES = {"weight": Role.PARAM, "running_mean": Role.BUFFER}
