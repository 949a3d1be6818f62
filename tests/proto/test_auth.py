"""The proof of a token."""

from __future__ import annotations

import hashlib

from ema_proto.auth import prove, verify

SESSION = bytes(range(16))


def test_proof_is_the_hmac_of_the_specification() -> None:
    """HMAC by its definition, not by the library that the product uses."""
    key = b"secret".ljust(64, b"\0")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in key) + b"ema-sidecar hello 1\0" + SESSION + b"nonce").digest()
    expected = hashlib.sha256(bytes(b ^ 0x5C for b in key) + inner).hexdigest()

    assert prove("secret", nonce="nonce", session=SESSION) == expected


def test_proof_is_valid_only_for_its_token_nonce_and_session() -> None:
    proof = prove("secret", nonce="nonce", session=SESSION)

    assert verify("secret", proof, nonce="nonce", session=SESSION)
    assert not verify("secret2", proof, nonce="nonce", session=SESSION)
    assert not verify("secret", proof, nonce="nonce2", session=SESSION)
    assert not verify("secret", proof, nonce="nonce", session=bytes(16))
    assert not verify("secret", proof[:-1], nonce="nonce", session=SESSION)
    assert not verify("secret", "größe", nonce="nonce", session=SESSION)


def test_token_of_undecodable_bytes_from_the_environment_works() -> None:
    token = b"caf\xe9".decode(errors="surrogateescape")

    assert verify(token, prove(token, nonce="n", session=SESSION), nonce="n", session=SESSION)
