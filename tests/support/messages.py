"""One message of each type, and its main variants."""

from __future__ import annotations

from ema_proto.averages.rules import Ema, Raw
from ema_proto.errors import RejectCode
from ema_proto.wire import messages as m
from ema_proto.wire.boxes import Box
from ema_proto.wire.files import FileSpec
from ema_proto.wire.manifest import Role, TensorSpec, layout

SESSION = bytes(range(1, 17))
EPOCH = 0x1122334455667788
PAYLOAD = b"weights."

MANIFEST = layout(
    [
        TensorSpec("embed.weight", "F32", (3, 2), Role.PARAM, 0, aliases=("head.weight",)),
        TensorSpec("norm.count", "I64", (), Role.BUFFER, 0),
        TensorSpec("norm.weight", "BF16", (2,), Role.FROZEN, 0),
    ]
)

SHARD = layout([TensorSpec("weight", "F32", (5, 2), Role.PARAM, 0, box=Box((3, 0), (2, 2)))])

EXAMPLES: dict[str, m.Message] = {
    "hello": m.Hello(),
    "hello with proof": m.Hello(proof="0" * 64),
    "join": m.Join(run="resnet34", first_step=1, manifest=MANIFEST, averages=(Ema(0.9999), Raw())),
    "join with everything": m.Join(
        run="resnet34",
        first_step=1001,
        manifest=MANIFEST,
        averages=(Ema(0.9, name="fast"),),
        every=10,
        resume="must",
        reconnect=True,
        incarnation=3,
        checksum=True,
        config='{"hidden": 64, "name": "größe"}\n',
        samples_per_step=256,
        steps_per_epoch=5004.5,
    ),
    "join as one rank of several": m.Join(
        run="resnet34", first_step=1, manifest=SHARD, averages=(Raw(),), rank=1, world=2, gang="job 17"
    ),
    "begin": m.Begin(1001, 1),
    "begin of a set": m.Begin(1001, 2, "set"),
    "chunk": m.Chunk(1001, 1, 4 << 20, len(PAYLOAD)),
    "chunk with checksum": m.Chunk(1001, 1, (1 << 40) + 8, len(PAYLOAD), 0x6B7EE9F7),
    "commit": m.Commit(1001, 1, 24, 100_000_000),
    "heartbeat": m.Heartbeat(),
    "heartbeat that asks": m.Heartbeat(reply=True),
    "publish": m.Publish(1),
    "publish and pin": m.Publish(2, pin=True),
    "rewind": m.Rewind(3, 900),
    "finish": m.Finish(4),
    "bye": m.Bye(),
    "skip": m.Skip(1002, "no slot is free"),
    "challenge": m.Challenge("ab" * 32),
    "welcome": m.Welcome(EPOCH, 4 << 20),
    "joined anew": m.Joined(None, None, (), "new", 8),
    "joined and continued": m.Joined(1000, 900, (998, 999, 1000), "continued", 8),
    "joined as one rank of several": m.Joined(None, None, (), "new", 4, send=((0, 1), (3, 3))),
    "joined as one rank of many": m.Joined(None, None, (), "new", 2, send=((0, 1),), chunk_bytes=65_536),
    "credit": m.Credit(16),
    "committed": m.Committed(1001, 1),
    "published": m.Published(1000),
    "published on request": m.Published(1001, 1),
    "publication failed": m.Published(900, 2, "No space left on device: free some, the server tries again"),
    "rewound": m.Rewound(3, 900),
    "not rewound": m.Rewound(3, None, "no generation at or before step 5"),
    "finished": m.Finished(4, 1001),
    "reject": m.Reject(RejectCode.STALE_EPOCH, "the server has restarted since: say HELLO again"),
    "reject of a snapshot": m.Reject(RejectCode.NOT_FINITE, "tensor 'norm.weight' is not finite", 1001, 1),
    "hello of a trainer with files": m.Hello(capabilities=("crc32", "files")),
    "welcome of a trainer with files": m.Welcome(EPOCH, 4 << 20, ("crc32", "files")),
    "join with files": m.Join(
        run="llama-lora",
        first_step=1,
        manifest=MANIFEST,
        averages=(Raw(),),
        files=(
            FileSpec("tokenizer.json", 35_000_000, "ab" * 32),
            FileSpec("additional_chat_templates/tool_use.jinja", 900, "cd" * 32),
        ),
    ),
    "joined with missing files": m.Joined(None, None, (), "new", 8, missing_files=("ab" * 32,)),
    "file": m.File(0, 4 << 20, len(PAYLOAD)),
    "file with checksum": m.File(1, 0, len(PAYLOAD), 0x6B7EE9F7),
    "hello of a trainer with shared slots": m.Hello(capabilities=("crc32", "shm")),
    "welcome that takes shared slots": m.Welcome(EPOCH, 4 << 20, ("crc32", "shm"), "/run/ema/0123456789abcdef.sock"),
    "joined with shared slots": m.Joined(None, None, (), "new", 8, lane="shm"),
    "begin in a shared slot": m.Begin(1001, 1, slot=1),
    "commit in a shared slot": m.Commit(1001, 1, 0, 100_000_000),
}

CONTROL: dict[str, m.ControlMessage] = {
    name: message for name, message in EXAMPLES.items() if not isinstance(message, m.Chunk | m.File)
}
