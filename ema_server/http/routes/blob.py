"""One file of a version as a response: whole, in ranges, or 304. The version is held until the last byte is sent.

Comes in: a version and one of its files; goes out: bytes read by worker threads, 1 MiB at a time.
"""

from __future__ import annotations

import base64
import os
from contextlib import ExitStack
from pathlib import Path

import anyio.to_thread
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ema_server.http.conditional import immutable_headers, is_current
from ema_server.http.problems import Code, Problem, problem_response
from ema_server.storage.catalog import Catalog, FileEntry, Version, VersionGone

_MEDIA_TYPES = {".json": "application/json", ".safetensors": "application/octet-stream"}


class Blob(FileResponse):
    """The response for GET and HEAD of `entry`; raises a `Problem` when the file is gone or damaged.

    Args:
        catalog: holds the version meanwhile.
        version: whose file it is.
        entry: which file.
        private: whether a token was needed.
    """

    # The default of 64 KiB spends most of its time between threads: 1 MiB measured three times as fast.
    chunk_size = 1 << 20

    def __init__(self, catalog: Catalog, version: Version, entry: FileEntry, *, private: bool) -> None:
        self._catalog = catalog
        self._version = version
        self._entry = entry
        self._etag = f'"{entry.sha256}"'
        digest = base64.b64encode(bytes.fromhex(entry.sha256)).decode()
        super().__init__(
            version.folder / entry.name,
            headers={
                **immutable_headers(self._etag, private=private),
                "Repr-Digest": f"sha-256=:{digest}:",
                "X-EMA-Step": str(version.step),
            },
            media_type=_MEDIA_TYPES.get(Path(entry.name).suffix, "application/octet-stream"),
            filename=saved_name(version, entry),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        if is_current(Headers(scope=scope), self._etag):
            kept = ("etag", "cache-control", "x-ema-step")
            await Response(status_code=304, headers={key: self.headers[key] for key in kept})(scope, receive, send)
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(self._catalog.hold(self._version))
                self.stat_result = await self._stat()
            except (VersionGone, FileNotFoundError):
                detail = f"version {self._version.id} was pruned a moment ago; take a newer one"
                raise Problem(Code.VERSION_NOT_FOUND, detail) from None
            self.set_stat_headers(self.stat_result)
            await super().__call__(scope, receive, self._with_problems(scope, receive, send))

    async def _stat(self) -> os.stat_result:
        found = await anyio.to_thread.run_sync(os.stat, self.path)
        if found.st_size != self._entry.size:
            detail = f"{self._entry.name} has {found.st_size} bytes on disk, it was written with {self._entry.size}"
            raise Problem(Code.DAMAGED, detail)
        return found

    def _with_problems(self, scope: Scope, receive: Receive, send: Send) -> Send:
        """Replace Starlette's plain-text answers to a bad Range by problems."""
        replaced = False

        async def guarded(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                replaced = True
                problem = self._range_problem(message["status"], Headers(scope=scope)["range"])
                await problem_response(problem, scope)(scope, receive, send)
            elif not replaced:
                await send(message)

        return guarded

    def _range_problem(self, status: int, wanted: str) -> Problem:
        size = self._entry.size
        if status == Code.RANGE_NOT_SATISFIABLE.status:
            headers = {"Content-Range": f"bytes */{size}"}
            return Problem(Code.RANGE_NOT_SATISFIABLE, f"{wanted[:200]!r} of a file of {size} bytes", headers=headers)
        return Problem(Code.BAD_RANGE, f"{wanted[:200]!r} is not 'bytes=FIRST-LAST', 'bytes=FIRST-' or 'bytes=-COUNT'")


def saved_name(version: Version, entry: FileEntry) -> str:
    """The name under which a browser saves the file: it says which version it is, so that two cannot be mixed up."""
    stem = f"{version.run}-{version.average}-step-{version.step}"
    return f"{stem}.safetensors" if entry.name == "model.safetensors" else f"{stem}-{entry.name}"
