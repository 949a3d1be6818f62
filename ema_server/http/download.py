"""The response that sends one file of a version, which is held until the last byte is sent."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import anyio.to_thread
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from ema_server.evaluation.metric_store import Subject
from ema_server.http.conditional import applies_to, immutable_headers, is_unmodified, satisfiable
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import version_gone
from ema_server.http.services import Services
from ema_server.storage.catalog import FileEntry, Version, VersionGone

_MEDIA_TYPES = {".json": "application/json", ".safetensors": "application/octet-stream"}


class Download(FileResponse):
    """The response for GET and HEAD of one file of a version; a problem if it is gone or damaged.

    Args:
        services: the server.
        version: the version, which a GET records as downloaded.
        entry: the file.
        headers: further headers of the response.
    """

    # The default of 64 KiB spends most of its time between threads: 1 MiB measured three times as fast.
    chunk_size = 1 << 20

    def __init__(
        self, services: Services, version: Version, entry: FileEntry, headers: Mapping[str, str] | None = None
    ) -> None:
        self._services = services
        self._version = version
        self._entry = entry
        self._etag = f'"{entry.sha256}"'
        digest = base64.b64encode(bytes.fromhex(entry.sha256)).decode()
        super().__init__(
            version.folder / entry.name,
            headers={
                **immutable_headers(services, self._etag),
                "Repr-Digest": f"sha-256=:{digest}:",
                "Digest": f"sha-256={digest}",  # RFC 3230, obsolete, but the one that aria2 checks a download against
                "X-EMA-Step": str(version.step),
                **(headers or {}),
            },
            media_type=_MEDIA_TYPES.get(Path(entry.name).suffix, "application/octet-stream"),
            filename=_saved_name(version, entry),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as stack:
            try:
                stack.enter_context(self._services.catalog.hold(self._version))
                self.stat_result = await self._stat()
            except (VersionGone, FileNotFoundError):
                raise version_gone(self._services, self._version) from None
            if scope["method"] == "GET":
                self._record()
            self.set_stat_headers(self.stat_result)
            headers = Headers(scope=scope)
            if is_unmodified(headers, self._etag, self.headers["last-modified"]):
                kept = {key: self.headers[key] for key in ("etag", "cache-control", "last-modified", "x-ema-step")}
                await Response(status_code=304, headers=kept)(scope, receive, send)
            else:
                await super().__call__(
                    {**scope, "headers": self._with_valid_range(headers, scope["method"])}, receive, send
                )

    def _record(self) -> None:
        version = self._version
        self._services.metrics.hand_out(Subject(version.run, version.average, version.id, version.step))

    async def _stat(self) -> os.stat_result:
        found = await anyio.to_thread.run_sync(os.stat, self.path)
        if found.st_size != self._entry.size:
            detail = f"{self._entry.name} has {found.st_size} bytes on disk, it was written with {self._entry.size}"
            raise Problem(Code.DAMAGED, detail)
        return found

    def _with_valid_range(self, headers: Headers, method: str) -> list[tuple[bytes, bytes]]:
        """The headers of the request with a Range that Starlette answers by 206, or none."""
        kept = [(name, value) for name, value in headers.raw if name not in (b"range", b"if-range")]
        wanted = headers.get("range")
        if (
            wanted is None
            or method != "GET"
            or not applies_to(headers.get("if-range"), self._etag, self.headers["last-modified"])
        ):
            return kept
        ranges = satisfiable(wanted, self._entry.size)
        return kept if ranges is None else [*kept, (b"range", ranges.encode())]


def _saved_name(version: Version, entry: FileEntry) -> str:
    """The name under which a browser saves the file: it says which version it is, so that two cannot be mixed up."""
    stem = f"{version.run}-{version.average}-step-{version.step}"
    if entry.name == "model.safetensors":
        return f"{stem}.safetensors"
    return f"{stem}-{entry.name.replace('/', '-')}"
