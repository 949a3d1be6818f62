"""`Reader`: the versions of a server, from Python. Comes in: names; goes out: frozen values, folders, tensors.

    reader = Reader("http://127.0.0.1:8080")
    version = reader.wait("resnet34", "ema-0.9999")
    folder = reader.download(version, "out/")

Waiting and downloading survive a server that restarts meanwhile. What the weights mean is not known here.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ema_reader.averages import Averages
from ema_reader.derived import Derived
from ema_reader.download import Silent, download_version
from ema_reader.errors import NotFound, ReaderError, Unreachable, UsageError, WaitTimeout
from ema_reader.leases import Leases
from ema_reader.partial import Progress
from ema_reader.progress import default_progress
from ema_reader.transport import Transport, path_of
from ema_reader.values import MetricsRow, Run, Validation, Version

if TYPE_CHECKING:
    from torch import Tensor

_Value = TypeVar("_Value")

DEFAULT_URL = "http://127.0.0.1:8080"
WEIGHTS = "model.safetensors"
_AWAIT_S = 20  # for one answer; less than the transport waits for a byte


class Reader:
    """Reads from one server. A context manager; safe from several threads.

    Args:
        url: the server's address; default `EMA_URL`, else `http://127.0.0.1:8080`.
        token: the server's token; default `EMA_TOKEN`, else none.

    Raises:
        UsageError: the address is not an http URL.
    """

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        address = url if url is not None else os.environ.get("EMA_URL") or DEFAULT_URL
        secret = token if token is not None else os.environ.get("EMA_TOKEN")
        self._transport = Transport(address, secret)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The server's address."""
        return self._transport.url

    @property
    def derived(self) -> Derived:
        """Versions that the server makes of others after them."""
        return Derived(self._transport)

    @property
    def averages(self) -> Averages:
        """The averages of runs: how they stand, one more, one less, and which steps are inside a version."""
        return Averages(self._transport)

    @property
    def leases(self) -> Leases:
        """What an evaluation worker asks for versions."""
        return Leases(self._transport)

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def runs(self) -> tuple[Run, ...]:
        """All runs the server knows, by name."""
        return self._read(path_of("runs"), lambda answer: tuple(Run.from_json(item) for item in answer["runs"]))

    def run(self, run: str) -> Run:
        """One run.

        Raises:
            NotFound: the server does not know it.
        """
        return self._read(path_of("runs", run), Run.from_json)

    def versions(self, run: str, average: str) -> tuple[Version, ...]:
        """Versions of an average, newest first; empty before the first one is published.

        Raises:
            NotFound: the server knows no such run or average.
        """
        path = path_of("runs", run, "averages", average, "versions")
        return self._read(path, lambda answer: tuple(Version.from_json(item) for item in answer["versions"]))

    def version(self, run: str, average: str, rev: str = "latest") -> Version:
        """One version; `rev` is 40 hex digits, `step-N` or `latest`.

        Raises:
            NotFound: there is none (yet, or any more).
        """
        return self._read(path_of("runs", run, "averages", average, "versions", rev), Version.from_json)

    def wait(
        self,
        run: str,
        average: str,
        after: Version | str | None = None,
        timeout_s: float | None = None,
        *,
        poll_s: float = 1.0,
    ) -> Version | None:
        """Wait until the newest version is another one than `after` (a version or its id; None: until there is one).

        A server that is not up, and a run that has not begun, are waited for as well.

        Returns:
            The newest version; None when the run is finished and `after` is its last version (or it never had one).

        Raises:
            WaitTimeout: nothing new within `timeout_s` seconds (None waits for ever); the text says what was missing.
            Unauthorized: the server wants another token.
        """
        known = after.id if isinstance(after, Version) else after
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                finished = self.run(run).finished  # before the versions: the last one is there when a run is finished
                newest = next(iter(self.versions(run, average)), None)
                if newest is not None and newest.id != known:
                    return newest
                if finished:
                    return None
                missing = f"{run}/{average} has no version {'yet' if known is None else 'after ' + known[:12]}"
            except (NotFound, Unreachable) as error:
                missing = str(error)
            left_s = poll_s if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                raise WaitTimeout(f"nothing new after {timeout_s:g} s: {missing}")
            time.sleep(min(poll_s, left_s))

    def download(self, version: Version, dest: str | os.PathLike[str], *, progress: Progress | None = None) -> Path:
        """Download the files of a version into the folder `dest` and return it.

        A download that was cut off, in this process or another one, goes on where it stopped. Every file is verified
        by its sha256 before any of them is renamed into place; `version.json` comes last. Files of `dest` that are the
        same already are not downloaded again.

        Args:
            version: which one.
            dest: the folder, made if it is missing.
            progress: shows how far it is; default: a bar when stderr is a terminal, else nothing.

        Raises:
            VerificationFailed: the bytes are not those that the server wrote.
            NotFound: the version has been pruned.
            ReaderError: the disk refuses, or another process downloads into the same folder.
        """
        if progress is not None:
            return download_version(self._transport, version, Path(dest), progress)
        with default_progress() as bar:
            return download_version(self._transport, version, Path(dest), bar)

    def load(self, version: Version, device: str = "cpu") -> dict[str, Tensor]:
        """The weights of a version on `device`, by name, verified. Needs torch; uses the temporary folder meanwhile.

        Raises:
            NotFound: the version has been pruned, or has no weights in one file.
            ReaderError: torch is not installed.
            VerificationFailed: the bytes are not those that the server wrote.
        """
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ReaderError("loading weights needs torch (and numpy): install them, or use download()") from error
        if version.file(WEIGHTS) is None:
            raise NotFound(f"{version} has no {WEIGHTS}")
        with tempfile.TemporaryDirectory(prefix="ema-") as folder:
            path = download_version(self._transport, _only(version, WEIGHTS), Path(folder), Silent())
            return load_file(path / WEIGHTS, device=device)

    def report(
        self,
        version: Version,
        metrics: Mapping[str, float] | None = None,
        *,
        task: str = "default",
        worker: str | None = None,
        error: str | None = None,
        samples: int | None = None,
        seconds: float | None = None,
    ) -> MetricsRow:
        """Tell the server the metrics of a version, or the `error` that kept it from having any.

        A second report of the same version, task and worker replaces the first.

        Raises:
            UsageError: neither or both of metrics and error are given, or a metric is not a finite number.
            RequestRefused: the server does not take it; a name or a text is too long.
        """
        if bool(metrics) == (error is not None):
            raise UsageError("report either metrics (at least one) or an error")
        for name, value in (metrics or {}).items():
            if not math.isfinite(value):
                raise UsageError(
                    f"metric {name!r} is {value}: only finite numbers can be reported; report an error instead"
                )
        body: dict[str, object] = {"metrics": dict(metrics or {}), "task": task, "worker": worker, "error": error}
        body |= {"samples": samples, "seconds": seconds}
        path = path_of("runs", version.run, "averages", version.average, "versions", version.id, "metrics")
        return MetricsRow.from_json(self._transport.post(path, body))

    def metrics(self, run: str) -> tuple[MetricsRow, ...]:
        """Every report of a run's versions, by step, average, task and worker.

        Raises:
            NotFound: the server does not know the run.
        """
        path = path_of("runs", run, "metrics")
        return self._read(path, lambda answer: tuple(MetricsRow.from_json(item) for item in answer["metrics"]))

    def validate(
        self,
        run: str,
        average: str,
        rev: str = "latest",
        *,
        task: str = "default",
        again: bool = False,
        timeout_s: float | None = None,
    ) -> Validation:
        """Have a version evaluated by a worker, and wait for what comes of it.

        A version that has metrics for the task is not evaluated again, unless `again`.

        Returns:
            The validation: done with metrics, or failed with the error of the function.

        Raises:
            NotFound: there is no such version.
            Unreachable: the server is away, or nobody evaluates there; the text says how to start a worker.
            WaitTimeout: nothing came of it within `timeout_s` seconds (None waits for ever).
        """
        body = {"average": average, "rev": rev, "task": task, "again": again}
        found = Validation.from_json(self._transport.post(path_of("runs", run, "validations"), body))
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        path = path_of("runs", run, "validations", found.id)
        while not found.ended:
            left_s = _AWAIT_S if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                raise WaitTimeout(f"no result after {timeout_s:g} s: it is {found.state}. {found.note or ''}".rstrip())
            try:
                answer = self._transport.get(path, wait_s=max(1, min(_AWAIT_S, int(left_s))))
            except Unreachable:  # a server that restarts has not forgotten what it was asked
                time.sleep(min(1.0, left_s))
            else:
                found = Validation.from_json(answer)
        return found

    def ready(self) -> tuple[bool, dict[str, dict[str, object]]]:
        """Whether the server is ready, and its checks by name.

        Raises:
            Unreachable: nobody answers.
        """
        status, body = self._transport.status_and_json("/readyz")
        checks = body.get("checks") if isinstance(body, dict) else None
        return status == 200, checks if isinstance(checks, dict) else {}

    def _read(self, path: str, value_of: Callable[[Any], _Value]) -> _Value:
        """What is at `path` as a value; an answer that is none is not an ema server's."""
        return self._transport.read(self._transport.get(path), value_of)


def _only(version: Version, name: str) -> Version:
    return replace(version, files=tuple(item for item in version.files if item.name == name))
