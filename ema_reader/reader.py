"""`Reader`: the versions of one server, from Python.

reader = Reader("http://127.0.0.1:8080")
version = reader.wait("resnet34", "ema-0.9999")
folder = reader.download(version, "out/")
"""

from __future__ import annotations

import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ema_reader.averages import ANSWER_S, Averages
from ema_reader.card import card_with_scores
from ema_reader.derived import Derived
from ema_reader.download import Silent, default_progress, download_version
from ema_reader.errors import NotFound, ReaderError, Unreachable, UsageError, WaitTimeout
from ema_reader.leases import Leases
from ema_reader.partial import Progress
from ema_reader.scores import Best, chosen_metric, direction_of, ranked, scores_of
from ema_reader.targets import parse_target
from ema_reader.transport import Transport, path_of
from ema_reader.values import MetricsRow, Run, Validation, Version

if TYPE_CHECKING:
    from torch import Tensor

_Value = TypeVar("_Value")

DEFAULT_URL = "http://127.0.0.1:8080"
WEIGHTS = "model.safetensors"
_AWAIT_S = 20  # for one answer; less than the transport waits for a byte
_SHORT_ID = re.compile(r"[0-9a-f]{7,39}")


class Reader:
    """Reads from one server. A context manager; safe from several threads.

    A version is given as a `Version`, or as text: `"RUN/AVERAGE"` or `"RUN/AVERAGE@REV"`. REV is an id (40 hex digits),
    its first 7 digits or more, `step-N`, or `latest`.

    Args:
        url: the server's address, with a path prefix if a proxy adds one; default `EMA_URL`, else
            `http://127.0.0.1:8080`.
        token: the server's token; default `EMA_TOKEN`, else none.

    Raises:
        UsageError: the address is not an http URL, or a proxy or TLS variable of the environment cannot be used.
    """

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        address = url if url is not None else os.environ.get("EMA_URL") or DEFAULT_URL
        self._transport = Transport(address, token if token is not None else os.environ.get("EMA_TOKEN"))

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
        """Versions that the server makes from other versions."""
        return Derived(self._transport)

    @property
    def averages(self) -> Averages:
        """The averages of runs: their state, adding and removing them, and the steps inside a version."""
        return Averages(self._transport)

    @property
    def leases(self) -> Leases:
        """Leases of versions, for evaluation workers."""
        return Leases(self._transport)

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def runs(self) -> tuple[Run, ...]:
        """All runs of the server, by name."""
        return self._read(path_of("runs"), lambda answer: tuple(Run.from_json(item) for item in answer["runs"]))

    def run(self, run: str) -> Run:
        """One run.

        Raises:
            NotFound: the server does not know it.
        """
        return self._read(path_of("runs", run), Run.from_json)

    def delete(self, run: str) -> None:
        """Delete a run that no trainer streams: generations, derived versions, ring, metrics. Returns when durable.

        Raises:
            NotFound: the server does not know it.
            RequestRefused: a trainer streams it.
            Unreachable: the server's disk refuses; nothing was deleted.
        """
        self._transport.delete(path_of("runs", run), answer_s=ANSWER_S)

    def versions(self, run: str, average: str) -> tuple[Version, ...]:
        """Versions of an average, newest first; empty before the first one is published.

        Raises:
            NotFound: the server knows no such run or average.
        """
        path = path_of("runs", run, "averages", average, "versions")
        return self._read(path, lambda answer: tuple(Version.from_json(item) for item in answer["versions"]))

    def version(self, run: str, average: str, rev: str = "latest") -> Version:
        """One version; `rev` is an id (40 hex digits), its first 7 digits or more, `step-N` or `latest`.

        Raises:
            NotFound: the server does not have it.
            UsageError: `rev` is the beginning of several ids.
        """
        rev = self._full(run, average, rev)
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
        """Wait until the newest version is not `after` (a version or its id; None: until there is a version).

        It also waits for a server that is not running and a run that has not begun.

        Returns:
            The newest version; None when the run is finished and `after` is its last version (or it has none).

        Raises:
            WaitTimeout: nothing new within `timeout_s` seconds (None: no limit); the text says what was missing.
            Unauthorized: the server requires a token, or another one.
        """
        known = after.id if isinstance(after, Version) else after
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                finished = self.run(run).finished  # before the versions: a finished run has its last one
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

    def download(
        self, version: Version | str, dest: str | os.PathLike[str], *, progress: Progress | None = None
    ) -> Path:
        """Download the files of a version into the folder `dest` and return it.

        An interrupted download, of this process or another one, is resumed. Every file is verified by its sha256 before
        any of them is renamed into place; `version.json` comes last. Files of `dest` with the right content are kept.

        Args:
            version: the version, or its target as text.
            dest: the folder; created if it is missing.
            progress: receives the number of bytes; default: a bar when stderr is a terminal.

        Raises:
            VerificationFailed: the bytes differ from those that the server wrote.
            NotFound: the server does not have the version.
            ReaderError: the disk refuses, or another process downloads into the same folder.
        """
        wanted = self._version(version)
        if progress is not None:
            return download_version(self._transport, wanted, Path(dest), progress)
        with default_progress() as bar:
            return download_version(self._transport, wanted, Path(dest), bar)

    def load(
        self, version: Version | str, device: str = "cpu", *, progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """The weights of a version on `device`, by name, verified. Needs torch, and space in the temporary folder.

        Args:
            version: the version, or its target as text.
            device: of the tensors.
            progress: receives the number of bytes; an exception that it raises ends the download. Default: none.

        Raises:
            NotFound: the server does not have the version, or it has no weights in one file.
            ReaderError: torch is not installed.
            VerificationFailed: the bytes differ from those that the server wrote.
        """
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ReaderError("loading weights needs torch (and numpy): install them, or use download()") from error
        wanted = self._version(version)
        weights = wanted.file(WEIGHTS)
        if weights is None:
            raise NotFound(f"{wanted} has no {WEIGHTS}")
        with tempfile.TemporaryDirectory(prefix="ema-") as folder:
            path = download_version(
                self._transport, replace(wanted, files=(weights,)), Path(folder), progress or Silent()
            )
            return load_file(path / WEIGHTS, device=device)

    def card(self, version: Version | str) -> str:
        """The model card of a version in Markdown, with its scores so far: rule, step, ledger digest, sha256.

        A `README.md` among the trainer's files is returned as it is.

        Raises:
            NotFound: the server does not have the version.
        """
        of = self._version(version)
        repository = f"{of.run}/{of.average}"
        info = self._transport.get(f"/api/models/{repository}/revision/{of.id}")
        with self._transport.stream(f"/{repository}/resolve/{of.id}/README.md", {}) as response:
            readme = response.read().decode()
        if of.file("README.md") is not None:
            return readme
        return self._transport.read(info, lambda answer: card_with_scores(readme, answer["cardData"]))

    def report(
        self,
        version: Version | str,
        metrics: Mapping[str, float] | None = None,
        *,
        task: str = "default",
        worker: str | None = None,
        missing: Mapping[str, str] | None = None,
        error: str | None = None,
        samples: int | None = None,
        seconds: float | None = None,
    ) -> MetricsRow:
        """Report the metrics of a version, or the `error` that prevented them.

        A second report of the same version, task and worker replaces the first. A metric that is NaN or infinite is
        stored as missing, with that reason; `missing` has others, each with its reason.

        Raises:
            UsageError: neither metrics (or missing ones) nor an error are given, or both.
            RequestRefused: the server does not accept it; a name or a text is too long.
        """
        if bool(metrics or missing) == (error is not None):
            raise UsageError("report either metrics (at least one) or an error")
        of, given = self._version(version), metrics or {}
        finite = {name: value for name, value in given.items() if math.isfinite(value)}
        others = {name: str(float(value)) for name, value in given.items() if name not in finite}
        body: dict[str, object] = {"metrics": finite, "missing": {**others, **(missing or {})}}
        body |= {"task": task, "worker": worker}
        body |= {"error": error, "samples": samples, "seconds": seconds}
        path = path_of("runs", of.run, "averages", of.average, "versions", of.id, "metrics")
        return MetricsRow.from_json(self._transport.post(path, body))

    def metrics(self, run: str) -> tuple[MetricsRow, ...]:
        """Every report about a run's versions, by step, average, task and worker.

        Raises:
            NotFound: the server does not know the run.
        """
        path = path_of("runs", run, "metrics")
        return self._read(path, lambda answer: tuple(MetricsRow.from_json(item) for item in answer["metrics"]))

    def best(self, run: str, by: str | None = None, *, lower: bool | None = None) -> Best:
        """The best version that the server still has, by a reported metric.

        Args:
            run: the run.
            by: the metric; `TASK/METRIC` for a task other than `default`. None: the only one there is.
            lower: whether a lower value is better; None: lower if the metric's name has a word such as loss or error.

        Raises:
            NotFound: the run has no such metric, or none of the versions with it is stored.
            UsageError: there are several metrics, and `by` is None.
        """
        scores = scores_of(self.metrics(run))
        metric = chosen_metric(run, scores, by)
        direction = direction_of(metric, lower)
        ranking = ranked(scores, metric, direction)
        scored = {score.average for score in ranking}
        averages = [name for name in self.run(run).average_names if name in scored]
        stored = {version.id: version for name in averages for version in self.versions(run, name)}
        for rank, score in enumerate(ranking):
            if score.version in stored:
                return Best(stored[score.version], metric, score.metrics[metric], direction, rank)
        raise NotFound(f"none of the {len(ranking)} versions of run {run!r} with {metric!r} is stored any longer")

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
        """Have a version evaluated by a worker, and wait for the result.

        A version that has metrics for the task is evaluated again only with `again`.

        Returns:
            The validation: done with metrics, or failed with the error of the function.

        Raises:
            NotFound: the server does not have the version.
            Unreachable: the server does not answer, or has no worker; the text says how to start one.
            WaitTimeout: there is no result within `timeout_s` seconds (None: no limit).
        """
        body = {"average": average, "rev": self._full(run, average, rev), "task": task, "again": again}
        found = Validation.from_json(self._transport.post(path_of("runs", run, "validations"), body))
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        path = path_of("runs", run, "validations", found.id)
        while not found.ended:
            left_s = _AWAIT_S if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                raise WaitTimeout(f"no result after {timeout_s:g} s: it is {found.state}. {found.note or ''}".rstrip())
            try:
                answer = self._transport.get(path, wait_s=max(1, min(_AWAIT_S, int(left_s))))
            except Unreachable:  # the server may be restarting; it keeps what was requested
                time.sleep(min(1.0, left_s))
            else:
                found = Validation.from_json(answer)
        return found

    def ready(self) -> tuple[bool, dict[str, dict[str, object]]]:
        """Whether the server is ready, and its checks by name.

        Raises:
            Unreachable: nothing answers.
        """
        status, body = self._transport.status_and_json("/readyz")
        checks = body.get("checks") if isinstance(body, dict) else None
        return status == 200, checks if isinstance(checks, dict) else {}

    def _version(self, version: Version | str) -> Version:
        if isinstance(version, Version):
            return version
        if isinstance(version, str):
            return self.version(*parse_target(version))
        raise UsageError(f"{version!r} is not a Version or RUN/AVERAGE[@REV]")

    def _full(self, run: str, average: str, rev: str) -> str:
        """The id that `rev` is the beginning of; any other `rev` as it is."""
        if not _SHORT_ID.fullmatch(rev):
            return rev
        found = [version.id for version in self.versions(run, average) if version.id.startswith(rev)]
        if len(found) > 1:
            raise UsageError(f"{rev!r} is the beginning of {len(found)} ids: {', '.join(found)}")
        return next(iter(found), rev)

    def _read(self, path: str, value_of: Callable[[Any], _Value]) -> _Value:
        return self._transport.read(self._transport.get(path), value_of)
