"""Reads averages and their scores from the server over HTTP, and reports scores to it.

`ema_reader` is imported when it is first needed: a trainer that only streams does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from trainer_client.errors import AverageError
from trainer_client.pulling.average_reader import open_reader

_TASK: Final = "lightning"  # apart from those of evaluation workers, so that these evaluate the same versions


class Server:
    """One run of one server, connected for each use: hours may pass between two.

    The defaults of `url` and `token` are those of `Reader`.

    Raises:
        SettingsError: the address cannot be used, or the reader's packages are missing.
    """

    def __init__(self, url: str | None, token: str | None, run: str) -> None:
        self._url, self._token, self._run = url, token, run
        with open_reader(self._url, self._token) as reader:
            self._url = reader.url

    def newest_scores(self, until: int) -> dict[str, float]:
        """The newest value of each metric of each average, as `AVERAGE/METRIC`, and its step as `AVERAGE/step`.

        What `report` has reported is left out.

        Args:
            until: a later step's scores are left out: the trainer has gone back since then.

        Raises:
            AverageError: the request fails.
        """
        from ema_reader import NotFound, ReaderError
        from ema_reader.scores import scores_of

        try:
            with open_reader(self._url, self._token) as reader:
                rows = reader.metrics(self._run)
        except NotFound:
            return {}
        except ReaderError as error:
            raise AverageError(f"run {self._run}: no scores from {self._url}: {error}") from error
        found: dict[str, float] = {}
        for score in scores_of(row for row in rows if row.step <= until and row.task != _TASK):  # by step
            found |= {f"{score.average}/{name}": value for name, value in score.metrics.items()}
            if score.metrics:
                found[f"{score.average}/step"] = float(score.step)
        return found

    def newest(self, average: str) -> tuple[str, dict[str, Tensor]]:
        """The newest published version of an average, as `RUN/AVERAGE@ID`, and its weights by name.

        Raises:
            AverageError: there is none, or it cannot be read.
        """
        from ema_reader import ReaderError

        try:
            with open_reader(self._url, self._token) as reader:
                version = reader.version(self._run, average)
                return f"{self._run}/{average}@{version.id}", reader.load(version)
        except ReaderError as error:
            raise AverageError(f"run {self._run}: cannot get {average} from {self._url}: {error}") from error

    def report(self, version: str, metrics: Mapping[str, float]) -> None:
        """Report the metrics of a version, which is given as `newest` returns it.

        Raises:
            AverageError: the server does not accept them.
        """
        from ema_reader import ReaderError

        try:
            with open_reader(self._url, self._token) as reader:
                reader.report(version, metrics, task=_TASK)
        except ReaderError as error:
            raise AverageError(f"run {self._run}: cannot report metrics to {self._url}: {error}") from error
