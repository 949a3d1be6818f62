"""All messages under one name, as the machines use them: `m.Join`, `m.Joined` and so on."""

from __future__ import annotations

from typing import TypeAlias

from ema_proto.wire.server_messages import (
    Challenge,
    Committed,
    Continuation,
    Credit,
    Finished,
    Joined,
    Published,
    Reject,
    Rewound,
    Welcome,
)
from ema_proto.wire.trainer_messages import (
    Begin,
    Bye,
    Chunk,
    Commit,
    Finish,
    Heartbeat,
    Hello,
    Join,
    Mode,
    Publish,
    Resume,
    Rewind,
)

# A chunk's body is its payload, which no machine touches; all others have a JSON body.
ControlMessage: TypeAlias = (
    Hello
    | Join
    | Begin
    | Commit
    | Heartbeat
    | Publish
    | Rewind
    | Finish
    | Bye
    | Challenge
    | Welcome
    | Joined
    | Credit
    | Committed
    | Published
    | Rewound
    | Finished
    | Reject
)
Message: TypeAlias = ControlMessage | Chunk

__all__ = [
    "Hello",
    "Join",
    "Begin",
    "Chunk",
    "Commit",
    "Heartbeat",
    "Publish",
    "Rewind",
    "Finish",
    "Bye",
    "Challenge",
    "Welcome",
    "Joined",
    "Credit",
    "Committed",
    "Published",
    "Rewound",
    "Finished",
    "Reject",
    "Mode",
    "Resume",
    "Continuation",
    "ControlMessage",
    "Message",
]
