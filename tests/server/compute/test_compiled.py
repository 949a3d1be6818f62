"""The compiled loops give the bits of torch, for every dtype, length, weight and number of averages."""

from __future__ import annotations

import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from ema_server.compute.arithmetic import BY_TORCH, ByTorch, Elements, Weighted
from support.arithmetics import WITHOUT_NUMBA

compiled = pytest.importorskip("ema_server.compute.compiled", reason=WITHOUT_NUMBA)

_PAIRS = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float64),
    (torch.float32, torch.float64),
    (torch.float64, torch.float64),
]
_WEIGHTS = (0.0, 1e-9, 2.0**-24, 0.001, 0.3, 0.4999, 0.5 - 1e-12, 0.5, 0.75, 1 - 2.0**-24, 1.0)
_SMALL = tuple(weight for weight in _WEIGHTS if weight < 0.49999)
_pairs = pytest.mark.parametrize(("wire", "held"), _PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def _values(seed: int, count: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal values times `scale`; what `dtype` has no value for is 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, dtype=torch.float64, generator=generator).mul(scale).to(dtype)
    return values.nan_to_num(0.0, 0.0, 0.0)


def _elements(source: Tensor) -> Elements:
    return Elements(source, {dtype: torch.empty(len(source), dtype=dtype) for dtype in (torch.float32, torch.float64)})


def _by_torch(source: Tensor, averages: list[Weighted]) -> list[Tensor]:
    expected = [(average.clone(), weight) for average, weight in averages]
    BY_TORCH.lerp(_elements(source), expected)
    return [average for average, _ in expected]


def _equal(averages: list[Weighted], expected: list[Tensor]) -> bool:
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}
    return all(
        torch.equal(average.view(bits[average.dtype]), other.view(bits[average.dtype]))
        for (average, _), other in zip(averages, expected, strict=True)
    )


@_pairs
@pytest.mark.parametrize("number", [1, 2, 3, compiled.GROUP_MAX, compiled.GROUP_MAX + 3])
def test_loops_give_the_bits_of_torch(wire: torch.dtype, held: torch.dtype, number: int) -> None:
    weights, loops = itertools.cycle(_WEIGHTS), compiled.ByLoops()
    for count in (1, 2, 7, 8, 15, 16, 31, 33, 63, 64, 65, 127, 1000, 4099):
        source = _values(count, count, wire)
        averages = [(_values(k, count, held), next(weights)) for k in range(number)]
        expected = _by_torch(source, averages)
        loops.lerp(_elements(source), averages)

        assert _equal(averages, expected), f"{count} elements"


@_pairs
@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-37, 1e30, 1e38])
def test_tiny_and_huge_values_give_the_bits_of_torch(wire: torch.dtype, held: torch.dtype, scale: float) -> None:
    """Subnormals are not flushed to zero, and what overflows does so where torch's does."""
    source = _values(1, 1000, wire, scale)
    averages = [(_values(2 + k, 1000, held, scale), weight) for k, weight in enumerate(_WEIGHTS)]
    expected = _by_torch(source, averages)
    compiled.ByLoops().lerp(_elements(source), averages)

    assert _equal(averages, expected)


@_pairs
@pytest.mark.parametrize("weight", [0.001, 0.3])
def test_loops_are_within_two_roundings_of_float64(wire: torch.dtype, held: torch.dtype, weight: float) -> None:
    """Independent of torch: one rounding of the difference, one of the result; all values are below 8."""
    source, average = _values(3, 5000, wire), _values(4, 5000, held)
    expected = average.double() + weight * (source.double() - average.double())
    compiled.ByLoops().lerp(_elements(source), [(average, weight)])

    torch.testing.assert_close(average.double(), expected, rtol=0, atol=2 * 16 * torch.finfo(held).eps)


@pytest.mark.parametrize("held", [torch.float32, torch.float64])
def test_every_bfloat16_value_is_widened_exactly(held: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    source = every[every.isfinite()]
    average = torch.zeros(len(source), dtype=held)
    compiled.ByLoops().lerp(_elements(source), [(average, 0.25)])

    assert torch.equal(average, source.to(held) * 0.25)


@_pairs
def test_constant_is_a_fixed_point_bit_for_bit(wire: torch.dtype, held: torch.dtype) -> None:
    source = _values(5, 1000, wire)
    averages = [(source.to(held), weight) for weight in _WEIGHTS]
    expected = [average.clone() for average, _ in averages]
    compiled.ByLoops().lerp(_elements(source), averages)

    assert _equal(averages, expected)


def test_one_call_takes_averages_of_both_dtypes() -> None:
    source = _values(6, 300, torch.float32)
    averages = [(_values(k, 300, torch.float64 if k % 2 else torch.float32), 0.01 * k) for k in range(7)]
    expected = _by_torch(source, averages)
    compiled.ByLoops().lerp(_elements(source), averages)

    assert _equal(averages, expected)


@_pairs
def test_small_weights_do_not_go_to_torch(
    monkeypatch: pytest.MonkeyPatch, wire: torch.dtype, held: torch.dtype
) -> None:
    """What the loops do not compute torch does, so equal bits alone do not show that they are used."""
    loops = compiled.ByLoops()
    monkeypatch.setattr(ByTorch, "lerp", lambda *_: pytest.fail("torch was called"))

    loops.lerp(_elements(_values(7, 100, wire)), [(_values(8, 100, held), weight) for weight in _SMALL])


def test_concurrent_compilation_computes_correctly() -> None:
    loops, source = compiled.ByLoops(), _values(7, 999, torch.bfloat16)
    averages = [[(_values(k + j, 999, torch.float64), 0.1) for j in range(3)] for k in range(8)]
    expected = [_by_torch(source, pairs) for pairs in averages]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pairs: loops.lerp(_elements(source), pairs), averages))

    assert all(_equal(pairs, other) for pairs, other in zip(averages, expected, strict=True))


def test_loops_release_the_interpreter_lock() -> None:
    """Thread switching is off, so another thread proceeds during a loop only if the loop releases the lock."""
    source, average, weight = torch.zeros(1 << 20).numpy(), torch.zeros(1 << 20).numpy(), np.float32(0.1)
    turns, seen, over = [0], [0], threading.Event()

    def looping() -> None:
        for _ in range(1000):
            before = turns[0]
            compiled._lerp_same(source, (average,), (weight,))
            seen[0] += turns[0] - before
            if seen[0]:
                break
        over.set()

    compiled.ByLoops()
    before, thread = sys.getswitchinterval(), threading.Thread(target=looping)
    sys.setswitchinterval(100.0)
    try:
        thread.start()
        while not over.wait(1e-4):
            turns[0] += 1
    finally:
        sys.setswitchinterval(before)
        thread.join(60)

    assert seen[0] > 0


def test_loops_with_wrong_results_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_lerp_same", lambda *_: None)

    with pytest.raises(RuntimeError, match=r"computes \[0.0, 0.0, 0.0\] where \[0.25, 0.5, 1.0\] is right"):
        compiled.ByLoops()


def _moved(source: Tensor, averages: list[Weighted], skipped: int = 0) -> tuple[bool, list[Tensor]]:
    """What `lerp_into` returns and writes, `skipped` elements into memory that is aligned to a cache line."""
    room = [torch.empty(len(source) + 64, dtype=average.dtype) for average, _ in averages]
    starts = [skipped + -memory.data_ptr() % 64 // memory.itemsize for memory in room]
    news = [memory[start : start + len(source)] for memory, start in zip(room, starts, strict=True)]
    moves = [(old, new, weight) for (old, weight), new in zip(averages, news, strict=True)]
    return compiled.ByLoops().lerp_into(_elements(source), moves), news


@_pairs
@pytest.mark.parametrize("number", [1, 2, compiled.GROUP_MAX + 1])
def test_loops_that_check_give_the_same_bits_elsewhere(wire: torch.dtype, held: torch.dtype, number: int) -> None:
    weights = itertools.cycle(_WEIGHTS)
    for skipped, count in itertools.product((0, 1, 3, 7), (1, 15, 16, 31, 32, 33, 65, 1000)):
        source = _values(count, count, wire)
        averages = [(_values(k, count, held), next(weights)) for k in range(number)]
        before = [average.clone() for average, _ in averages]
        finite, news = _moved(source, averages, skipped)

        assert finite
        assert all(torch.equal(average, other) for (average, _), other in zip(averages, before, strict=True))
        compiled.ByLoops().lerp(_elements(source), averages)
        assert _equal(averages, news), f"{count} elements, {skipped} elements past a cache line"


@_pairs
def test_loops_that_check_find_nan_and_inf_everywhere(wire: torch.dtype, held: torch.dtype) -> None:
    count, largest = 83, torch.finfo(wire).max
    for weight, bad in itertools.product((0.1, 0.75), (float("nan"), float("inf"), -float("inf"))):
        for index in range(count):
            source = torch.full((count,), largest, dtype=wire)
            source[index] = bad
            assert not _moved(source, [(torch.zeros(count, dtype=held), weight)])[0], (index, bad)
    assert _moved(torch.full((count,), largest, dtype=wire), [(torch.zeros(count, dtype=held), 0.1)])[0]
    assert _moved(torch.full((count,), -largest, dtype=wire), [(torch.zeros(count, dtype=held), 0.1)])[0]


def test_checks_are_made_beforehand_where_the_loop_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bool:
        raise RuntimeError("LLVM ERROR: no such instruction")

    loops = compiled.ByLoops()
    monkeypatch.setattr(compiled, "lerp_into", broken)

    assert not loops.can_move
