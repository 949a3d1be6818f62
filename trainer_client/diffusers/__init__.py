"""diffusers' `EMAModel`, with the average kept by a server instead of the trainer.

- `remote`: `RemoteEMAModel`, with the interface of diffusers' `EMAModel`
- `schedule`: the parameters of its decay, as attributes of a checkpoint and as an averaging rule
- `naming`: the module, with names, that a list of parameters belongs to
- `run`: runs a training script with `EMAModel` replaced
"""

from __future__ import annotations

from trainer_client.diffusers.remote import RemoteEMAModel

__all__ = ["RemoteEMAModel"]
