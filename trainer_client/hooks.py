"""Being called after every real optimizer step.

Comes in: optimizers and a function. Goes out: calls of that function, until removed. Knows no model and no snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from trainer_client.errors import SettingsError


class Attachment:
    """Calls `after_step` after each step of the first optimizer, until `remove()`; of no optimizer, never.

    A step that a gradient scaler skips never reaches the optimizer, so it is not counted.
    """

    def __init__(self, optimizers: tuple[Optimizer, ...], after_step: Callable[[], None]) -> None:
        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
            if torch.compiler.is_compiling():
                # A compiled optimizer step has its hooks traced; ours would be compiled anew at every step.
                torch.compiler.disable(after_step)()
            else:
                after_step()

        self._handles = [optimizer.register_step_post_hook(hook) for optimizer in optimizers[:1]]

    @property
    def attached(self) -> bool:
        """Whether steps still arrive."""
        return bool(self._handles)

    def remove(self) -> None:
        """Stop; calling it again changes nothing."""
        while self._handles:
            self._handles.pop().remove()


def check_optimizers(given: object) -> tuple[Optimizer, ...]:
    """The optimizers as a tuple; the first one's steps are the run's.

    Raises:
        SettingsError: there is none, or one of them is no torch optimizer.
    """
    candidates = tuple(given) if isinstance(given, Iterable) else (given,)
    if not candidates:
        raise SettingsError("attach() got an empty list of optimizers: pass the one that steps")
    optimizers: list[Optimizer] = []
    for optimizer in candidates:
        if not isinstance(optimizer, Optimizer):
            raise SettingsError(
                f"{type(optimizer).__name__} is not a torch.optim.Optimizer: "
                "pass the optimizer inside it, or call update(model, step) after each step"
            )
        optimizers.append(optimizer)
    return tuple(optimizers)
