"""What takes a new version: an inference engine that loads weights while it serves, or a command.

Each target gets the folder of the version, the link that leads to it, and the version's id as its label.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ema_reader.errors import ReaderError, Unreachable, UsageError
from ema_reader.transport import Transport
from ema_reader.values import Version

LOAD_S = 1800.0  # for an engine to finish its requests and read the weights
_TEXT_CHARS = 500
_TRY_LATER = frozenset({408, 429})


class DeliveryFailed(ReaderError):
    """A target has not taken a version, and would not if it were asked again."""


class Target(Protocol):
    """Takes versions."""

    name: str

    def take(self, version: Version, folder: Path, link: Path) -> None:
        """Load a version; returns when that is done.

        Raises:
            Unreachable: the target does not answer, or fails in a way that may pass.
            DeliveryFailed: it refuses the version.
        """


class SGLang:
    """`POST /update_weights_from_disk` of SGLang, for language and diffusion models.

    The engine finishes running requests first, and answers when it serves the new weights.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self.name = f"SGLang at {url}"
        self._engine = _Engine(self.name, url, token)

    def take(self, version: Version, folder: Path, link: Path) -> None:
        body = {"model_path": str(folder), "weight_version": version.id}
        answer = self._engine.post("/update_weights_from_disk", body)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise DeliveryFailed(f"{self.name} has not loaded the weights: {answer.get('message')}")


class VLLM:
    """The development endpoints of vLLM (`VLLM_SERVER_DEV_MODE=1`), started with the link as its model.

    Running requests are finished, the workers read the weights of the model again, and requests continue.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self.name = f"vLLM at {url}"
        self._engine = _Engine(self.name, url, token)

    def take(self, version: Version, folder: Path, link: Path) -> None:
        self._engine.post("/pause?mode=wait", {})
        try:
            self._engine.post("/collective_rpc", {"method": "reload_weights", "timeout": LOAD_S})
            # Older releases have no label for weights: the version is loaded all the same.
            self._engine.post("/update_weight_version", {"new_version": version.id}, optional=True)
        finally:
            self._engine.post("/resume", {})


class Command:
    """A command, run to its end, with `{path}`, `{link}`, `{step}`, `{version}`, `{run}` and `{average}` replaced.

    No shell is involved.

    Raises:
        UsageError: the text has no words, or an open quote.
    """

    def __init__(self, text: str) -> None:
        try:
            self._words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"--cmd {text!r} cannot be split into words: {error}") from None
        if not self._words:
            raise UsageError("--cmd is empty: give a command, for example 'python eval.py {path} {step}'")
        self.name = f"command {self._words[0]}"

    def take(self, version: Version, folder: Path, link: Path) -> None:
        values = {
            "{path}": str(folder),
            "{link}": str(link),
            "{step}": str(version.step),
            "{version}": version.id,
            "{run}": version.run,
            "{average}": version.average,
        }
        command = [_replaced(word, values) for word in self._words]
        try:
            code = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode
        except OSError as error:
            raise DeliveryFailed(f"{self.name} cannot be started: {error.strerror or error}") from None
        if code:
            raise DeliveryFailed(f"{self.name} ended with exit code {code}")


ENGINES: Mapping[str, type[SGLang] | type[VLLM]] = {"sglang": SGLang, "vllm": VLLM}


def parse_engine(text: str, token: str | None) -> Target:
    """The engine that `sglang=URL` or `vllm=URL` names; `token` is the engine's key.

    Raises:
        UsageError: it is written in another way.
    """
    kind, equals, url = text.partition("=")
    if kind not in ENGINES or not equals:
        raise UsageError(f"--post {text!r} is not sglang=URL or vllm=URL, for example sglang=http://127.0.0.1:30000")
    return ENGINES[kind](url, token)


def _replaced(word: str, values: Mapping[str, str]) -> str:
    for mark, value in values.items():
        word = word.replace(mark, value)
    return word


class _Engine:
    def __init__(self, name: str, url: str, token: str | None) -> None:
        self._name = name
        self._transport = Transport(url, token)

    def post(self, path: str, body: Mapping[str, object], *, optional: bool = False) -> Any:
        """The decoded answer, None if it is not JSON. With `optional` an engine may lack the address."""
        status, text = self._transport.exchange(path, body, answer_s=LOAD_S)
        shown = " ".join(text.split())[:_TEXT_CHARS]
        if status >= 500 or status in _TRY_LATER:
            raise Unreachable(f"{self._name} answers {status} to {path}: {shown}")
        if status >= 400 and not (optional and status == 404):
            raise DeliveryFailed(f"{self._name} answers {status} to {path}: {shown}")
        try:
            return json.loads(text)
        except ValueError:
            return None
