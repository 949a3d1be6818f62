"""`EmaCallback`: averages of a model that Hugging Face's Trainer trains, or a trainer of TRL.

from trainer_client.transformers import EmaCallback
trainer.add_callback(EmaCallback("tcp://127.0.0.1:5555", run="bert", averages=["raw", "ema:0.999"]))
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ema_proto.averages.rules import AverageSpec
from trainer_client.client import EmaClient
from trainer_client.errors import EmaClientError, PlanError, SettingsError
from trainer_client.lifecycle import State
from trainer_client.model.shards import holds_part
from trainer_client.pulling.average_reader import open_reader
from trainer_client.pulling.scores import ScoreReader, Scores
from trainer_client.settings import Settings, check_timeout

log = logging.getLogger("ema")

_STATE: Final = "ema_sidecar"  # the key in `stateful_callbacks` of trainer_state.json
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_.-]+")
_TRAINERS_OWN: Final = ("step", "rank")  # arguments of EmaClient that the Trainer decides
_REFUSED: Final = {
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.FSDP: "FSDP 1",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}


class EmaCallback(TrainerCallback):
    """Streams the model's weights to an EMA server after every optimizer step of a Trainer.

    The steps are the Trainer's: the averages of `checkpoint-500` are those of step 500. The run is joined when training
    begins, and finished when it ends. A training that is resumed from a checkpoint continues the run, and the averages
    go back to the checkpoint's step. A training that raises leaves the run open, to be resumed. A second `train()`
    without `resume_from_checkpoint` begins a new run; the earlier one is kept under a dated name.

    Only the process of rank 0 streams; with FSDP 2 every rank streams its shards, and the run needs a name. Add the
    callback on every rank.

    Args:
        endpoint: the server's address, `tcp://HOST:PORT`; default `EMA_ENDPOINT`.
        run: name of the run; default `EMA_RUN`, else one is generated, and a resumed training finds it in its
            checkpoint. In a hyperparameter search the trial's name is appended, if `hp_name` gives one.
        averages: as of `EmaClient`.
        url: the server's address for readers, `http://HOST:PORT`; default `EMA_URL`. If it is known, the scores of all
            averages are logged as `eval_AVERAGE_METRIC`, as soon as they are there.
        trainer: sends the scores to its trackers also; without it they are in `trainer.state.log_history` only.
        scores_timeout_s: how long the end of the training waits for the scores of its last step, in seconds.
        timeout_s: how long a checkpoint or the end of the training waits for the server, in seconds.
        arguments: other arguments of `EmaClient`. By default `config` is the model's, `files` are those of the
            processing class (tokenizer, processor) and the generation config, `samples_per_step` and `steps_per_epoch`
            are the Trainer's. A PEFT model, of which the adapter is streamed, has no `config`.

    Raises:
        SettingsError: an argument cannot be used.
        ConnectError: the server cannot be reached, speaks another version, or refuses the token.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        run: str | None = None,
        averages: Iterable[AverageSpec | str] | None = None,
        *,
        url: str | None = None,
        trainer: Trainer | None = None,
        scores_timeout_s: float = 0.0,
        timeout_s: float = 60.0,
        **arguments: Any,
    ) -> None:
        for name in _TRAINERS_OWN:
            if name in arguments:
                raise SettingsError(f"{name}={arguments[name]!r} is not for a callback: the Trainer decides it")
        self._arguments = arguments | {"endpoint": endpoint, "run": run}
        if averages is not None:
            self._arguments["averages"] = averages if isinstance(averages, str) else tuple(averages)
        self._trainer = trainer
        self._scores_timeout_s = check_timeout("scores_timeout_s", scores_timeout_s)
        self._timeout_s = check_timeout("timeout_s", timeout_s)
        self._url = url if url is not None else os.environ.get("EMA_URL") or None
        if self._url is not None:
            open_reader(self._url, arguments.get("token")).close()  # a mistake is reported before training
        # Connects now, so that a wrong address ends the script before it has loaded its data.
        self._client = _Client(**({"samples_per_step": 1.0, "steps_per_epoch": 1.0} | self._arguments))
        self._run = self._client.run
        self._run_generated = run is None and not os.environ.get("EMA_RUN")
        self._scores: ScoreReader | None = None
        self._trainings = 0

    @property
    def client(self) -> EmaClient:
        """The client of this training: that of the constructor, and another one for each further `train()`."""
        return self._client

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **others: Any,
    ) -> None:
        """Join the run.

        Raises:
            PlanError: the model cannot be streamed, or is sharded in another way than by FSDP 2.
            JoinError: the server refuses the run.
            SettingsError: the optimizer's steps cannot be followed, or an average lacks samples or epochs.
            ConnectError: the server cannot be reached.
            All of them for the first training only: a later one of this process is not stopped, but logged.
        """
        self._trainings += 1
        try:
            _refuse_sharded()
            found = _arguments_of(args, model, train_dataloader)
            with _saved(processing_class, getattr(model, "generation_config", None)) as folder:
                self._begin(args, state, model, optimizer, found | {"files": folder})
        except EmaClientError as error:
            self._client.close()
            if self._trainings == 1:
                raise
            log.error("ema: this training is not averaged: %s", error)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        **others: Any,
    ) -> None:
        """Count a step that was skipped, and send one that the optimizer's hooks have not seen."""
        step = state.global_step + 1  # the Trainer has not counted it yet
        if self._client.steps >= step or self._client.ended:
            return
        if getattr(optimizer, "step_was_skipped", False):
            self._client.skip(step - self._client.steps)
        else:
            self._client.update(model, step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Log new scores; finish the run when the Trainer logs its summary, before it loads the best model."""
        self._log_scores(args, state, control)
        if control.should_training_stop and "train_runtime" in (logs or ()):
            self._finish(args, state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Log new scores."""
        self._log_scores(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Publish averages that go with the Trainer's checkpoint."""
        if not self._client.ended:
            is_connected = self._client.stats().get("state") == "streaming"
            self._client.checkpoint(state.global_step, self._timeout_s if is_connected else 0.0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Finish the run."""
        self._finish(args, state, control)

    def _begin(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Any, found: dict[str, Any]
    ) -> None:
        """Join the run; `found` are arguments of the client that follow from the Trainer's."""
        self._stop_scores()
        run = self._run_of(state)
        if args.world_size > 1 and holds_part(model) and self._run_generated and run.startswith(self._run):
            raise SettingsError("the ranks of a sharded model must know the run: pass run=, or set EMA_RUN")
        arguments: dict[str, Any] = found | self._arguments | {"run": run, "rank": args.process_index}
        if state.global_step > 0:
            arguments["step"] = state.global_step
        if self._trainings == 1 and self._client.streams == state.is_world_process_zero:
            self._client.prepare(arguments)
        else:
            self._client.close()  # of a training that ended with an error, or made before the ranks were known
            self._client = _Client(**arguments)
        # A plain entry and not an `ExportableState`: with restore_callback_states_from_checkpoint the Trainer replaces
        # such a callback by a new object, which it makes of what is in the checkpoint. An object made of the arguments
        # there would connect to an old address, and one made of none would not know the script's.
        state.stateful_callbacks[_STATE] = {"run": self._client.run}
        self._client.attach(model, optimizer)
        if self._url is not None and state.is_world_process_zero:
            token = self._arguments.get("token")
            self._scores = ScoreReader(self._url, token, self._client.run, skip_known=state.global_step > 0)

    def _run_of(self, state: TrainerState) -> str:
        """The run's name: as given, else that of the checkpoint, else the generated one."""
        saved = state.stateful_callbacks.get(_STATE) if state.global_step else None
        run = saved["run"] if saved and self._run_generated else self._run
        if state.is_hyper_param_search and state.trial_name:
            return f"{run}-{_NOT_IN_NAMES.sub('-', state.trial_name)}".rstrip("-.")
        return run

    def _finish(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if self._client.ended:
            return
        self._client.finish(self._timeout_s)
        if self._scores is not None:
            self._scores.wait(self._client.stats()["last_published_step"], self._scores_timeout_s)
            self._log_scores(args, state, control)
            self._stop_scores()

    def _stop_scores(self) -> None:
        if self._scores is not None:
            self._scores.close()
        self._scores = None

    def _log_scores(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        by_step: dict[int, dict[str, float]] = {}
        for scores in [] if self._scores is None else self._scores.take():
            by_step.setdefault(scores.step, {}).update(_named(scores))
        for step, named in by_step.items():
            logs = named | {"eval_averages_step": step, "epoch": state.epoch}
            state.log_history.append({**logs, "step": state.global_step})
            if self._trainer is not None:
                # Not `Trainer.log`: those of TRL add the metrics of the step under way, and forget them.
                self._trainer.callback_handler.on_log(args, state, control, logs)


class _Client(EmaClient):
    """A client that connects before it knows what it is to join, and that can count steps without a snapshot."""

    @property
    def streams(self) -> bool:
        """Whether this process streams; a rank that holds shards does so from `attach` on."""
        return not self._is_other_rank

    @property
    def ended(self) -> bool:
        """Whether the client was closed or finished."""
        return self._state in (State.CLOSED, State.FINISHED)

    def prepare(self, arguments: Mapping[str, Any]) -> None:
        """Use other arguments, by their names, over the same connection; the others have the defaults of `EmaClient`.

        Raises:
            SettingsError: an argument cannot be used.
        """
        defaults = {name: each.default for name, each in inspect.signature(EmaClient).parameters.items()}
        settings = Settings.of(os.environ, {**defaults, **arguments})
        self._settings = settings.with_files() if self.streams else settings

    def skip(self, steps: int) -> None:
        """So many steps were taken that have not changed the weights."""
        self._count(steps)
        if (session := self._usable_session()) is not None:
            session.count(steps)


def _refuse_sharded() -> None:
    state = AcceleratorState()
    kind, plugin = state.distributed_type, getattr(state, "fsdp_plugin", None)
    if kind in _REFUSED and not (kind == DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) == 2):
        raise PlanError(
            f"{_REFUSED[kind]} distributes the weights of the model over the processes in a form that is not streamed: "
            "train with DDP or FSDP 2 (fsdp_version: 2), or average the saved checkpoints with `ema average`"
        )


@contextlib.contextmanager
def _saved(*parts: Any) -> Iterator[str]:
    """A folder with the files of these parts of a model, those that the Trainer saves beside its weights."""
    with tempfile.TemporaryDirectory(prefix="ema-") as folder:
        for part in parts:
            if hasattr(part, "save_pretrained"):
                _save(part, folder)
        yield folder


def _save(part: Any, folder: str) -> None:
    try:
        part.save_pretrained(folder)
    # Whatever a class of the user's raises there, averages without these files are better than no training.
    except Exception as error:  # noqa: BLE001
        log.warning("ema: the averages are without the files of %s: %r", type(part).__name__, error)


def _arguments_of(args: TrainingArguments, model: nn.Module, loader: Any) -> dict[str, Any]:
    """Arguments of `EmaClient` that follow from the Trainer's."""
    samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    found: dict[str, Any] = {"samples_per_step": samples}
    with contextlib.suppress(TypeError):  # an iterable dataset has no length
        found["steps_per_epoch"] = math.ceil(len(loader) / args.gradient_accumulation_steps)
    if isinstance(model, PreTrainedModel) and not hasattr(model, "peft_config"):  # PEFT saves an adapter without it
        architecture = type(model).__name__.removeprefix("FSDP")  # FSDP 2 makes a class of its own
        saved = {"architectures": [architecture], "dtype": str(model.dtype).removeprefix("torch.")}
        found["config"] = json.loads(model.config.to_json_string()) | saved
    return found


def _named(scores: Scores) -> dict[str, float]:
    return {f"eval_{scores.average}_{metric}": value for metric, value in scores.metrics.items()}
