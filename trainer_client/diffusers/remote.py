"""`RemoteEMAModel`: the methods of diffusers' `EMAModel`, with the average kept by a server.

The server computes the average; its weights are fetched when they are copied, saved or read.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from trainer_client.diffusers.naming import Naming, check_fit, config_of, parameter_names, template_of, with_weights
from trainer_client.diffusers.schedule import STATE_KEYS, Schedule
from trainer_client.errors import AverageError, SettingsError
from trainer_client.pulling.average_reader import AverageReader
from trainer_client.ranks import rank_of
from trainer_client.remote_client import RemoteClient
from trainer_client.settings import check_step, check_timeout

log = logging.getLogger("ema")

_CPU = torch.device("cpu")
_SHADOW = "shadow_params"
_DEPRECATED = {"max_value": "decay", "min_value": "min_decay", "device": None}
_PASSED_ON = ("resume", "config", "files", "checksum", "connect_timeout_s", "wait_timeout_s", "incarnation")


class RemoteEMAModel:
    """Takes the place of diffusers' `EMAModel`; the average is out of process.

    Args:
        parameters: the parameters to average, `model.parameters()`. Their names are those of `model`, else of the
            module whose `parameters()` was called, else of `model_cls` with `model_config`, else numbers.
        decay: as of `EMAModel`, like the next five; 0 to below 1.
        min_decay: without `use_ema_warmup` it is 0 or at least `decay`, which makes the decay constant.
        update_after_step: 0 or more.
        use_ema_warmup: as of `EMAModel`.
        inv_gamma: as of `EMAModel`.
        power: as of `EMAModel`.
        foreach: without effect.
        model_cls: the model's class, for `save_pretrained`.
        model_config: its configuration, for `save_pretrained`.
        model: the model, if `parameters` is a list.
        endpoint: the server's address for trainers; default `EMA_ENDPOINT`.
        url: its address for readers; default `EMA_URL`.
        run: name of the run; default `EMA_RUN`, else generated.
        name: name of the average.
        token: shared secret; default `EMA_TOKEN`.
        rank: only rank 0 streams; default: torch.distributed's, else the launcher's `RANK`, else 0.
        copy_timeout_s: how long reading the average waits for the server.
        connect: whether to connect now, or at the first step.
        more: `resume`, `config`, `files`, `connect_timeout_s`, `wait_timeout_s`, `checksum` and `incarnation` of
            `EmaClient` (`config` is the model's own by default, if it is a model of diffusers); and the deprecated
            arguments of `EMAModel`: `max_value`, `min_value`, and `device`, which is without effect.

    Raises:
        SettingsError: an argument cannot be used.
        ConnectError: the server cannot be reached.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,
        model_cls: Any | None = None,
        model_config: Mapping[str, Any] | None = None,
        *,
        model: nn.Module | None = None,
        endpoint: str | None = None,
        url: str | None = None,
        run: str | None = None,
        name: str = "ema",
        token: str | None = None,
        rank: int | None = None,
        copy_timeout_s: float = 300.0,
        connect: bool = True,
        **more: Any,
    ) -> None:
        if isinstance(parameters, nn.Module):
            parameters, use_ema_warmup = _parameters_of(parameters), True
        deprecated = {name: more.pop(name) for name in _DEPRECATED if name in more}
        decay, min_decay = _deprecated(deprecated, decay, min_decay)
        self.foreach = foreach
        self.model_cls = model_cls
        self.model_config = model_config
        self.optimization_step = 0
        self.cur_decay_value: float | None = None
        self.temp_stored_params: list[Tensor] | None = None
        self._schedule = Schedule(decay, min_decay, update_after_step, use_ema_warmup, inv_gamma, power)
        self._name = name
        self._rule = self._schedule.rule(name)
        self._timeout_s = check_timeout("copy_timeout_s", copy_timeout_s)
        template = template_of(parameters, model, model_cls, model_config)
        self._given = model
        self._naming = Naming(template)
        self._streamed: nn.Module | None = None
        self._shadow: list[Tensor] | None = [_held(parameter) for parameter in parameters]
        self._loaded: list[Tensor] | None = None  # what the average is to continue from
        self._begun = False
        self._rank = rank_of(None if rank is None else check_step("rank", rank, 0), os.environ)
        self._url, self._token, self._run = url, token, run or os.environ.get("EMA_RUN")
        self._settings = _settings(more, endpoint=endpoint, run=run, token=token, template=template)
        self._client: RemoteClient | None = None
        self._average_reader: AverageReader | None = None
        if connect:
            self._connect()

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], model_cls: Any, foreach: bool = False, **more: Any
    ) -> RemoteEMAModel:
        """The average that `save_pretrained` of this class or of `EMAModel` wrote; it connects at its first step.

        Args:
            path: the folder.
            model_cls: the model's class.
            foreach: without effect.
            more: other arguments of the constructor.
        """
        model = model_cls.from_pretrained(path)
        config = model_cls.load_config(path)
        given: dict[str, Any] = {"model_cls": model_cls, "model_config": model.config, "foreach": foreach}
        ema = cls(model.parameters(), **given, connect=False, **more)
        ema.load_state_dict({key: config[key] for key in STATE_KEYS if key in config})
        return ema

    @property
    def run(self) -> str | None:
        """The run's name; None before this process has connected, and on ranks that do not stream."""
        return None if self._client is None else self._client.run

    @property
    def average(self) -> str:
        """The average's name on the server."""
        return self._rule.name

    @property
    def decay(self) -> float:
        """As given to the constructor, or loaded."""
        return self._schedule.decay

    @property
    def min_decay(self) -> float:
        """As given to the constructor, or loaded."""
        return self._schedule.min_decay

    @property
    def update_after_step(self) -> int:
        """As given to the constructor, or loaded."""
        return self._schedule.update_after_step

    @property
    def use_ema_warmup(self) -> bool:
        """As given to the constructor, or loaded."""
        return self._schedule.use_ema_warmup

    @property
    def inv_gamma(self) -> float:
        """As given to the constructor, or loaded."""
        return self._schedule.inv_gamma

    @property
    def power(self) -> float:
        """As given to the constructor, or loaded."""
        return self._schedule.power

    @property
    def shadow_params(self) -> list[Tensor]:
        """The average at `optimization_step`, on the CPU, in the order of the parameters.

        It is published, downloaded and verified on access, and cached until the next step.

        Raises:
            AverageError: the server does not have it in time.
        """
        if self._shadow is None:
            self._shadow = self._fetch()
        return self._shadow

    def get_decay(self, optimization_step: int) -> float:
        """The decay of this step, from 1."""
        return self._schedule.decay_at(optimization_step)

    def step(self, parameters: Iterable[nn.Parameter] | nn.Module) -> None:
        """The trainer has taken a step: bring the parameters into the average. They are copied on return.

        Args:
            parameters: those of the trained model, in the constructor's order.

        Raises:
            PlanError: they cannot be streamed, or are not those that the average began with.
            ConnectError: the server cannot be reached (first step, with `connect=False`).
            JoinError: the server refuses the run (first step).
            AverageError: the server does not say whether it knows the run (first step after a state was loaded).
        """
        if isinstance(parameters, nn.Module):
            parameters = _parameters_of(parameters)
        self._streamed = self._naming.module_of(parameters, self._given)
        number = self.optimization_step + 1
        if self._rank == 0:
            self._send(self._streamed, number)
        self.optimization_step = number
        self.cur_decay_value = self.get_decay(number)
        self._shadow = None

    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the average into these parameters; in place, once all of it has arrived.

        Raises:
            AverageError: the server does not have it in time. Nothing was written.
            PlanError: the parameters are others. Nothing was written.
        """
        _copy(self.shadow_params, list(parameters))

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep a copy of these parameters on the CPU, for `restore`."""
        self.temp_stored_params = [_held(parameter) for parameter in parameters]

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy what `store` kept into these parameters.

        Raises:
            RuntimeError: nothing is stored.
        """
        if self.temp_stored_params is None:
            raise RuntimeError("nothing is stored: call store() before copy_to()")
        _copy(self.temp_stored_params, list(parameters))
        self.temp_stored_params = None

    def to(self, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> None:
        """Without effect: the average is in another process, in float32."""

    def pin_memory(self) -> None:
        """Without effect, like `to`."""

    def state_dict(self) -> dict[str, Any]:
        """As of `EMAModel`, with `shadow_params`.

        Raises:
            AverageError: as of `shadow_params`.
        """
        return self._schedule.state(self.optimization_step) | {_SHADOW: self.shadow_params}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state of this class or of `EMAModel`; its weights go out with the next step.

        Raises:
            SettingsError: it is not such a state; or its decay differs from that of the run that was joined.
            RewindError: the run was joined, is at another step, and cannot be taken back.
        """
        schedule, step = self._schedule.loaded(state_dict, self.optimization_step)
        shadow = state_dict.get(_SHADOW)
        if shadow is not None and not (isinstance(shadow, list) and all(isinstance(each, Tensor) for each in shadow)):
            raise SettingsError("shadow_params in the state is not a list of tensors")
        if self._begun and schedule != self._schedule:
            raise SettingsError(f"the state has {schedule}, and the run was joined with {self._schedule}")
        rule = schedule.rule(self._name)
        if self._begun and self._client is not None and step != self.optimization_step:
            self._client.rewind(step, self._timeout_s)
        self._schedule, self._rule, self.optimization_step = schedule, rule, step
        if shadow is not None:
            self._shadow = [_held(each) for each in shadow]
        self._loaded = self._shadow if self._rank == 0 else None
        if self._begun and self._streamed is not None and self._holds_loaded(self._streamed, step):
            self._loaded = None

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write the average as a model of diffusers, with the average's state in its `config.json`.

        Raises:
            SettingsError: the constructor was given no `model_cls` or no `model_config`.
            AverageError: as of `shadow_params`. Nothing was written.
        """
        if self.model_cls is None or self.model_config is None:
            raise SettingsError("save_pretrained() needs model_cls= and model_config=: give them to the constructor")
        weights = self.shadow_params
        model = self.model_cls.from_config(self.model_config)
        model.register_to_config(**self._schedule.state(self.optimization_step))
        _copy(weights, list(model.parameters()))
        model.save_pretrained(path)

    def finish(self, timeout_s: float = 60.0) -> bool:
        """Publish the run and mark it as finished; returns whether that is confirmed. It can still be read."""
        return self._client is not None and self._client.finish(timeout_s)

    def close(self) -> None:
        """Stop. A run that is not finished is left open on the server."""
        if self._client is not None:
            self._client.close()

    def _connect(self) -> RemoteClient | None:
        if self._client is None and self._rank == 0:
            self._client = RemoteClient(**self._settings)
            self._run = self._client.run
            self._reader()
        return self._client

    def _reader(self) -> AverageReader:
        if self._average_reader is None:
            if self._run is None:
                raise SettingsError("ranks other than 0 must know the run that rank 0 streams: set EMA_RUN")
            self._average_reader = AverageReader(self._url, self._token, self._run)
        return self._average_reader

    def _send(self, module: nn.Module, number: int) -> None:
        client = self._connect()
        if client is None:
            return
        copies = self.get_decay(number) == 0.0  # what was loaded has no effect then
        loaded = None if self._loaded is None or copies else with_weights(module, self._loaded)
        if not self._begun:
            steps = number - 1
            # The server counts a run's time from its first JOIN, and EMAModel from step 0.
            if steps and (self._settings.get("resume") == "never" or not self._reader().is_known()):
                steps = 0
            client.begin(module, self._rule, steps)
            self._begun = True
            if loaded is not None and self._holds_loaded(module, number - 1):
                loaded = None
        if loaded is None or client.replace(loaded, number - 1):
            self._loaded = None
        client.update(module, number)

    def _holds_loaded(self, module: nn.Module, step: int) -> bool:
        """Whether the run went back to this step, and the average there is what was loaded.

        Then it is not replaced: it may have more digits, and other averages of the run stay.
        """
        try:
            held = self._read(module, step, 0.0)
        except AverageError:
            return False
        loaded = self._loaded or []
        return len(held) == len(loaded) and all(map(_are_equal, held, loaded))

    def _fetch(self) -> list[Tensor]:
        if self._streamed is None:
            raise AverageError("nothing was averaged yet")
        step = self.optimization_step if self._client is None else self._client.publish(self._timeout_s)
        return self._read(self._streamed, step, self._timeout_s)

    def _read(self, module: nn.Module, step: int, timeout_s: float) -> list[Tensor]:
        weights = self._reader().weights(self._rule.name, step, timeout_s)
        names = parameter_names(module)
        missing = [name for name in names if name not in weights]
        if missing:
            raise AverageError(f"the average at step {step} has no {missing[0]!r}: it is that of another model")
        return [weights[name] for name in names]


def _settings(more: Mapping[str, Any], *, template: nn.Module | None, **given: Any) -> dict[str, Any]:
    for name, value in more.items():
        if name not in _PASSED_ON:
            raise SettingsError(f"{name}={value!r} cannot be honoured by RemoteEMAModel: leave it out")
    return {"when_behind": "wait", "config": config_of(template), "rank": 0} | dict(more) | given


def _deprecated(given: Mapping[str, Any], decay: float, min_decay: float) -> tuple[float, float]:
    for name, other in _DEPRECATED.items():
        if given.get(name) is not None:
            text = f"`{name}` is deprecated" + (f": use `{other}`" if other else " and without effect")
            warnings.warn(text, FutureWarning, stacklevel=3)
    most, least = given.get("max_value"), given.get("min_value")
    return decay if most is None else most, min_decay if least is None else least


def _parameters_of(module: nn.Module) -> Iterable[nn.Parameter]:
    warnings.warn("a module instead of its parameters is deprecated", FutureWarning, stacklevel=3)
    return module.parameters()


def _held(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_CPU, copy=True)


def _copy(weights: list[Tensor], parameters: list[nn.Parameter]) -> None:
    check_fit(parameters, {(f"number {index}",): weight.shape for index, weight in enumerate(weights)})
    with torch.no_grad():
        for weight, parameter in zip(weights, parameters, strict=True):
            parameter.copy_(weight)


def _are_equal(held: Tensor, loaded: Tensor) -> bool:
    return held.shape == loaded.shape and torch.equal(held.to(loaded.dtype), loaded)
