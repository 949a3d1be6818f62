"""Each rule equals the real library: the same weights for the same steps, and so the same tensors.

The profile (see `ParityModel`) shows the weights in float64; what a tensor of another dtype must be follows from it and
the recorded history, in float64. Against that, float32 is allowed what its rounding does:

- `LERP`: each update errs by at most one unit roundoff of the largest value, at random while the weights move, so after
  n updates by the square root of n of them (root mean square).
- `SCALED`: float32(d) + float32(1 - d) is not 1, which scales the average by that at each update; n such factors for
  n updates that still count are allowed on top, to the library. Ours is always held to LERP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from ema_proto.averages.specs import parse_average
from support.library_peers import Form, Peer
from support.oracle import EPS32
from support.parity_model import STEPS
from support.parity_table import PEERS
from support.scripts import script

from .conftest import Compared

_EPS64 = 2.0**-53
_each_peer = pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.label)


def _rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()


def _rounding(compared: Compared, name: str) -> float:
    return math.sqrt(STEPS) * EPS32 * compared.walk.values(name).abs().max().item()


def _scaling(peer: Peer) -> float:
    """The relative scaling of an average by `SCALED`, until its steady state or the last step."""
    if peer.form is Form.LERP:
        return 0.0
    kept, taken = torch.tensor(peer.decay).item(), torch.tensor(1 - peer.decay).item()
    return (kept + taken - 1) * (1 - peer.decay**STEPS) / (1 - peer.decay)


def _floats(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in state.items() if value.is_floating_point()]


@_each_peer
def test_step_weights_equal_the_librarys(compared: Compared, peer: Peer) -> None:
    """Both are averaged in float64; ours is published as float32.

    A decay that is known to a unit roundoff of float32 only makes a weight `1 - d` of at least 0.01 wrong by 100 of
    them, and the product of 1,000 of them by 1,000.
    """
    ours, theirs = compared.pair(peer)

    for name in {"profile", "wide"} & set(theirs):
        roundoffs = 1.0 + (peer.float32_decay and 100 + STEPS)
        bound = roundoffs * EPS32 * theirs[name].abs() + 4 * STEPS * _EPS64
        assert ((ours[name].double() - theirs[name]).abs() <= bound).all(), name
    assert abs(ours["profile"].double().sum().item() - 1) <= 2 * EPS32


@_each_peer
def test_every_tensor_equals_the_librarys(compared: Compared, peer: Peer) -> None:
    ours, theirs = compared.pair(peer)
    for name in set(_floats(theirs)) - set(peer.differs):
        largest = compared.walk.values(name).abs().max().item()
        bound = _rounding(compared, name) * 2 + abs(_scaling(peer)) * largest
        assert _rms(ours[name].double() - theirs[name].double()) <= bound, name


@_each_peer
def test_every_tensor_is_the_mean_of_its_weights(compared: Compared, peer: Peer) -> None:
    """Also where the library's is not. Copied ones are as they were at the last step that is in the average."""
    ours, theirs = compared.pair(peer)
    newest = compared.walk.history[int(theirs["profile"].nonzero().max())]
    buffers = {name for name, _ in compared.walk.model.named_buffers()}
    copies = "buffers=copy" in parse_average(peer.rule).spec
    for name in ours:
        if not newest[name].is_floating_point() or (copies and name in buffers):
            assert torch.equal(ours[name], newest[name]), name
        else:
            difference = ours[name].double() - compared.walk.exact(theirs["profile"], name)
            assert _rms(difference) <= _rounding(compared, name), name


@_each_peer
def test_documented_faults_of_libraries_exist(compared: Compared, peer: Peer) -> None:
    """Otherwise an exception from the comparison above would hide an error."""
    _, theirs = compared.pair(peer)
    for name in set(peer.differs) & set(theirs):
        if theirs[name].is_floating_point():
            expected = compared.walk.exact(theirs["profile"], name)
        else:
            expected = compared.walk.history[-1][name]
        assert _rms(theirs[name].double() - expected.double()) > 1000 * EPS32, name


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.form is Form.SCALED], ids=lambda peer: peer.label)
def test_decays_that_do_not_sum_to_1_scale_the_librarys_weights_and_not_ours(compared: Compared, peer: Peer) -> None:
    ours, theirs = compared.pair(peer)
    exact = compared.walk.exact(theirs["profile"], "conv.weight")

    def scale(found: Tensor) -> float:
        return ((found.double() - exact) * exact).sum().item() / exact.square().sum().item()

    assert scale(theirs["conv.weight"]) == pytest.approx(_scaling(peer), rel=0.5)
    assert abs(scale(ours["conv.weight"])) < abs(_scaling(peer)) / 4


_each_rule = pytest.mark.parametrize("rule", sorted({peer.rule for peer in PEERS}))


@_each_rule
def test_ledger_lists_the_weights_of_the_server(compared: Compared, rule: str) -> None:
    ledger = compared.ledgers[rule]
    listed = torch.zeros(STEPS + 2, dtype=torch.float64)
    for step, share in ledger.steps:
        listed[step] = share

    assert (compared.ours[rule]["profile"].double() - listed).abs().max() <= EPS32
    assert float(listed.sum()) + ledger.rest == pytest.approx(1.0, abs=1e-12)


@_each_rule
def test_plotted_weights_are_those_of_the_server(compared: Compared, rule: str) -> None:
    drawn = torch.from_numpy(script("plot_profiles").profile(parse_average(rule), STEPS))

    assert (compared.ours[rule]["profile"].double()[: STEPS + 1] - drawn).abs().max() <= EPS32
