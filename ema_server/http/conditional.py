"""Conditional requests and cache headers for what never changes: a version's JSON and its files."""

from __future__ import annotations

from starlette.datastructures import Headers

YEAR_S = 31_536_000


def is_current(headers: Headers, etag: str) -> bool:
    """Whether the client already has the representation with this strong `etag` (`If-None-Match`, weak comparison)."""
    wanted = ",".join(headers.getlist("if-none-match"))
    tags = {tag.strip().removeprefix("W/") for tag in wanted.split(",")}
    return "*" in tags or etag in tags


def immutable_headers(etag: str, *, private: bool) -> dict[str, str]:
    """`ETag` and `Cache-Control` of an immutable representation; shared caches must not keep what needs a token."""
    scope = "private" if private else "public"
    return {"ETag": etag, "Cache-Control": f"{scope}, max-age={YEAR_S}, immutable"}
