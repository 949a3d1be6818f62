"""The trainer's side: streams a model's weights to an EMA server while it trains.

In the order of a snapshot's way, from an optimizer's step to the socket:

- `settings`: the constructor's arguments and the environment, validated
- `client`: `EmaClient`, the public API
- `session`: one connection and the run joined over it: its snapshots, and its end
- `companions`: files that go with every version, read and checked
- `ranks`: which process of a distributed training streams
- `steps`: which optimizer steps happened
- `stream`: the steps of a joined run: when a snapshot is taken, and why not
- `model`: which tensors a snapshot holds
- `staging`: copies tensors into slots, on the CPU or from a device while training goes on
- `connection`: the thread that sends snapshots, and its socket
- `transformers`: `EmaCallback` for Hugging Face's Trainer and those of TRL
- `lightning`: `EmaCallback` for Lightning's Trainer
- `pulling`: averages back into the trainer, over HTTP
- `timm`: `RemoteModelEma` in place of timm's averaged model
- `diffusers`: `RemoteEMAModel` in place of diffusers' `EMAModel`
- `remote_client`: the session behind those two
- `script`: runs a training script with an averaging class replaced
- `messages`: what is logged when a run is joined and when it ends
- `lifecycle`: whether a client may still be used
- `counters`: what `stats()` counts
- `errors`: what is raised, and when
"""

from __future__ import annotations

from ema_proto.averages.rules import Ema, PowerEma, Raw, Uniform, Window, Wsd
from trainer_client.client import EmaClient
from trainer_client.errors import (
    AverageError,
    ClientClosed,
    ConnectError,
    EmaClientError,
    JoinError,
    PlanError,
    RewindError,
    SettingsError,
)
from trainer_client.timm.remote import RemoteModelEma

__all__ = [
    "EmaClient",
    "RemoteModelEma",
    "Ema",
    "PowerEma",
    "Uniform",
    "Window",
    "Wsd",
    "Raw",
    "EmaClientError",
    "SettingsError",
    "ConnectError",
    "JoinError",
    "PlanError",
    "RewindError",
    "AverageError",
    "ClientClosed",
]
