"""`RemoteModelEma`: the averaged model of timm's ModelEma classes, kept by a server instead of the trainer.

The server computes the average; the module is fetched when it is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from typing import Any, Self, SupportsIndex

import torch
from torch import nn

from ema_proto.averages.rules import Ema
from ema_proto.errors import LocalProtocolError
from ema_proto.wire.messages import Resume
from trainer_client.errors import SettingsError
from trainer_client.pulling.average_reader import AverageReader
from trainer_client.pulling.module_copy import ModuleCopy
from trainer_client.ranks import rank_of
from trainer_client.remote_client import RemoteClient
from trainer_client.settings import check_step, check_timeout


class RemoteModelEma(nn.Module):
    """Takes the place of timm's `ModelEmaV3`, `ModelEmaV2` and `ModelEma`; the average is out of process.

    It begins with the weights that `model` has now: they go out with the first update, as of the step before it. With
    `update(model, step=n)` the decay is that of ModelEmaV3, which copies at step 1; without `step` it is constant.

    Args:
        model: the model to be averaged; make this after it is on its device and before it is wrapped for DDP.
        decay: see `Ema`, like the next five.
        min_decay: of the warm-up.
        update_after_step: the average is a copy of the weights for so many steps and one more.
        use_warmup: let the decay rise to `decay`.
        warmup_gamma: of the warm-up.
        warmup_power: of the warm-up.
        device: where `module` is while it is used (default: the CPU); between uses it is on the CPU.
        dtype: None only: averages are float32 on the server, and `module` has the model's dtypes.
        stochastic_rounding: without effect, like its seed and `foreach`: a float32 average needs no rounding.
        stochastic_rounding_seed: without effect.
        foreach: without effect.
        exclude_buffers: copy buffers instead of averaging them.
        endpoint: the server's address for trainers; default `EMA_ENDPOINT`.
        url: its address for readers; default `EMA_URL`.
        run: name of the run; default `EMA_RUN`, else generated.
        name: name of the average; default: made of its parameters.
        token: shared secret; default `EMA_TOKEN`.
        rank: only rank 0 streams; default: torch.distributed's, else the launcher's `RANK`, else 0.
        resume: as of `EmaClient`.
        config: as of `EmaClient`.
        connect_timeout_s: as of `EmaClient`.
        wait_timeout_s: how long an update waits, while connected, for a snapshot that is still being sent.
        module_timeout_s: how long `module` waits for the average.
        unknown: refused by name.

    Raises:
        SettingsError: an argument cannot be used.
        ConnectError: the server cannot be reached.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
        *,
        endpoint: str | None = None,
        url: str | None = None,
        run: str | None = None,
        name: str = "",
        token: str | None = None,
        rank: int | None = None,
        resume: Resume = "auto",
        config: Mapping[str, Any] | str | PathLike[str] | None = None,
        connect_timeout_s: float = 5.0,
        wait_timeout_s: float = 30.0,
        module_timeout_s: float = 300.0,
        **unknown: object,
    ) -> None:
        super().__init__()
        _refuse(unknown | ({} if dtype is None else {"dtype": dtype}))
        self.device = device
        self._by_step, self._constant = _rules(
            decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power, exclude_buffers, name
        )
        self._rule: Ema | None = None
        self._timeout_s = check_timeout("module_timeout_s", module_timeout_s)
        self._client: RemoteClient | None = None
        if rank_of(None if rank is None else check_step("rank", rank, 0), os.environ) == 0:
            self._client = RemoteClient(
                endpoint=endpoint,
                run=run,
                when_behind="wait",
                resume=resume,
                token=token,
                config=config,
                connect_timeout_s=connect_timeout_s,
                wait_timeout_s=wait_timeout_s,
                rank=0,
            )
        self._resume = resume
        self._reader = AverageReader(url, token, _run(run) if self._client is None else self._client.run)
        self._copy = ModuleCopy(model, torch.device(device if device else "cpu"))
        self._steps = 0
        self._is_new = True  # the copy's weights are to replace the average
        self._is_stale = False  # the average has changed since the copy was filled

    @property
    def run(self) -> str | None:
        """The run's name; None on ranks that do not stream."""
        return None if self._client is None else self._client.run

    @property
    def average(self) -> str | None:
        """The average's name on the server; None before the first update, which decides about it."""
        return None if self._rule is None else self._rule.name

    @property
    def module(self) -> nn.Module:
        """The average as of the last update, in eval mode. Fetched on access, and cached until the next update.

        Weights that are loaded into it before the first update are what the average begins with.

        Raises:
            AverageError: the server does not have it in time.
        """
        if self._is_stale and self._rule is not None:
            step = self._steps if self._client is None else self._client.publish(self._timeout_s)
            self._copy.fill(self._reader.weights(self._rule.name, step, self._timeout_s))
            self._is_stale = False
        return self._copy.shown()

    @property
    def ema(self) -> nn.Module:
        """`module`, by its name in timm's first class."""
        return self.module

    def update(self, model: nn.Module, step: SupportsIndex | None = None) -> None:
        """The trainer has taken a step: bring the weights into the average. They are copied on return.

        Args:
            model: the trained model.
            step: optimizer steps taken so far, this one included. Give it always or never.

        Raises:
            SettingsError: `step` is no step, or was given before and not now, or the other way round.
            JoinError: the server refuses the run (first update).
            PlanError: the model cannot be streamed (first update); one that changes later is no longer averaged.
        """
        number = self._steps + 1 if step is None else check_step("step", step, 1)
        rule = self._constant if step is None else self._by_step
        if self._rule is not None and self._rule is not rule:
            raise SettingsError("update() was called with step= before, or without it: give it always or never")
        if self._rule is None:
            self._begin(model, rule, number)
        self._rule = rule
        if self._client is not None:
            self._send_new(self._client, rule, number)
            self._client.update(model, number)
        self._steps, self._is_stale = max(number, self._steps), True
        self._copy.put_away()

    def set(self, model: nn.Module) -> None:
        """Have the average become the weights of `model`; they go out with the next update, as of the step before."""
        self._copy.take(model)
        self._is_new, self._is_stale = True, False

    def train(self, mode: bool = True) -> Self:
        """As of any module. `eval()` fetches the average already: a compiled `forward` then finds it in place."""
        if not mode:
            _ = self.module
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the averaged model."""
        return self.module(*args, **kwargs)

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The average's state dict, its names beginning with `module.`, as of timm's classes."""
        _ = self.module
        return self._copy.state_dict(destination, prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Have the average become these weights, with names as of `state_dict()` or of the model.

        They go out with the next update. `assign` makes no difference: the weights are copied.
        """
        loaded = self._copy.load(state_dict, strict=strict)
        self._is_new, self._is_stale = True, False
        return loaded

    def finish(self, timeout_s: float = 60.0) -> bool:
        """Publish the run and mark it as finished; returns whether that is confirmed. `module` can still be read."""
        return self._client is not None and self._client.finish(check_timeout("timeout_s", timeout_s))

    def close(self) -> None:
        """Stop. A run that is not finished is left open on the server."""
        if self._client is not None:
            self._client.close()

    def _begin(self, model: nn.Module, rule: Ema, number: int) -> None:
        if self._client is None:
            return
        steps = number - 1
        # The server counts a run's time from its first JOIN, and timm from step 0, also when the run is joined later.
        if steps and rule is self._by_step and (self._resume == "never" or not self._reader.is_known()):
            steps = 0
        self._client.begin(model, rule, steps)

    def _send_new(self, client: RemoteClient, rule: Ema, number: int) -> None:
        if not self._is_new:
            return
        if rule is self._by_step and number <= rule.update_after + 1:
            self._is_new = False  # this update copies: earlier weights would have no effect
        else:
            self._is_new = not client.replace(self._copy.module, number - 1)


def _refuse(unknown: Mapping[str, object]) -> None:
    for name, value in unknown.items():
        raise SettingsError(f"{name}={value!r} cannot be honoured by RemoteModelEma: leave it out")


def _rules(
    decay: float, least: float, after: int, warmup: bool, gamma: float, power: float, exclude_buffers: bool, name: str
) -> tuple[Ema, Ema]:
    """The rule that timm's parameters mean with `step=`, and without."""
    buffers: Any = "copy" if exclude_buffers else "average"
    warm: dict[str, Any] = {"warmup": "timm", "gamma": gamma, "power": power, "min_decay": least} if warmup else {}
    try:
        by_step = Ema(decay, name, update_after=after, buffers=buffers, **warm)
        return by_step, Ema(decay, name, init="start", buffers=buffers)
    except LocalProtocolError as error:
        raise SettingsError(str(error)) from None


def _run(given: str | None) -> str:
    run = given or os.environ.get("EMA_RUN")
    if not run:
        raise SettingsError("ranks other than 0 must know the run that rank 0 streams: pass run=, or set EMA_RUN")
    return run
