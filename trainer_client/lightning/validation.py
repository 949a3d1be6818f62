"""Validates averages on the batches of the Trainer's own validation, without writing the trained weights.

A copy of the LightningModule is filled with an average. Each batch that the trained module has validated is given to
the copy's hooks too, and what the copy logs is logged by the trained module under `AVERAGE/NAME`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch.distributed
from torch import Tensor

from trainer_client.errors import AverageError
from trainer_client.lightning.base import isolated_rng, takes_batch_idx
from trainer_client.lightning.server import Server
from trainer_client.model.adapters import adapter_names
from trainer_client.pulling.module_copy import ModuleCopy
from trainer_client.pulling.tensors import copy_into, renamed

log = logging.getLogger("ema")

# What Lightning and torch set on a compiled LightningModule, bound to the trained module.
_COMPILED: Final = (
    *("forward", "training_step", "validation_step", "test_step", "predict_step"),
    "_compiled_call_impl",
)


class Validation:
    """Validates averages beside the trained module.

    Nothing here raises: what cannot be validated is logged, and left out.

    Args:
        averages: names of the averages.
        path: name of the sub-module that is averaged; empty for the whole LightningModule.

    Attributes:
        logged: the names of all that the copies have logged.
    """

    def __init__(self, averages: Sequence[str], path: str) -> None:
        self._averages, self._path = averages, path
        self._copies: dict[str, AverageCopy] = {}
        self._versions: dict[str, str] = {}
        self._is_running = False
        self.logged: set[str] = set()

    def begin(self, trainer: Any, pl_module: Any, steps: int, server: Server | None) -> None:
        """Fetch the newest averages after `steps` steps, and run the hooks with which a validation begins.

        Called on all ranks; only rank 0 has the server.
        """
        fetched: dict[str, Mapping[str, Tensor]] = {}
        try:
            if server is not None:
                fetched = self._fetch(server)
            self._fill(trainer, pl_module, fetched)
        except Exception as error:  # noqa: BLE001  no reason to end a training
            log.error("ema: the averages are not validated at step %d: %s", steps, error)
            fetched = {}
        self._is_running = trainer.strategy.broadcast(bool(fetched))
        if self._is_running and trainer.world_size > 1:
            for copy in self._copies.values():
                copy.receive()
        self._run("on_validation_start")
        self._run("on_validation_epoch_start")

    def step(self, *batch: Any) -> None:
        """Validate a batch: the batch, its index, and if there are several dataloaders, the index of its dataloader."""
        if self._is_running:
            self._run("on_validation_batch_start", *batch)
            outputs = self._run("validation_step", *batch)
            self._run("on_validation_batch_end", *batch, after=outputs)

    def end_epoch(self) -> None:
        """Run the hook in which results of all batches are logged."""
        self._run("on_validation_epoch_end")

    def end(self, trainer: Any, server: Server | None) -> None:
        """Report what was logged to the server, and free the device."""
        self._run("on_validation_end")
        for copy in self._copies.values():
            copy.put_away()
        was_running, self._is_running = self._is_running, False
        if server is not None and was_running:
            try:
                self._report(trainer.callback_metrics, server)
            except AverageError as error:
                log.warning("ema: %s", error)

    def forget(self) -> None:
        """Free the copies, which belong to one training."""
        self._is_running = False
        self._copies.clear()
        self.logged.clear()

    def has_logged(self, name: str) -> bool:
        """Whether a copy has logged what Lightning shows under this name."""
        logged = name.partition("/dataloader_idx_")[0]  # added if there are several dataloaders
        # The others are added to what is logged in each step and in each epoch.
        return not self.logged.isdisjoint((logged, logged.removesuffix("_step"), logged.removesuffix("_epoch")))

    def _report(self, metrics: Mapping[str, Tensor], server: Server) -> None:
        shown = {name: float(value) for name, value in metrics.items() if self.has_logged(name)}
        for average, version in self._versions.items():
            prefix = f"{average}/"
            own = {name.removeprefix(prefix): value for name, value in shown.items() if name.startswith(prefix)}
            if own:
                server.report(version, own)

    def _fetch(self, server: Server) -> dict[str, Mapping[str, Tensor]]:
        """The newest averages."""
        newest = {average: server.newest(average) for average in self._averages}
        self._versions = {average: version for average, (version, _) in newest.items()}
        return {average: weights for average, (_, weights) in newest.items()}

    def _fill(self, trainer: Any, pl_module: Any, fetched: Mapping[str, Mapping[str, Tensor]]) -> None:
        if not self._copies:
            self._copies = {
                name: AverageCopy(name, trainer, pl_module, self._path, self.logged) for name in self._averages
            }
        for average, weights in fetched.items():
            self._copies[average].fill(weights)

    def _run(self, hook: str, *args: Any, after: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run a hook of each copy, with what the copy returned before as its first argument; what each returns."""
        returned: dict[str, Any] = {}
        for average, copy in self._copies.items() if self._is_running else ():
            outputs = () if after is None else (after[average],)
            try:
                returned[average] = copy.run(hook, *outputs, *args)
            except Exception as error:
                self._is_running = False
                log.exception("ema: %s of the copy with average %s failed: %r", hook, average, error)
                return {}
        return returned


class AverageCopy:
    """A copy of a LightningModule that holds an average while the Trainer validates.

    Between two validations it is on the CPU.

    Args:
        average: name of the average.
        trainer: validates.
        pl_module: is trained.
        path: as of `Validation`.
        logged: receives the names of what is logged.
    """

    def __init__(self, average: str, trainer: Any, pl_module: Any, path: str, logged: set[str]) -> None:
        self.average, self._logged = average, logged
        self._trainer, self._pl_module, self._path = trainer, pl_module, path
        self._copy = _copy_of(pl_module)
        self._module: Any = self._copy.module
        vars(self._module)["log"] = self._log

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of the average, and from the trained module all that is not in it.

        Raises:
            PlanError: a tensor of the average is not in the module, or has another shape.
        """
        self._copy.take(self._pl_module)
        averaged = self._module.get_submodule(self._path)
        copy_into(averaged, renamed(weights, adapter_names(averaged)))

    def receive(self) -> None:
        """Have every rank's copy be that of rank 0."""
        shown = self._copy.shown()
        for tensor in shown.state_dict().values():
            torch.distributed.broadcast(tensor, 0)

    def run(self, hook: str, *args: Any) -> Any:
        """Run a hook of the copy, as the Trainer runs it for the trained module; what it returns."""
        self._copy.shown()
        self._module.trainer = self._trainer
        function = getattr(self._module, hook)
        if hook == "validation_step" and not takes_batch_idx(function):
            args = (args[0], *args[2:])
        with isolated_rng(), self._trainer.precision_plugin.val_step_context(), self._as_within(hook):
            return function(*args)

    def put_away(self) -> None:
        """Free the device."""
        self._copy.put_away()

    def _log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        name = f"{self.average}/{name}"
        # Lightning looks for a logged torchmetrics.Metric among those of the trained module, unless it has a name.
        kwargs.setdefault("metric_attribute", name)
        self._logged.add(name)
        self._pl_module.log(name, value, *args, **kwargs)

    @contextmanager
    def _as_within(self, hook: str) -> Iterator[None]:
        """Have the trained module log as it does in that hook: what may be logged, and when it is reset."""
        module = self._pl_module
        before, module._current_fx_name = module._current_fx_name, hook
        try:
            yield
        finally:
            module._current_fx_name = before


def _copy_of(pl_module: Any) -> ModuleCopy:
    device, context = pl_module.device, pl_module._compiler_ctx
    pl_module._compiler_ctx = None  # a compiler cannot be copied
    try:
        copy = ModuleCopy(pl_module, device)
    finally:
        pl_module._compiler_ctx = context
    for name in _COMPILED:
        vars(copy.module).pop(name, None)
    return copy
