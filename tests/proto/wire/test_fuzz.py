"""Any received bytes are a message or one named error, and both machines continue."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ema_proto.errors import RemoteProtocolError, Scope
from ema_proto.wire import messages as m
from ema_proto.wire.codec import (
    CONTROL_MESSAGES,
    Header,
    decode_frames,
    encode,
    encode_header,
)
from support.examples import examples
from support.messages import CONTROL, SESSION
from support.peers import Peer, joined_peer, new_receiver, sender_in

pytestmark = pytest.mark.slow

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
    changes = draw(st.dictionaries(st.sampled_from([*message.body(), "x"]), json_values, max_size=3))
    return json.dumps(message.body() | changes).encode()


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Valid headers with the length of invalid bodies, and random bytes."""
    body = draw(st.one_of(bodies(), st.binary(max_size=200)))
    header = draw(st.one_of(headers, st.binary(max_size=80)))
    if len(header) == 64 and draw(st.booleans()):
        header = header[:44] + len(body).to_bytes(4, "little") + header[48:]
    return header, body


@settings(max_examples=examples(400))
@given(frames=messages())
def test_arbitrary_frames_are_a_message_or_a_remote_protocol_error(frames: tuple[bytes, bytes]) -> None:
    code = None
    try:
        header, message = decode_frames(frames)
    except RemoteProtocolError as error:
        code = error.code
    else:
        assert decode_frames(encode(message, session=header.session, epoch=header.epoch))[1] == message
    assert code is None or code.scope is not Scope.SNAPSHOT


@settings(max_examples=examples(200))
@given(conversation=st.lists(messages(), max_size=12), joined=st.booleans())
def test_receiver_answers_arbitrary_input_with_messages(conversation: list[tuple[bytes, bytes]], joined: bool) -> None:
    receiver = new_receiver()
    peer = joined_peer(receiver, session=SESSION) if joined else Peer(receiver, session=SESSION)
    for header, body in conversation:
        answers = peer.send(header, body)
        assert len(answers) <= 2


@settings(max_examples=examples(300))
@given(
    conversation=st.lists(messages(), max_size=12),
    state=st.sampled_from(["greeting", "greeted", "joining", "streaming"]),
)
def test_sender_survives_arbitrary_input(conversation: list[tuple[bytes, bytes]], state: str) -> None:
    sender = sender_in(state)
    for frames in conversation:
        sender.receive(frames, 0.0)
        sender.tick(0.0)
        sender.next_frame()
