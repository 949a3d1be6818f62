"""An HTTP server in the place of the Hugging Face Hub, for uploads: repositories, commits with LFS files, tags."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

_WAIT_S = 60.0


@dataclass
class Repository:
    """A repository: its files at `main`, by name, and its tags; each commit has an id and a message."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self.hub.tokens.add(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path):
            files = self.hub.repositories[match[1]].files
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()
            ]
            self._answer(200, listed)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            self._send_file(match[1], match[2])
        else:
            self._answer(404, {"error": path}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.hub.tokens.add(self.headers.get("Authorization"))
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = self._chunks()
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            self._create(json.loads(data))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            names = [file["path"] for file in json.loads(data)["files"]]
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False}
                for name in names
            ]
            self._answer(200, {"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            actions = {"upload": {"href": f"{self.hub.url}/lfs"}}
            objects = [
                {**item, "actions": {"upload": {"href": f"{actions['upload']['href']}/{item['oid']}"}}}
                for item in json.loads(data)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in data.splitlines()])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tag/(\w+)", path):
            tags, tag = self.hub.repositories[match[1]].tags, json.loads(data)["tag"]
            self._answer(409 if tag in tags else 200, {})
            tags.setdefault(tag, match[2])
        else:
            self._answer(404, {"error": path})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.blobs[oid] = data
        self._answer(200, {})

    def do_DELETE(self) -> None:
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tag/(.+)", unquote(self.path))
        assert match is not None
        del self.hub.repositories[match[1]].tags[match[2]]
        self._answer(200, {})

    def _create(self, body: dict[str, Any]) -> None:
        repo = f"{body['organization']}/{body['name']}"
        known = repo in self.hub.repositories
        self.hub.repositories.setdefault(
            repo, Repository("private" in (body.get("visibility"), body.get("private") and "private"))
        )
        self._answer(409 if known else 200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        repository, message = self.hub.repositories[repo], ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                del repository.files[value["path"]]
        commit = hashlib.sha1(repr(lines).encode(), usedforsecurity=False).hexdigest()
        repository.commits.append((commit, message))
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _send_file(self, repo: str, name: str) -> None:
        repository = self.hub.repositories.get(repo)
        if repository is None:
            self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            return
        if name not in repository.files:
            self._answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})
            return
        data = repository.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": repository.commits[-1][0]}
        self._answer(200, data, headers)

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve an empty Hub."""
    made = Hub("")
    handler = type("Handler", (_Handler,), {"hub": made})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join(_WAIT_S)
