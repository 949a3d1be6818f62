"""`Pull`: the newest version of an average in a module of the trainer, again and again."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trainer_client.counters import Counters
from trainer_client.lifecycle import Lifecycle, State
from trainer_client.model.adapters import adapter_names
from trainer_client.pulling.average_reader import AverageReader
from trainer_client.pulling.fetch import Fetch
from trainer_client.pulling.tensors import check_fit, copy_into, renamed, shown, tensors_of
from trainer_client.settings import check_timeout

log = logging.getLogger("ema")


class Pull:
    """Copies versions of one average into a module, in place; returned by `EmaClient.pull`.

    All methods are called by the thread that trains. In a forked child they do nothing.

    Attributes:
        step: that of the weights which the module holds; None before the first copy.
        version: the id of that version, 40 hex digits; None before the first copy.
    """

    def __init__(
        self,
        module: nn.Module,
        average: str,
        every: int,
        *,
        reader: AverageReader,
        steps: Callable[[], int],
        due_until: Callable[[int], int],
        publish: Callable[[], None],
        counters: Counters,
    ) -> None:
        self.step: int | None = None
        self.version: str | None = None
        self._module: nn.Module | None = module  # None once removed
        self._average = average
        self._every = every
        self._steps = steps
        self._due_until = due_until
        self._publish = publish
        self._counters = counters
        self._copied = 0
        self._last_step: int | None = None
        self._life = Lifecycle()
        self._names = names = adapter_names(module)
        shapes = {name: tensor.shape for name, tensor in tensors_of(module).items()}
        is_checked = False

        def check(weights: dict[str, Tensor]) -> None:
            nonlocal is_checked
            missing = check_fit(renamed(weights, names), shapes)
            if missing and not is_checked and not names.keys() >= weights.keys():
                text = "ema: average %s has no %s: the module keeps its own values of these"
                log.warning(text, average, shown(missing))
            is_checked = True

        self._fetch = Fetch(reader, average, check)
        weakref.finalize(self, self._fetch.stop).atexit = False

    @property
    def error(self) -> str | None:
        """Why there is no newer version: what went wrong last. None while all is well."""
        return self._fetch.problem

    def refresh(self) -> bool:
        """Copy the version that is ready, if any, into the module now; whether one was. Does not wait for one."""
        if self._life.ended():
            return False
        with self._counters:
            return self._copy()

    def wait(self, timeout_s: float = 60.0) -> bool:
        """Wait for a version newer than the module's and copy it; False if there is none in time.

        On rank 0 the server is asked to publish the step that the trainer is at. For scripts and tests: this is the one
        method that waits.
        """
        timeout_s = check_timeout("timeout_s", timeout_s)
        if self._life.ended():
            return False
        self._want(self._steps())
        return self._fetch.wait(timeout_s) and self.refresh()

    def remove(self) -> None:
        """Stop pulling. The module keeps the weights that it has; calling it again changes nothing."""
        if not self._life.ended():
            self._life.state = State.CLOSED
            self._fetch.stop()
            self._module = None

    def after_step(self, step: int) -> None:
        """The trainer has taken `step` steps, and the snapshot of the last one was taken: if it is due, go on."""
        if step % self._every or step == self._last_step or self._life.ended():
            return
        self._last_step = step
        with self._counters:
            self._copy()
            self._want(step)

    def to_json(self) -> dict[str, Any]:
        """Its part of `stats()`."""
        own = {"average": self._average, "step": self.step, "version": self.version}
        return own | {"copied": self._copied, "error": self.error}

    def _want(self, step: int) -> None:
        if self._fetch.want(goal=self._due_until(step), until=step):
            self._publish()

    def _copy(self) -> bool:
        fetched = self._fetch.take()
        if fetched is None or self._module is None:
            return False
        try:
            copy_into(self._module, renamed(fetched.weights, self._names))
        # The module has changed, or its device failed. Training goes on with what it holds.
        except Exception as error:  # noqa: BLE001
            self._fetch.fail(str(error) or repr(error))
            return False
        self.step, self.version, self._copied = fetched.step, fetched.id, self._copied + 1
        return True


class Pulls:
    """The pulls of one client.

    Attributes:
        counters: how long the training loop was in their code.
    """

    def __init__(self) -> None:
        self.counters = Counters()
        self._pulls: list[Pull] = []

    def add(self, pull: Pull) -> None:
        """Have it called after steps."""
        self._pulls.append(pull)

    def after_step(self, step: int) -> None:
        """See `Pull`."""
        for pull in self._pulls:
            pull.after_step(step)

    def close(self) -> None:
        """Remove all of them."""
        for pull in self._pulls:
            pull.remove()

    def to_json(self) -> list[dict[str, Any]]:
        """Those that were made, in order."""
        return [pull.to_json() for pull in self._pulls]
