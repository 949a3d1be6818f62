"""Proof of a shared token without sending it: HMAC-SHA256 over the server's nonce and the session."""

from __future__ import annotations

import hashlib
import hmac

NONCE_BYTES = 32
_CONTEXT = b"ema-sidecar hello 1\x00"


def prove(token: str, *, nonce: str, session: bytes) -> str:
    """64 hex digits that only a holder of `token` can compute for this nonce (hex text) and session (16 bytes)."""
    # A token from the environment may hold bytes that are not UTF-8, which Python represents as surrogates.
    return hmac.new(
        token.encode(errors="surrogateescape"), _CONTEXT + session + nonce.encode(), hashlib.sha256
    ).hexdigest()


def verify(token: str, proof: str, *, nonce: str, session: bytes) -> bool:
    """Whether `proof` equals what `prove` returns, in constant time."""
    return hmac.compare_digest(prove(token, nonce=nonce, session=session).encode(), proof.encode())
