"""A compiled loop that writes updated averages elsewhere, and finds NaN and Inf as it reads the new elements.

The results are written past the cache. A plain store would first read the memory that it overwrites, and that would
cost as much as reading the snapshot once more to check it beforehand. numba makes no vectors of such stores, so
the loop is written in vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ema_server.compute.arithmetic import Moved
from ema_server.tensors.finite import is_finite

VECTOR_BYTES = 64  # a cache line; LLVM cuts it in pieces where the CPU has shorter vectors
_UNROLLED = 2  # vectors
GROUP_MAX = 4  # averages per loop, as in `compiled`

_INDEX = ir.IntType(32)
_WORDS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32, torch.float64: torch.uint64}


def lerp_into(source: torch.Tensor, averages: Sequence[Moved]) -> bool:
    """`new = old + weight * (source - old)` for each average, and whether every element of `source` is finite.

    Args:
        source: bfloat16, float32 or float64, 1-D, contiguous, no wider than the averages.
        averages: at least one; their weights are below 0.5. `old` and `new` do not overlap.
    """
    finite = True
    for first, group in _groups(averages):
        turn = _UNROLLED * VECTOR_BYTES // group[0][1].itemsize  # elements
        first = min(first, len(source))
        last = len(source) - (len(source) - first) % turn
        for begin, end in ((0, first), (last, len(source))):
            if begin < end:
                finite &= _by_torch(source[begin:end], _slices(group, begin, end))
        if first < last:
            finite &= _by_loop(source[first:last], _slices(group, first, last))
    return finite


def _groups(averages: Sequence[Moved]) -> Iterator[tuple[int, Sequence[Moved]]]:
    """Averages of one dtype, with the first of their elements that is aligned in all of them."""
    alike: dict[tuple[torch.dtype, int], list[Moved]] = {}
    for each in averages:
        new = each[1]
        alike.setdefault((new.dtype, -new.data_ptr() % VECTOR_BYTES // new.itemsize), []).append(each)
    for (_, first), group in alike.items():
        for begin in range(0, len(group), GROUP_MAX):
            yield first, group[begin : begin + GROUP_MAX]


def _slices(group: Sequence[Moved], begin: int, end: int) -> list[Moved]:
    return [(old[begin:end], new[begin:end], weight) for old, new, weight in group]


def _by_torch(source: torch.Tensor, group: Sequence[Moved]) -> bool:
    for old, new, weight in group:
        torch.lerp(old, source.to(old.dtype), weight, out=new)
    return is_finite(source)


def _by_loop(source: torch.Tensor, group: Sequence[Moved]) -> bool:
    words = source.view(_WORDS[source.dtype]).numpy()
    olds, news = tuple([old.numpy() for old, _, _ in group]), tuple([new.numpy() for _, new, _ in group])
    as_held = olds[0].dtype.type
    return bool(_loop(words, olds, news, tuple([as_held(weight) for _, _, weight in group])))


@dataclass(frozen=True, slots=True)
class _Vectors:
    """LLVM's vectors for words of `sent` bits, floats of `read` bits in them, and averages of `held` bits."""

    builder: ir.IRBuilder
    sent: int
    held: int

    @property
    def read(self) -> int:
        return max(self.sent, 32)

    @property
    def lanes(self) -> int:
        return VECTOR_BYTES * 8 // self.held

    def of(self, element: ir.Type) -> ir.VectorType:
        return ir.VectorType(element, self.lanes)

    def constant(self, value: int) -> ir.Constant:
        """`value` in the integers of `read` bits."""
        return ir.Constant(self.of(ir.IntType(self.read)), [value] * self.lanes)

    def at(self, data: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
        return self.builder.bitcast(self.builder.gep(data, [index]), self.of(element).as_pointer())

    def spread(self, value: ir.Value) -> ir.Value:
        """A vector with `value` in every lane."""
        result: ir.Value = ir.Constant(self.of(value.type), ir.Undefined)
        for lane in range(self.lanes):
            result = self.builder.insert_element(result, value, _INDEX(lane))
        return result

    def words(self, data: ir.Value, index: ir.Value) -> ir.Value:
        """The bits of floats. Those of bfloat16 are the upper half of a float32's."""
        sent = ir.IntType(self.sent)
        value = self.builder.load(self.at(data, index, sent), align=self.sent // 8)
        if self.sent == self.read:
            return value
        return self.builder.shl(self.builder.zext(value, self.of(ir.IntType(self.read))), self.constant(16))

    def floats(self, words: ir.Value) -> ir.Value:
        """The floats with these bits, as wide as the averages."""
        value = self.builder.bitcast(words, self.of(_float(self.read)))
        return self.builder.fpext(value, self.of(_float(self.held))) if self.held > self.read else value

    def lerp(self, old: ir.Value, new: ir.Value, index: ir.Value, weight: ir.Value, value: ir.Value) -> None:
        """Store `old + weight * (value - old)` in `new`, past the cache."""
        builder = self.builder
        before = builder.load(self.at(old, index, _float(self.held)), align=self.held // 8)
        after = builder.fadd(before, builder.fmul(weight, builder.fsub(value, before)))
        store = builder.store(after, self.at(new, index, _float(self.held)), align=VECTOR_BYTES)
        store.set_metadata("nontemporal", builder.module.add_metadata([_INDEX(1)]))

    def keep_largest(self, largest: ir.Value, words: ir.Value) -> None:
        """Raise the lanes in memory to the magnitudes of `words`: as integers, those of NaN and Inf are the largest."""
        magnitude = self.builder.and_(words, self.constant((1 << self.read - 1) - 1))
        known = self.builder.load(largest)
        is_larger = self.builder.icmp_unsigned(">", magnitude, known)
        self.builder.store(self.builder.select(is_larger, magnitude, known), largest)

    def all_finite(self, largest: ir.Value) -> ir.Value:
        infinity = self.constant(0x7FF0000000000000 if self.read == 64 else 0x7F800000)
        below = self.builder.icmp_unsigned("<", self.builder.load(largest), infinity)
        result: ir.Value = cgutils.true_bit
        for lane in range(self.lanes):
            result = self.builder.and_(result, self.builder.extract_element(below, _INDEX(lane)))
        return result


@intrinsic
def _lerp_vectors(_: Any, words: Any, olds: Any, news: Any, weights: Any) -> Any:
    """Whether all `words`, the bits of floats, are finite; writes the updated averages.

    The length is a multiple of the lanes of `_UNROLLED` vectors, and each of `news` is aligned. Another thread sees the
    results after any lock has been released: on x86 that completes such stores.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        def array(kind: Any, value: ir.Value) -> Any:
            return context.make_array(kind)(context, builder, value)

        def items(value: ir.Value, number: int) -> list[ir.Value]:
            return [builder.extract_value(value, index) for index in range(number)]

        vectors = _Vectors(builder, words.dtype.bitwidth, news.dtype.dtype.bitwidth)
        source = array(words, arguments[0])
        (count,) = items(source.shape, 1)
        old = [array(olds.dtype, each).data for each in items(arguments[1], len(olds))]
        new = [array(news.dtype, each).data for each in items(arguments[2], len(news))]
        weight = [vectors.spread(each) for each in items(arguments[3], len(news))]
        largest = cgutils.alloca_once_value(builder, vectors.constant(0))  # type: ignore[no-untyped-call]
        step = count.type(vectors.lanes * _UNROLLED)
        with cgutils.for_range_slice(builder, count.type(0), count, step) as (begin, _):
            for part in range(_UNROLLED):
                index = builder.add(begin, count.type(vectors.lanes * part))
                read = vectors.words(source.data, index)
                vectors.keep_largest(largest, read)
                value = vectors.floats(read)
                for k in range(len(news)):
                    vectors.lerp(old[k], new[k], index, weight[k], value)
        return vectors.all_finite(largest)

    return types.boolean(words, olds, news, weights), generate


def _float(bits: int) -> ir.Type:
    return ir.DoubleType() if bits == 64 else ir.FloatType()


def _loop_over(words: Any, olds: Any, news: Any, weights: Any) -> Any:
    return _vectorized(words, olds, news, weights)


_vectorized: Callable[..., Any] = _lerp_vectors

# `contract` as in `compiled`.
_loop = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})(_loop_over)
