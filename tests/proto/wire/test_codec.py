"""Messages to frames and back; untrusted frames are a message or one named error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.averages.rules import Raw
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.limits import CHUNK_BYTES_MAX, CONTROL_BODY_BYTES_MAX, STEP_MAX, TEXT_CHARS_MAX
from ema_proto.wire import messages as m
from ema_proto.wire.body import decode_body
from ema_proto.wire.codec import (
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
from ema_proto.wire.manifest import Role, TensorSpec, layout
from support.messages import CONTROL, EPOCH, SESSION
from support.peers import sender_in


def code_of(header: bytes, body: bytes) -> RejectCode:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_frames((header, body))
    return caught.value.code


@pytest.mark.parametrize("name", CONTROL)
def test_truncated_message_is_refused_as_a_frame(name: str) -> None:
    header, body = encode(CONTROL[name], session=SESSION, epoch=EPOCH)

    for cut in range(len(header)):
        assert code_of(header[:cut], body) is RejectCode.BAD_FRAME
    for cut in range(len(body)):
        assert code_of(header, body[:cut]) is RejectCode.BAD_FRAME
    assert code_of(header + b"\0", body) is RejectCode.BAD_FRAME
    assert code_of(header, body + b" ") is RejectCode.BAD_FRAME


@pytest.mark.parametrize("frames", [(), (b"",), (b"", b"", b"")])
def test_message_has_two_frames(frames: tuple[bytes, ...]) -> None:
    with pytest.raises(RemoteProtocolError, match=f"has {len(frames)} frames"):
        decode_frames(frames)


@pytest.mark.parametrize("name", CONTROL)
def test_keys_of_a_later_minor_version_are_ignored(name: str) -> None:
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
def test_wrong_value_type_is_refused_by_a_named_code_or_read(value: object) -> None:
    for message in CONTROL.values():
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
        ("join", "samples_per_step", 0),
        ("join", "samples_per_step", 1e-10),
        ("join", "steps_per_epoch", 1e15),
        ("join", "samples_per_step", True),
        ("join", "samples_per_step", "32"),
        ("join", "steps_per_epoch", -1.5),
        ("join", "steps_per_epoch", 10**400),
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
def test_out_of_bounds_value_is_a_bad_message_that_names_the_key(name: str, key: str, value: object) -> None:
    message = CONTROL[name]
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
def test_json_ambiguities_are_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_body(body)

    assert caught.value.code is RejectCode.BAD_MESSAGE
    assert len(caught.value.text) < 200


def test_paired_surrogate_escape_is_one_character() -> None:
    assert decode_body(b'{"a":"\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}


def test_any_server_text_can_be_read() -> None:
    for text in ("x" * 100_000, "bad path \udcff", "\N{GRINNING FACE}" * 5000):
        for message in (m.Reject(RejectCode.UNAVAILABLE, text), m.Published(None, 1, text), m.Rewound(1, None, text)):
            frames = encode(message, session=SESSION, epoch=EPOCH)
            assert len(frames[1]) <= CONTROL_BODY_BYTES_MAX
            assert type(decode_frames(frames)[1]) is type(message)


def test_join_too_large_to_send_is_a_local_error() -> None:
    names = [f"{number:06d}{'x' * 1000}" for number in range(17_000)]
    manifest = layout([TensorSpec(name, "U8", (1,), Role.PARAM, 0) for name in names])
    join = m.Join(run="run", first_step=1, manifest=manifest, averages=(Raw(),))

    with pytest.raises(LocalProtocolError, match="JOIN has a body of"):
        encode(join, session=SESSION, epoch=EPOCH)
    sender = sender_in("greeted")
    sender.join(join)
    assert [getattr(event, "code", None) for event in sender.events][-1] is RejectCode.MANIFEST_INVALID


def test_another_major_is_refused_except_in_hello_and_reject() -> None:
    for kind in CONTROL_MESSAGES:
        frame = encode_header(Header(kind, SESSION, EPOCH, 2, major=9))
        if kind in (m.Hello.type, m.Reject.type):
            assert decode_header(frame).major == 9
        else:
            with pytest.raises(RemoteProtocolError, match="version 9 is not spoken") as caught:
                decode_header(frame)
            assert caught.value.code is RejectCode.VERSION


@pytest.mark.parametrize("kind", [m.Chunk.type, m.Join.type, m.Begin.type, 255])
def test_header_cannot_announce_more_than_its_types_limit(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match="is over"):
        decode_header(encode_header(Header(kind, SESSION, EPOCH, (1 << 32) - 1)))


def test_unknown_type_and_too_large_step_are_bad_messages() -> None:
    assert code_of(encode_header(Header(99, SESSION, EPOCH, 2)), b"{}") is RejectCode.BAD_MESSAGE
    begin = encode_header(Header(m.Begin.type, SESSION, EPOCH, 17, step=STEP_MAX + 1))
    assert code_of(begin, b'{"mode":"update"}') is RejectCode.BAD_MESSAGE


def test_unknown_flags_and_reserved_bytes_are_ignored() -> None:
    header = bytearray(encode(m.Bye(), session=SESSION, epoch=EPOCH)[0])
    header[7] |= 0xFE
    header[60:] = b"\xff" * 4

    assert decode_frames((bytes(header), b"{}"))[1] == m.Bye()


def test_empty_chunk_is_refused() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_chunk(Header(m.Chunk.type, SESSION, EPOCH, 0))
    assert caught.value.code is RejectCode.BAD_CHUNK


@given(
    crc32=st.integers(0, (1 << 32) - 1), offset=st.integers(0, (1 << 63) - 1), length=st.integers(1, CHUNK_BYTES_MAX)
)
def test_adding_a_checksum_changes_nothing_else(crc32: int, offset: int, length: int) -> None:
    plain, _ = encode(m.Chunk(7, 8, offset, length), session=SESSION, epoch=EPOCH)

    assert decode_chunk(decode_header(with_crc32(plain, crc32))) == m.Chunk(7, 8, offset, length, crc32)
