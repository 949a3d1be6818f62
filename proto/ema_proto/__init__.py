"""The contract between trainer, server and readers: sans-IO, standard library only. SPEC.md beside it is normative."""

from ema_proto.averages.specs import (
    AverageSpec,
    Ema,
    PowerEma,
    Raw,
    Uniform,
    Window,
    Wsd,
    parse_average,
    parse_averages,
)
from ema_proto.averages.step_units import StepUnits
from ema_proto.errors import LocalProtocolError, ProtocolError, RejectCode, RemoteProtocolError, Scope
from ema_proto.names import check_name
from ema_proto.receiver.machine import Receiver
from ema_proto.sender.machine import Sender
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout

__all__ = [
    "AverageSpec",
    "Ema",
    "LocalProtocolError",
    "Manifest",
    "StepUnits",
    "PowerEma",
    "ProtocolError",
    "Raw",
    "Receiver",
    "RejectCode",
    "RemoteProtocolError",
    "Role",
    "Scope",
    "Sender",
    "TensorSpec",
    "Uniform",
    "Window",
    "Wsd",
    "check_name",
    "layout",
    "parse_average",
    "parse_averages",
]
