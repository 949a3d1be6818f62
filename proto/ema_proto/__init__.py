"""The wire protocol between trainer and server, sans-IO, with the standard library alone. SPEC.md is normative.

- `averages`: averaging rules as values and as strings
- `wire`: messages, manifests and their bytes
- `sender`: the trainer's end as a state machine
- `receiver`: the server's end as a state machine
- `limits`: the version and all bounds, with their reasons
- `errors`: exceptions and reject codes
- `names`: names of runs, averages and companion files, patterns of tensor names
- `dtypes`: the dtypes on the wire
- `auth`: proof of a shared token
- `variables`: misspelt environment variables
"""

from ema_proto.averages.rules import AverageSpec, Ema, PowerEma, Raw, Uniform, Window, Wsd
from ema_proto.averages.specs import parse_average, parse_averages
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
