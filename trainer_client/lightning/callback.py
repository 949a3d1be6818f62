"""`EmaCallback`: streams a LightningModule to the server, and brings scores and averages back to the Trainer."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from ema_proto.averages.rules import AverageSpec
from trainer_client.client import EmaClient
from trainer_client.errors import AverageError, EmaClientError, SettingsError
from trainer_client.lightning.base import callback_class
from trainer_client.lightning.server import Server
from trainer_client.lightning.settings import decay_of, rules_of
from trainer_client.lightning.validation import Validation
from trainer_client.settings import check_step, check_timeout
from trainer_client.steps.optimizers import trains

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = callback_class()

log = logging.getLogger("ema")

_REFUSED: Final = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy", "XLAStrategy")
_SHARDED: Final = "ModelParallelStrategy"  # FSDP2 and tensor parallelism: every rank streams its shards
_AWAY_TIMEOUT_S: Final = 5.0  # how long to wait for a server that does not answer now
_WORST: Final = 1e30  # finite also where the ranks' values are added up


class EmaCallback(Callback):
    """A callback of Lightning's Trainer: the server keeps averages of the LightningModule that is trained.

    A snapshot is sent after each real step of the optimizer. The trained weights are never written.

    Args:
        endpoint: as of `EmaClient`.
        run: as of `EmaClient`.
        averages: as of `EmaClient`; or give `decay`.
        decay: for one average, named `ema`, like that of Lightning's `EMAWeightAveraging(decay=…)`, beside `raw`.
        update_every_n_steps: send every so many steps. `decay` is that of such an update.
        update_starting_at_step: with `decay`: the average is a copy of the weights for so many steps.
        update_starting_at_epoch: with `decay`: for so many epochs.
        use_buffers: with `decay`: average buffers as well; else they are copied.
        module: name of the sub-module to average, `"net"` for `self.net`. Names of tensors are then those of the bare
            network. Default: the whole LightningModule.
        validate: names of averages that are validated on the Trainer's validation batches, by a copy of the
            LightningModule. What `validation_step` logs as `val_acc` is `AVERAGE/val_acc` for them. Each validation
            publishes a version and waits for it.
        scores: at the end of each validation, log the newest scores that evaluation workers reported as
            `AVERAGE/METRIC`, and the step that they belong to as `AVERAGE/step`.
        url: the server's address for readers; default `EMA_URL`, else `http://127.0.0.1:8080`.
        publish_timeout_s: how long to wait until averages are published: those that are about to be validated, those
            that go with a checkpoint, and the last ones. While the server is away, the first two wait 5 s at most.
        client: further arguments of `EmaClient`, such as `token`, `config`, `include`, `when_behind`, `resume`.

    Raises:
        SettingsError: an argument cannot be used.

    Under `ModelParallelStrategy` (FSDP2, tensor parallelism) each rank streams its shards; `run` is required.

    `trainer.fit` raises, before the first step: `SettingsError` for a strategy whose shards cannot be streamed,
    `ConnectError` if the server cannot be reached, `JoinError` if it refuses the run, and `PlanError` if the model
    cannot be streamed.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        run: str | None = None,
        averages: Iterable[AverageSpec | str] | str | None = None,
        *,
        decay: float | None = None,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        use_buffers: bool = True,
        module: str | None = None,
        validate: Iterable[str] | str = (),
        scores: bool = True,
        url: str | None = None,
        publish_timeout_s: float = 60.0,
        **client: Any,
    ) -> None:
        super().__init__()
        if "every" in client:
            raise TypeError("EmaCallback() got an unexpected keyword argument 'every': use update_every_n_steps")
        if averages is not None and decay is not None:
            raise SettingsError("give averages or decay, not both")
        every = check_step("update_every_n_steps", update_every_n_steps, 1)
        self._decay = decay_of(decay, every, update_starting_at_step, update_starting_at_epoch, use_buffers=use_buffers)
        self._arguments: dict[str, Any] = {"endpoint": endpoint, "run": run, "every": every} | client
        if self._decay is not None:
            self._arguments["averages"] = self._decay.rules(1)
        elif averages is not None:
            self._arguments["averages"] = averages if isinstance(averages, str) else tuple(averages)
        self._rules = rules_of(self._arguments)
        self._names = [rule.name for rule in self._rules]
        self._validated = (validate,) if isinstance(validate, str) else tuple(validate)
        for name in self._validated:
            if name not in self._names:
                raise SettingsError(f"validate={name!r} is no average of this run: use {', '.join(self._names)}")
        self._path = module
        self._scores, self._url = bool(scores), url
        self._timeout_s = check_timeout("publish_timeout_s", publish_timeout_s)
        self._validation = Validation(self._validated, module or "") if self._validated else None
        self._stage: str | None = None
        self._fitted: weakref.ref[Any] | None = None
        self._state: dict[str, Any] | None = None  # as of the checkpoint that is loaded, or of the last fit's end
        self._client: EmaClient | None = None
        self._server: Server | None = None
        self._checkpointed = 0
        self._logged: set[str] = set()
        self._is_unreachable = False

    @property
    def run(self) -> str | None:
        """The run's name while `trainer.fit` runs; afterwards that of the last one."""
        return self._client.run if self._client is not None else (self._state or {}).get("run")

    @property
    def state_key(self) -> str:
        """Tells the callbacks of two modules of one trainer apart in a checkpoint."""
        key: str = self._generate_state_key(module=self._path)
        return key

    def state_dict(self) -> dict[str, Any]:
        """The client's state: the run's name and the steps taken."""
        return dict(self._state or {}) if self._client is None else self._client.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the run where the checkpoint was saved, once the training starts."""
        if self._stage == "fit":
            self._state = dict(state_dict)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies whose shards cannot be streamed."""
        self._stage = stage
        if stage != "fit":
            return
        self._check_strategy(trainer.strategy)
        if self._fitted is None or self._fitted() is not trainer:
            self._state = None
        self._fitted = weakref.ref(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Connect to the server."""
        _on_all_ranks(trainer, lambda: self._connect(trainer))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Join the run, and follow the optimizers from here on."""
        client = self._client
        if client is not None:
            _on_all_ranks(trainer, lambda: self._join(client, trainer, pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Publish the last step, and mark the run as finished."""
        if self._client is not None:
            self._client.finish(self._timeout_s)
            self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the run open on the server, to be continued from a checkpoint."""
        if self._client is None:
            return
        if self._client.steps > 0 and any(map(_saves_on_exception, trainer.callbacks)):
            self._publish(self._client)  # theirs is saved after this
        self._client.close()
        self._leave()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the run open if no step was to be taken."""
        if stage == "fit" and self._client is not None:
            self._client.close()
            self._leave()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Have the server keep the averages of the step that the checkpoint is of."""
        if self._client is not None:
            self._publish(self._client)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Let no snapshot be torn by those who swap weights for a validation, through `.data`.

        The last step is sent if it was skipped: the averages that are validated, and those of a checkpoint that is
        saved after the validation, include it.
        """
        if self._client is not None:
            self._client.before_weight_write(self._patience_s(self._client))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to validate averages, beside the trained weights."""
        if self._client is not None and self._validation is not None and not trainer.sanity_checking:
            # Not kept, unlike those of checkpoints: of these, the server keeps the newest ten.
            self._client.flush(self._patience_s(self._client), durable=True)
            self._validation.begin(trainer, pl_module, self._client.steps, self._server)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *batch: Any) -> None:
        """Validate averages on the batch that the trained weights were validated on."""
        if self._validation is not None:
            self._validation.step(*batch)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what the averages' validation and the evaluation workers have found."""
        if self._validation is not None:
            self._validation.end_epoch()
        if not trainer.sanity_checking:
            self._log_scores(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the scores of the averages to the server."""
        if self._validation is not None:
            self._validation.end(trainer, self._server)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the scores here if the training has no validation."""
        if not trainer.enable_validation:
            self._log_scores(trainer, pl_module)

    def _check_strategy(self, strategy: object) -> None:
        name, bases = type(strategy).__name__, {base.__name__ for base in type(strategy).__mro__}
        if not bases.isdisjoint(_REFUSED):
            raise SettingsError(
                f"EmaCallback cannot be used with {name}: its shards cannot be streamed; use ModelParallelStrategy "
                '(FSDP2), strategy="ddp", or one device'
            )
        if _SHARDED in bases and self._validated:
            raise SettingsError(
                f"validate= cannot be used with {name}: no rank holds a whole copy of the model; validate the "
                "averages in an evaluation worker, whose scores are logged here"
            )

    def _connect(self, trainer: Any) -> None:
        arguments = dict(self._arguments)
        if self._needs_epochs and arguments.get("steps_per_epoch") is None:
            arguments["steps_per_epoch"] = _steps_per_epoch(trainer)
        if self._decay is not None:
            arguments["averages"] = self._decay.rules(arguments.get("steps_per_epoch"))
        client = EmaClient(**({"rank": trainer.global_rank} | arguments))
        if trainer.fast_dev_run:
            client.close()
            log.info("ema: fast_dev_run: the server answers, and nothing is sent to run %s", client.run)
            return
        self._client = client
        self._checkpointed = 0
        self._logged.clear()  # as the Trainer's metrics are

    def _join(self, client: EmaClient, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step > 0:
            steps = trainer.global_step // max(len(trainer.optimizers), 1)  # it counts those of all optimizers
            client.load_state_dict(self._state or {"run": client.run, "step": steps})
        self._state = None
        model = self._averaged(pl_module)
        own = [optimizer for optimizer in trainer.optimizers if trains(optimizer, model)]
        client.attach(model, own or trainer.optimizers)
        if trainer.is_global_zero and (self._scores or self._validated):
            self._server = self._open_server(client)

    @property
    def _needs_epochs(self) -> bool:
        in_epochs = any(getattr(rule, "half_life_epochs", None) is not None for rule in self._rules)
        return in_epochs or (self._decay is not None and self._decay.after_epoch is not None)

    def _averaged(self, pl_module: nn.Module) -> nn.Module:
        try:
            return pl_module.get_submodule(self._path) if self._path else pl_module
        except AttributeError as error:
            owner = type(pl_module).__name__
            raise SettingsError(f"module={self._path!r} is no sub-module of {owner}: {error}") from None

    def _open_server(self, client: EmaClient) -> Server | None:
        try:
            return Server(self._url, self._arguments.get("token"), client.run)
        except SettingsError as error:
            if self._validation is not None or self._url is not None:
                raise
            log.info("ema: scores are not logged: %s", error)
            return None

    def _publish(self, client: EmaClient) -> None:
        """Publish the averages of this step, and have them kept; once, though there may be several checkpoints."""
        if client.steps not in (0, self._checkpointed):
            self._checkpointed = client.steps
            client.checkpoint(client.steps, self._patience_s(client))

    def _patience_s(self, client: EmaClient) -> float:
        is_away = client.stats().get("state", "streaming") != "streaming"  # ranks that do not stream have no connection
        return min(self._timeout_s, _AWAY_TIMEOUT_S) if is_away else self._timeout_s

    def _leave(self) -> None:
        """Forget the client, which has ended, except for its state."""
        if self._client is not None:
            self._state, self._client, self._server = self._client.state_dict(), None, None
        if self._validation is not None:
            self._validation.forget()

    def _log_scores(self, trainer: Any, pl_module: Any) -> None:
        client = self._client
        if client is None or trainer.barebones:
            return
        scores = trainer.strategy.broadcast(self._newest_scores(client))
        # The same on all ranks; Lightning warns about what is not synchronised.
        log_one = partial(pl_module.log, on_step=False, on_epoch=True, sync_dist=True, add_dataloader_idx=False)
        for name, value in scores.items():
            log_one(name, value)
        self._logged |= scores.keys()
        for name, worst in self._monitored(trainer).items():
            is_validated = self._validation is not None and self._validation.has_logged(name)
            if name not in self._logged and not is_validated:
                log_one(name, worst, logger=False)

    def _newest_scores(self, client: EmaClient) -> dict[str, float]:
        if self._server is None or not self._scores:
            return {}
        try:
            return self._server.newest_scores(client.steps)
        except AverageError as error:
            log.log(logging.DEBUG if self._is_unreachable else logging.WARNING, "ema: %s", error)
            self._is_unreachable = True
            return {}

    def _monitored(self, trainer: Any) -> dict[str, float]:
        """The worst value of each score that a callback of the trainer monitors.

        Before the first score arrives it stands in: the Trainer ends where a monitored metric is missing or not finite.
        """
        found = {}
        for callback in trainer.callbacks:
            name = getattr(callback, "monitor", None) or ""
            average, _, metric = name.partition("/")
            if metric and average in self._names:
                found[name] = _WORST if getattr(callback, "mode", "min") == "min" else -_WORST
        return found


def _on_all_ranks(trainer: Any, action: Callable[[], None]) -> None:
    """Call `action`, which fails on rank 0 alone; then it fails on all ranks: they would wait for that one."""
    own: EmaClientError | None = None
    try:
        action()
    except EmaClientError as error:
        own = error
    first = trainer.strategy.broadcast(None if own is None else str(own))
    if own is not None:
        raise own
    if first is not None:
        raise EmaClientError(f"rank 0 has failed: {first}")


def _saves_on_exception(callback: Any) -> bool:
    return getattr(callback, "save_on_exception", False) or type(callback).__name__ == "OnExceptionCheckpoint"


def _steps_per_epoch(trainer: Any) -> float | None:
    """Optimizer steps of an epoch; None if the dataloader has no length."""
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    return None if math.isinf(batches) else float(math.ceil(batches / trainer.accumulate_grad_batches))
