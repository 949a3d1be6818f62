"""Conditional requests and byte ranges by RFC 9110, for representations that never change."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime

from starlette.datastructures import Headers

from ema_server.http.problems import Code, Problem
from ema_server.http.services import Services

YEAR_S = 31_536_000
RANGES_MAX = 100  # more are answered with the whole file
_RANGE = re.compile(r"([0-9]{0,20})\s*-\s*([0-9]{0,20})")


def immutable_headers(services: Services, etag: str) -> dict[str, str]:
    """`ETag` and `Cache-Control` of an immutable representation; shared caches must not keep what needs a token."""
    scope = "public" if services.config.token is None else "private"
    return {"ETag": etag, "Cache-Control": f"{scope}, max-age={YEAR_S}, immutable"}


def is_unmodified(headers: Headers, etag: str, modified: str | None = None) -> bool:
    """Whether 304 answers a GET or HEAD; False to go on.

    Args:
        headers: of the request.
        etag: the strong entity tag of the representation.
        modified: its Last-Modified, if it is sent.

    Raises:
        Problem: 412, because a precondition failed.
    """
    if "if-match" in headers:
        met = _names(headers.getlist("if-match"), etag)
    else:
        met = not _is_newer(modified, headers.get("if-unmodified-since"), default=False)
    if not met:
        raise Problem(Code.PRECONDITION_FAILED, f"the ETag of this address is {etag}: what you have is another version")
    if "if-none-match" in headers:
        return _names([tag.replace("W/", "") for tag in headers.getlist("if-none-match")], etag)
    return not _is_newer(modified, headers.get("if-modified-since"), default=True)


def applies_to(if_range: str | None, etag: str, modified: str) -> bool:
    """Whether the Range of a request with this If-Range is for this representation."""
    return if_range is None or if_range in (etag, modified)


def parse_ranges(header: str) -> list[tuple[int | None, int | None]] | None:
    """First and last position of each range of a Range header; None if it is to be ignored, as another unit is.

    Raises:
        Problem: 400, because a range of bytes cannot be understood.
    """
    unit, _, text = header.partition("=")
    if unit.strip().lower() != "bytes":
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    found = [_RANGE.fullmatch(part) for part in parts]
    positions = [tuple(int(one) if one else None for one in match.groups()) for match in found if match]
    wrong = any(first is None and last is None for first, last in positions) or any(
        first is not None and last is not None and first > last for first, last in positions
    )
    if wrong or not positions or len(positions) < len(parts):
        detail = f"{header[:200]!r} is not 'bytes=FIRST-LAST', 'bytes=FIRST-' or 'bytes=-COUNT'"
        raise Problem(Code.BAD_RANGE, detail)
    return [(first, last) for first, last in positions] if len(positions) <= RANGES_MAX else None


def satisfiable(header: str, size: int) -> str | None:
    """A Range header with those ranges that lie in a file of `size` bytes; None if the whole file is to be sent.

    Raises:
        Problem: 400 for a header that cannot be understood, 416 if none of its ranges lies in the file.
    """
    ranges = parse_ranges(header)
    if ranges is None:
        return None
    spans = [
        (max(size - (last or 0), 0), size) if first is None else (first, size if last is None else min(last + 1, size))
        for first, last in ranges
    ]
    inside = [f"{start}-{end - 1}" for start, end in spans if start < end]
    if not inside:
        headers = {"Content-Range": f"bytes */{size}"}
        raise Problem(Code.RANGE_NOT_SATISFIABLE, f"{header[:200]!r} of a file of {size} bytes", headers=headers)
    return f"bytes={','.join(inside)}"


def _names(values: list[str], etag: str) -> bool:
    tags = {tag.strip() for tag in ",".join(values).split(",")}
    return "*" in tags or etag in tags


def _is_newer(modified: str | None, date: str | None, *, default: bool) -> bool:
    """Whether one HTTP-date is after another; `default` where there is none, or one that must be ignored."""
    if modified is None or date is None:
        return default
    try:
        return parsedate_to_datetime(modified) > parsedate_to_datetime(date)
    except (TypeError, ValueError):  # not an HTTP-date, or one without a zone
        return default
