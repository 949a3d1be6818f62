"""NaN and Inf are found in every position and attributed to their tensor; large finite values are accepted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ema_proto.wire.manifest import Role
from ema_server.tensors import finite
from ema_server.tensors.finite import FiniteCheck
from support.server_core import encode, manifest_of

_FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
_BAD = [math.nan, math.inf, -math.inf]


def _chunks(nbytes: int, chunk: int) -> list[tuple[int, int]]:
    return [(offset, min(chunk, nbytes - offset)) for offset in range(0, nbytes, chunk)]


def _found(check: FiniteCheck, slot: Tensor, chunk: int) -> set[str]:
    return {
        name
        for offset, length in _chunks(slot.numel(), chunk)
        for name in check.check(offset, slot[offset : offset + length])
    }


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("bad", _BAD)
@pytest.mark.parametrize("chunk", [8, 64, 1 << 20])
def test_one_bad_value_names_only_its_tensor(dtype: torch.dtype, bad: float, chunk: int) -> None:
    tensors = {
        "a": torch.randn(5).to(dtype),
        "b": torch.randn(7, 3).to(dtype),
        "n": torch.arange(3),
        "c": torch.randn(1).to(dtype),
    }
    manifest = manifest_of(tensors)
    check = FiniteCheck(manifest)
    for name in ("a", "b", "c"):
        for index in range(tensors[name].numel()):
            dirty = {key: value.clone() for key, value in tensors.items()}
            dirty[name].view(-1)[index] = bad
            assert _found(check, encode(manifest, dirty), chunk) == {name}

    assert _found(check, encode(manifest, tensors), chunk) == set()


@pytest.mark.parametrize("dtype", _FLOATS)
def test_largest_finite_values_pass_though_their_sum_overflows(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    tensors = {"up": torch.full((1000,), largest, dtype=dtype), "down": torch.full((1000,), -largest, dtype=dtype)}
    manifest = manifest_of(tensors)

    assert FiniteCheck(manifest).check(0, encode(manifest, tensors)) == ()


def test_infinities_of_opposite_sign_are_found() -> None:
    tensors = {"a": torch.tensor([math.inf, 1.0]), "b": torch.tensor([-math.inf, 1.0])}
    manifest = manifest_of(tensors)

    assert FiniteCheck(manifest).check(0, encode(manifest, tensors)) == ("a", "b")


def test_tensors_that_cannot_be_averaged_are_not_checked() -> None:
    tensors = {"u": torch.tensor([math.nan]), "mask": torch.tensor([-math.inf]), "w": torch.tensor([math.nan])}
    manifest = manifest_of(tensors, {"u": Role.STRUCTURAL, "mask": Role.BUFFER})
    check, slot = FiniteCheck(manifest), encode(manifest, tensors)

    assert set(check.check(0, slot)) == {"mask", "w"}
    assert check.exempt(["mask"]).check(0, slot) == ("w",)
    assert check.exempt(["mask"]).exempt(["w"]).check(0, slot) == ()
    assert set(check.check(0, slot)) == {"mask", "w"}, "the first check is unchanged"


def test_only_the_given_range_is_read() -> None:
    tensors = {"a": torch.tensor([1.0, 2.0, math.nan, 4.0])}
    manifest = manifest_of(tensors)
    check, slot = FiniteCheck(manifest), encode(manifest, tensors)

    assert check.check(0, slot[:8]) == ()
    assert check.check(8, slot[8:]) == ("a",)


def test_check_of_many_bad_tensors_looks_at_each_of_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at all tensors for each chunk: a trainer whose loss is NaN would occupy the thread for seconds."""
    tensors = {f"t{index}": torch.full((4,), math.nan) for index in range(1000)}
    manifest = manifest_of(tensors)
    check, slot = FiniteCheck(manifest), encode(manifest, tensors)
    looked: list[int] = []

    def is_finite(values: Tensor) -> bool:
        looked.append(len(values))
        return False

    monkeypatch.setattr(finite, "is_finite", is_finite)

    assert _found(check, slot, chunk=160) == set(tensors)
    assert len(looked) == 1000 + 100, "each tensor once, and each chunk"
