"""Messages to frames and back; whatever a stranger sends is a message or one named error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ema_proto import messages as m
from ema_proto.bodies import decode_body
from ema_proto.codec import (
    CONTROL_MESSAGES,
    Header,
    decode,
    decode_chunk,
    decode_frames,
    decode_header,
    encode,
    encode_header,
    with_crc32,
)
from ema_proto.errors import SCOPES, LocalProtocolError, RejectCode, RemoteProtocolError, Scope
from ema_proto.limits import CHUNK_BYTES_MAX, CONTROL_BODY_BYTES_MAX, STEP_MAX, TEXT_CHARS_MAX
from ema_proto.manifest import Role, TensorSpec, layout
from ema_proto.specs import Raw
from support.messages import EPOCH, EXAMPLES, SESSION
from support.peers import Peer, joined_peer, new_receiver, sender_in

CONTROL = {name: message for name, message in EXAMPLES.items() if not isinstance(message, m.Chunk)}


def code_of(header: bytes, body: bytes) -> RejectCode:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_frames((header, body))
    return caught.value.code


@pytest.mark.parametrize("name", CONTROL)
def test_a_message_truncated_anywhere_is_refused_as_a_frame(name: str) -> None:
    header, body = encode(CONTROL[name], session=SESSION, epoch=EPOCH)

    for cut in range(len(header)):
        assert code_of(header[:cut], body) is RejectCode.BAD_FRAME
    for cut in range(len(body)):
        assert code_of(header, body[:cut]) is RejectCode.BAD_FRAME
    assert code_of(header + b"\0", body) is RejectCode.BAD_FRAME
    assert code_of(header, body + b" ") is RejectCode.BAD_FRAME


@pytest.mark.parametrize("frames", [(), (b"",), (b"", b"", b"")])
def test_a_message_has_two_frames(frames: tuple[bytes, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match=f"has {len(frames)} frames"):
        decode_frames(frames)


@pytest.mark.parametrize("name", CONTROL)
def test_keys_that_a_later_minor_adds_are_ignored(name: str) -> None:
    message = CONTROL[name]
    header, body = encode(message, session=SESSION, epoch=EPOCH)
    longer = json.dumps(json.loads(body) | {"later": [1, {"deep": None}]}).encode()
    read = decode_header(header)

    assert decode(Header(read.type, SESSION, EPOCH, len(longer), read.step, read.attempt), longer) == message


def mangle(message: m.ControlMessage, key: str, value: object) -> RejectCode | None:
    body = json.dumps(message.body() | {key: value}).encode()
    header = Header(message.type, SESSION, EPOCH, len(body), getattr(message, "step", 0) or 0)
    try:
        decode(header, body)
    except RemoteProtocolError as error:
        return error.code
    return None


@pytest.mark.parametrize("value", [True, -1, 1.0, "1", [], {}, 1 << 200, [[[1]]], ""], ids=repr)
def test_a_body_with_any_value_of_another_type_is_refused_by_a_named_code_or_read(value: object) -> None:
    for message in CONTROL.values():
        assert not isinstance(message, m.Chunk)
        for key in message.body():
            code = mangle(message, key, value)
            assert code in (None, RejectCode.BAD_MESSAGE, RejectCode.MANIFEST_INVALID, RejectCode.BAD_AVERAGE)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("hello", "majors", [256]),
        ("hello", "majors", [True]),
        ("hello", "majors", list(range(17))),
        ("hello", "capabilities", ["x" * 65]),
        ("hello", "capabilities", [["crc32"]]),
        ("hello", "proof", "0" * 129),
        ("join", "first_step", 0),
        ("join", "first_step", STEP_MAX + 1),
        ("join", "every", 0),
        ("join", "resume", "maybe"),
        ("join", "reconnect", 1),
        ("join", "incarnation", 1 << 63),
        ("join", "checksum", "md5"),
        ("join", "config", "[]"),
        ("join", "config", "{"),
        ("join", "config", "[" * 100_000),
        ("join", "config", json.dumps({"text": "é" * 600_000}, ensure_ascii=False)),
        ("join", "world", 0),
        ("begin", "mode", "SET"),
        ("commit", "chunks", -1),
        ("welcome", "chunk_bytes", 65535),
        ("welcome", "chunk_bytes", CHUNK_BYTES_MAX + 1),
        ("joined anew", "recent", [-1]),
        ("joined anew", "recent", list(range(9))),
        ("joined anew", "continuation", "old"),
        ("credit", "limit", 1 << 64),
        ("published", "error", "x" * (TEXT_CHARS_MAX + 1)),
        ("reject", "code", "teapot"),
        ("reject", "text", None),
    ],
)
def test_a_value_out_of_bounds_is_a_bad_message_that_names_the_key(name: str, key: str, value: object) -> None:
    message = CONTROL[name]
    assert not isinstance(message, m.Chunk)
    body = json.dumps(message.body() | {key: value}).encode()

    with pytest.raises(RemoteProtocolError, match=f"field '{key}'") as caught:
        decode(Header(message.type, SESSION, EPOCH, len(body)), body)
    assert caught.value.code is RejectCode.BAD_MESSAGE


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"1",
        b"\xff\xfe",
        b'{"a":1,"a":2}',
        b'{"deep":{"a":1,"a":1}}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":"\\ud800"}',
        b'{"\\uDC00":1}',
        b'{"a":' + b"9" * 5000 + b"}",
        b"[" * 30_000,
        b'{"a":' * 10_000,
        b"{} {}",
    ],
    ids=range(14),
)
def test_what_json_leaves_open_is_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_body(body)

    assert caught.value.code is RejectCode.BAD_MESSAGE
    assert len(caught.value.text) < 200


def test_a_paired_surrogate_escape_is_a_character() -> None:
    assert decode_body(b'{"a":"\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}


def test_a_text_that_a_server_says_can_always_be_read() -> None:
    for text in ("x" * 100_000, "bad path \udcff", "\N{GRINNING FACE}" * 5000):
        for message in (m.Reject(RejectCode.UNAVAILABLE, text), m.Published(None, 1, text), m.Rewound(1, None, text)):
            frames = encode(message, session=SESSION, epoch=EPOCH)
            assert len(frames[1]) <= CONTROL_BODY_BYTES_MAX
            assert type(decode_frames(frames)[1]) is type(message)


def test_a_join_too_large_to_send_is_the_senders_own_fault() -> None:
    names = [f"{number:06d}{'x' * 1000}" for number in range(17_000)]
    manifest = layout([TensorSpec(name, "U8", (1,), Role.PARAM, 0) for name in names])
    join = m.Join(run="run", first_step=1, manifest=manifest, averages=(Raw(),))

    with pytest.raises(LocalProtocolError, match="JOIN has a body of"):
        encode(join, session=SESSION, epoch=EPOCH)
    sender = sender_in("greeted")
    sender.join(join)
    assert [getattr(event, "code", None) for event in sender.events][-1] is RejectCode.MANIFEST_INVALID


def test_a_foreign_major_is_told_by_its_number_but_hello_and_reject_are_read() -> None:
    for kind in CONTROL_MESSAGES:
        frame = encode_header(Header(kind, SESSION, EPOCH, 2, major=9))
        if kind in (m.Hello.type, m.Reject.type):
            assert decode_header(frame).major == 9
        else:
            with pytest.raises(RemoteProtocolError, match="version 9 is not spoken") as caught:
                decode_header(frame)
            assert caught.value.code is RejectCode.VERSION


@pytest.mark.parametrize("kind", [m.Chunk.type, m.Join.type, m.Begin.type, 255])
def test_a_header_cannot_announce_more_than_the_limit_of_its_type(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match="is over"):
        decode_header(encode_header(Header(kind, SESSION, EPOCH, (1 << 32) - 1)))


def test_an_unknown_type_and_a_step_beyond_the_limit_are_bad_messages() -> None:
    assert code_of(encode_header(Header(99, SESSION, EPOCH, 2)), b"{}") is RejectCode.BAD_MESSAGE
    begin = encode_header(Header(m.Begin.type, SESSION, EPOCH, 17, step=STEP_MAX + 1))
    assert code_of(begin, b'{"mode":"update"}') is RejectCode.BAD_MESSAGE


def test_unknown_flags_and_reserved_bytes_are_ignored() -> None:
    header = bytearray(encode(m.Bye(), session=SESSION, epoch=EPOCH)[0])
    header[7] |= 0xFE
    header[60:] = b"\xff" * 4

    assert decode_frames((bytes(header), b"{}"))[1] == m.Bye()


def test_an_empty_chunk_is_none() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_chunk(Header(m.Chunk.type, SESSION, EPOCH, 0))
    assert caught.value.code is RejectCode.BAD_CHUNK


@given(
    crc32=st.integers(0, (1 << 32) - 1), offset=st.integers(0, (1 << 63) - 1), length=st.integers(1, CHUNK_BYTES_MAX)
)
def test_a_checksum_added_to_a_header_changes_nothing_else(crc32: int, offset: int, length: int) -> None:
    plain, _ = encode(m.Chunk(7, 8, offset, length), session=SESSION, epoch=EPOCH)

    assert decode_chunk(decode_header(with_crc32(plain, crc32))) == m.Chunk(7, 8, offset, length, crc32)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
headers = st.builds(
    Header,
    type=st.sampled_from([*CONTROL_MESSAGES, m.Chunk.type, 0, 200]),
    session=st.just(SESSION) | st.binary(min_size=16, max_size=16),
    epoch=st.sampled_from([0, 77, 78]),
    length=st.integers(0, 200),
    step=st.integers(0, (1 << 64) - 1),
    attempt=st.integers(0, (1 << 32) - 1),
    offset=st.integers(0, (1 << 64) - 1),
    crc32=st.none() | st.integers(0, (1 << 32) - 1),
    major=st.sampled_from([1, 1, 1, 2]),
).map(encode_header)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    message = draw(st.sampled_from(list(CONTROL.values())))
    assert not isinstance(message, m.Chunk)
    changes = draw(st.dictionaries(st.sampled_from([*message.body(), "x"]), json_values, max_size=3))
    return json.dumps(message.body() | changes).encode()


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Honest headers with the length of dishonest bodies, and pure noise."""
    body = draw(st.one_of(bodies(), st.binary(max_size=200)))
    header = draw(st.one_of(headers, st.binary(max_size=80)))
    if len(header) == 64 and draw(st.booleans()):
        header = header[:44] + len(body).to_bytes(4, "little") + header[48:]
    return header, body


@settings(max_examples=400, deadline=None)
@given(frames=messages())
def test_arbitrary_frames_are_a_message_or_a_remote_protocol_error(frames: tuple[bytes, bytes]) -> None:
    code = None
    try:
        header, message = decode_frames(frames)
    except RemoteProtocolError as error:
        code = error.code
    else:
        assert decode_frames(encode(message, session=header.session, epoch=header.epoch))[1] == message
    assert code is None or SCOPES[code] is not Scope.SNAPSHOT


@settings(max_examples=200, deadline=None)
@given(conversation=st.lists(messages(), max_size=12), joined=st.booleans())
def test_whatever_a_trainer_sends_the_receiver_lives_and_answers_in_messages(
    conversation: list[tuple[bytes, bytes]], joined: bool
) -> None:
    receiver = new_receiver()
    peer = joined_peer(receiver, session=SESSION) if joined else Peer(receiver, session=SESSION)
    for header, body in conversation:
        answers = peer.send(header, body)
        assert len(answers) <= 2


@settings(max_examples=300, deadline=None)
@given(
    conversation=st.lists(messages(), max_size=12),
    state=st.sampled_from(["greeting", "greeted", "joining", "streaming"]),
)
def test_whatever_a_server_sends_the_sender_lives(conversation: list[tuple[bytes, bytes]], state: str) -> None:
    sender = sender_in(state)
    for frames in conversation:
        sender.receive(frames, 0.0)
        sender.tick(0.0)
        sender.next_frame()
