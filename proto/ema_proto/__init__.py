"""The contract between trainer, server and readers: sans-IO, standard library only. SPEC.md beside it is normative."""

from ema_proto.errors import LocalProtocolError, ProtocolError, RejectCode, RemoteProtocolError, Scope
from ema_proto.manifest import Manifest, Role, TensorSpec, layout
from ema_proto.names import check_name
from ema_proto.pace import Pace
from ema_proto.receiver import Receiver
from ema_proto.sender import Sender
from ema_proto.specs import AverageSpec, Ema, PowerEma, Raw, Uniform, Window, Wsd, parse_average, parse_averages

__all__ = [
    "AverageSpec",
    "Ema",
    "LocalProtocolError",
    "Manifest",
    "Pace",
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
