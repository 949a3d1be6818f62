"""The synchronous copy of a snapshot into its slot: done when the call returns."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, Self, TypeAlias

import torch
from torch import Tensor, nn

from ema_proto.dtypes import ITEM_BYTES
from ema_proto.wire.manifest import Manifest, TensorSpec
from trainer_client.model.dtypes import TORCH_DTYPES
from trainer_client.model.shards import locals_of
from trainer_client.staging.slots import Slot

# From this size on, a tensor has a `memcpy` of its own. Below it torch copies with one thread too, whatever the dtype.
LARGE_BYTES: Final = 32 << 10
_STACKED_ELEMENTS: Final = 32767  # up to this number torch stacks with one thread, and in one loop
_STACKED_MIN: Final = 4  # tensors; for fewer the call costs more than it saves

Check: TypeAlias = Callable[[Sequence[Tensor], Sequence[int]], None]

_PLAIN: Final = frozenset({Tensor, nn.Parameter})  # subclasses may have no memory, or other memory than their values


class CpuStager:
    """One synchronous copy, by the calling thread alone; tensors on any device, with any strides, arrive row-major.

    Nothing can tear such a snapshot, because the training thread does nothing else meanwhile. On devices other than the
    CPU it is correct and waits for the device.

    Large row-major tensors are copied by libc's `memcpy`: without Python's lock, without the OpenMP threads that torch
    would start and that spin afterwards, and with the stores that libc chooses for the size. Runs of small tensors of
    one dtype and shape are stacked into the slot, one call for a run. All others are copied by one `_foreach_copy_`.

    Only places in the slot are kept between snapshots. Addresses of the model's tensors are read at each copy, because
    `p.data = x`, `resize_` and `load_state_dict(assign=True)` move them.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._layout = _Layout.of(manifest)
        self._targets: dict[int, _Targets] = {}

    def are_on_cpu(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all tensors are on the CPU, judged by the first one of each run."""
        return all(tensors[index].is_cpu for index in self._layout.checked)

    def stage(self, tensors: Sequence[Tensor], slot: Slot, check: Check = lambda tensors, indices: None) -> None:
        """Copy `tensors` (in the manifest's order) into `slot`.

        Args:
            tensors: what is copied.
            slot: where to.
            check: raises if those with these indices have not the manifest's dtypes and shapes.
        """
        check(tensors, self._layout.checked)
        targets = self._targets_in(slot)
        # In this mode torch does least for each tensor. The slot's own tensor was made outside it.
        with torch.inference_mode():
            sources = locals_of(tensors)
            others = self._copy_large(sources, slot)
            for (start, stop), target in zip(self._layout.runs, targets.runs, strict=True):
                run = list(sources[start:stop])
                if not _stack(run, target):
                    check(tensors, range(start, stop))
                    others += range(start, stop)
            places = targets.single + [targets.of(index) for index in others]
            if places:
                torch._foreach_copy_(places, [sources[index] for index in (*self._layout.single, *others)])

    def _copy_large(self, sources: Sequence[Tensor], slot: Slot) -> list[int]:
        """Copy the large tensors that lie row-major in memory; the indices of the others."""
        others = []
        base = slot.tensor.data_ptr()
        for index, offset, nbytes in self._layout.large:
            address = _address(sources[index], nbytes)
            if address is None:
                others.append(index)
            else:
                _memcpy(base + offset, address, nbytes)
        return others

    def _targets_in(self, slot: Slot) -> _Targets:
        if slot.index not in self._targets:
            self._targets[slot.index] = _Targets(self._manifest, self._layout, slot)
        return self._targets[slot.index]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which way each tensor takes, by indices into the manifest's tensors; empty ones take none.

    Attributes:
        large: index, offset in the slot and size in bytes.
        runs: first index, and the one after the last.
        single: all others.
        checked: all but the rest of each run, which `stack` compares with its first.
    """

    large: tuple[tuple[int, int, int], ...]
    runs: tuple[tuple[int, int], ...]
    single: tuple[int, ...]
    checked: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        large, runs, single, empty = [], list[tuple[int, int]](), list[int](), list[int]()
        for start, stop in _alike(manifest.tensors):
            first = manifest.tensors[start]
            if not first.nbytes:
                empty += range(start, stop)
            elif first.nbytes >= LARGE_BYTES:
                large += [(index, manifest.tensors[index].offset, first.nbytes) for index in range(start, stop)]
            elif stop - start >= _STACKED_MIN:
                length = _STACKED_ELEMENTS // first.elements
                runs += [(begin, min(begin + length, stop)) for begin in range(start, stop, length)]
            else:
                single += range(start, stop)
        checked = (*(index for index, _, _ in large), *single, *empty, *(start for start, _ in runs))
        return cls(tuple(large), tuple(runs), tuple(single), checked)


class _Targets:
    """Views of a slot: one for each run, for each single tensor, and for any other that was asked for."""

    def __init__(self, manifest: Manifest, layout: _Layout, slot: Slot) -> None:
        self._manifest = manifest
        self._slot = slot
        self._views: dict[int, Tensor] = {}
        firsts = [manifest.tensors[start] for start, _ in layout.runs]
        self.runs = [
            _view(slot.tensor, spec.dtype, (stop - start, *spec.held_shape), spec.offset)
            for spec, (start, stop) in zip(firsts, layout.runs, strict=True)
        ]
        self.single = [self.of(index) for index in layout.single]

    def of(self, index: int) -> Tensor:
        if index not in self._views:
            spec = self._manifest.tensors[index]
            self._views[index] = _view(self._slot.tensor, spec.dtype, spec.held_shape, spec.offset)
        return self._views[index]


def slot_views(memory: Tensor, wanted: Iterable[tuple[TensorSpec, int]]) -> list[Tensor]:
    """Row-major views of `memory` (uint8, 1-D): for each spec, the tensor whose first byte is at the given offset."""
    return [_view(memory, spec.dtype, spec.held_shape, start) for spec, start in wanted]


def _view(memory: Tensor, dtype: str, shape: tuple[int, ...], start: int) -> Tensor:
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    with torch.inference_mode(False):  # views made in inference mode could not be written outside it
        return memory[start : start + nbytes].view(TORCH_DTYPES[dtype]).view(shape)


def _alike(specs: Sequence[TensorSpec]) -> Iterator[tuple[int, int]]:
    """Ranges of tensors of one dtype and shape that are neighbours in the slot, as long as possible."""
    start = 0
    for stop in range(1, len(specs) + 1):
        first = specs[start]
        if stop < len(specs):
            last, following = specs[stop - 1], specs[stop]
            same = (first.dtype, first.held_shape) == (following.dtype, following.held_shape)
            if same and following.offset == last.end:
                continue
        yield start, stop
        start = stop


def _address(tensor: Tensor, nbytes: int) -> int | None:
    """Where the tensor's bytes are, row-major in the memory of this process; None if they are not.

    Raises:
        RuntimeError: its memory was freed (`untyped_storage().resize_(0)`), or is not of this size.
    """
    if type(tensor) not in _PLAIN or not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_neg():
        return None
    address = tensor.data_ptr()
    if not address or tensor.nbytes != nbytes:  # torch would end the process here
        raise RuntimeError(f"a tensor of {nbytes} bytes has {tensor.nbytes if address else 0} in memory")
    return address


def _stack(run: list[Tensor], target: Tensor) -> bool:
    """Stack tensors into `target`; False if one has another shape, dtype or device."""
    if run[0].shape != target.shape[1:] or set(map(_dtype_of, run)) != {target.dtype}:
        return False  # torch would resize the target, or convert the tensors
    try:
        torch.stack(run, out=target)
    except RuntimeError:
        return False
    return True


def _libc_memcpy() -> Callable[[int, int, int], object]:
    # By ctypes it runs without Python's lock.
    function = ctypes.CDLL(None).memcpy
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_void_p
    copy: Callable[[int, int, int], object] = function
    return copy


_memcpy: Final = _libc_memcpy()
_dtype_of: Final[Callable[[Tensor], torch.dtype]] = attrgetter("dtype")
