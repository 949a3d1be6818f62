"""The sender's side of a greeting: HELLO, the answer to a CHALLENGE, and what a WELCOME settles for the connection."""

from __future__ import annotations

from ema_proto.auth import prove
from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.limits import VERSION_MAJOR
from ema_proto.wire import messages as m


def answer_challenge(challenge: m.Challenge, *, token: str | None, session: bytes) -> m.Hello:
    """The HELLO that proves our token.

    Raises:
        RemoteProtocolError: `unauthorized`; we have none.
    """
    if token is None:
        raise RemoteProtocolError(RejectCode.UNAUTHORIZED, "the server asks for a token: set EMA_TOKEN to the server's")
    return m.Hello(proof=prove(token, nonce=challenge.nonce, session=session))


def check_welcome(welcome: m.Welcome) -> None:
    """Refuse a server that chose a version which our HELLO did not offer.

    Raises:
        RemoteProtocolError: `version`.
    """
    if welcome.major != VERSION_MAJOR:
        text = f"the server chose protocol {welcome.major}, this trainer speaks {VERSION_MAJOR}: upgrade the older side"
        raise RemoteProtocolError(RejectCode.VERSION, text)


def check_join(join: m.Join, welcome: m.Welcome) -> None:
    """Refuse to ask for what the server cannot do.

    Raises:
        RemoteProtocolError: `version`; it knows no checksums and the trainer wants them.
    """
    if join.checksum and "crc32" not in welcome.capabilities:
        text = "the server cannot check CRC-32: upgrade it, or turn the checksum off"
        raise RemoteProtocolError(RejectCode.VERSION, text)
