"""The snapshot that was due last and found no slot. A run that ends can still send it, if nothing was written since.

Comes in: live tensors. Goes out: whether they are as they were. TransferQueue nothing and sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from trainer_client.counters import Skip
from trainer_client.model.sources import version_of


class Missed:
    """A snapshot that was not taken.

    Args:
        model: what it would have been of.
        step: as of which step.
        tensors: what it would have held, live.
        reason: as what it was counted.
    """

    def __init__(self, model: nn.Module, step: int, tensors: Sequence[Tensor], reason: Skip) -> None:
        self.model = model
        self.step = step
        self.reason = reason
        self._versions = [(tensor, version_of(tensor)) for tensor in tensors]

    def is_as_it_was(self) -> bool:
        """Whether nobody has written to a tensor; one who writes through `.data` is not seen."""
        return all(version_of(tensor) == version for tensor, version in self._versions)
