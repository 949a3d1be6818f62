"""The trainer's own record of its weights, for comparison with the server: one row of float32 for each step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ROWS = "rows.f32"
_COLUMNS = "columns.json"

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Column:
    """Where a tensor is in each row: `[start, stop)`. Integers (batch counters) are exact up to 2**24."""

    name: str
    start: int
    stop: int
    is_float: bool


class RecordWriter:
    """Appends rows to a new record in the folder `folder`. A context manager.

    Raises:
        OSError: the folder exists, or the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._rows = (folder / _ROWS).open("wb")
        self._described = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._rows.close()

    def append(self, state: Mapping[str, Tensor]) -> None:
        """Write all tensors of `state` as the next step's row."""
        if not self._described:
            self._describe(state)
        row = torch.cat([tensor.detach().reshape(-1).to(torch.float32) for tensor in state.values()])
        self._rows.write(row.numpy().data)

    def _describe(self, state: Mapping[str, Tensor]) -> None:
        columns, start = [], 0
        for name, tensor in state.items():
            stop = start + tensor.numel()
            columns.append([name, start, stop, tensor.is_floating_point()])
            start = stop
        (self._folder / _COLUMNS).write_text(json.dumps(columns))
        self._described = True


def read(folder: Path) -> tuple[tuple[Column, ...], Rows]:
    """Map a record into memory: its columns, and its rows `[steps, values]`; row 0 is step 1.

    Raises:
        OSError: there is no record.
    """
    columns = tuple(Column(*fields) for fields in json.loads((folder / _COLUMNS).read_text()))
    rows = np.memmap(folder / _ROWS, dtype=np.float32, mode="r").reshape(-1, columns[-1].stop)
    return columns, rows
