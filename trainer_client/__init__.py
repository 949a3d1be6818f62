"""The trainer's side: streams a model's weights to an EMA server while it trains.

The way of a snapshot, file by file: `hooks` (a step has ended) → `client` → `stream` → `plan` (which tensors) →
`stagers` (into a slot, by `staging` or `overlap`) → `transport` → `worker` (its thread) → `link` (the socket).
"""

from __future__ import annotations

from ema_proto.averages.specs import Ema, PowerEma, Raw, Uniform, Window, Wsd
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
