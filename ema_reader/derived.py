"""Versions that the server derives from other versions: make one, or delete one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ema_reader.errors import ReaderError, UsageError
from ema_reader.transport import Transport, path_of
from ema_reader.values import Version, values_of

if TYPE_CHECKING:
    from torch import Tensor

ANSWER_S = 3600.0  # a large model, many snapshots, a slow disk


@dataclass(frozen=True, slots=True)
class Synthesized:
    """A power average made from stored ones, with its estimated quality.

    Args:
        version: the version, which can be downloaded.
        sigma_rel: its width, relative to the run.
        gamma: its exponent.
        origin: the step from which its time is counted.
        estimated_error: relative L2 error of the weights that it gives to the steps (of its profile).
        amplification: sum of the absolute weights of the stored averages in it, by which their rounding errors grow.
        rounding: largest rounding error that this can cause, relative to the largest stored value.
        warning: why it may be inaccurate; None if nothing speaks against it.
        inputs: number of stored averages that it was made from.
        snapshots: number of steps at which these were stored.
    """

    version: Version
    sigma_rel: float
    gamma: float
    origin: int
    estimated_error: float
    amplification: float
    rounding: float
    warning: str | None
    inputs: int
    snapshots: int

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Synthesized:
        """Parse the server's answer."""
        version, inputs = Version.from_json(value["version"]), value["inputs"]
        steps = {stored["step"] for stored in inputs}
        return cls(**values_of(cls, value, version=version, inputs=len(inputs), snapshots=len(steps)))


@dataclass(frozen=True, slots=True)
class BlendInput:
    """One version in a blend: version `id` of an average at `step`, with its weight."""

    run: str
    average: str
    step: int
    id: str
    weight: float


@dataclass(frozen=True, slots=True)
class Blended:
    """The weighted sum of versions: the version, which can be downloaded, and what it was made from."""

    version: Version
    inputs: tuple[BlendInput, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Blended:
        """Parse the server's answer."""
        inputs = tuple(BlendInput(**values_of(BlendInput, each)) for each in value["inputs"])
        return cls(Version.from_json(value["version"]), inputs)


class Derived:
    """The derived versions of one server. Safe from several threads.

    Args:
        transport: the connection to the server, owned by the caller.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def synthesize(
        self,
        run: str,
        *,
        sigma_rel: float | None = None,
        gamma: float | None = None,
        step: int | None = None,
        name: str | None = None,
    ) -> Synthesized:
        """Make a power average from those that a run kept; one that exists already is returned.

        Args:
            run: the run; it must have at least two power averages.
            sigma_rel: the width wanted, for example 0.12; this or `gamma`.
            gamma: the exponent wanted.
            step: at which step; None for the newest that is stored.
            name: the name of the average; default `power-SIGMA_REL`.

        Raises:
            UsageError: neither or both of `sigma_rel` and `gamma` are given, or it is NaN or infinite.
            NotFound: the server does not know the run.
            RequestRefused: what is stored does not suffice, or the name is taken; the text says what to do.
            Unreachable: the server does not answer, or its disk refuses.
        """
        if (sigma_rel is None) == (gamma is None):
            raise UsageError("give either sigma_rel, for example 0.12, or gamma")
        for what, value in (("sigma_rel", sigma_rel), ("gamma", gamma)):
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{what} is {value}: use a number, for example sigma_rel 0.12")
        asked = {"sigma_rel": sigma_rel, "gamma": gamma, "step": step, "name": name}
        body = {key: value for key, value in asked.items() if value is not None}
        answer = self._transport.post(path_of("runs", run, "synthesize"), body, answer_s=ANSWER_S)
        return self._transport.read(answer, Synthesized.from_json)

    def blend(self, versions: Sequence[Version], weights: Sequence[float], *, name: str | None = None) -> Blended:
        """Make the weighted sum of versions, as a version of the run of the first; one that exists already is returned.

        It has the first version's step, and of it what is not averaged: integers, frozen weights.

        Args:
            versions: two or more, of any steps, and of any runs of the same model.
            weights: one for each version. They add up to 1; negative ones are allowed.
            name: the name of the average; default: the averages with their weights, such as `ema_0.7-raw_0.3`.

        Raises:
            UsageError: there are fewer than two versions, or there is not one finite weight for each.
            NotFound: the server does not have a version.
            RequestRefused: the weights do not add up to 1, the models differ, the sum is not finite, or the name is
                taken; the text says which.
            Unreachable: the server does not answer, or its disk refuses.
        """
        if len(versions) < 2:
            raise UsageError("give two versions or more")
        if len(versions) != len(weights):
            raise UsageError(f"there are {len(weights)} weights for {len(versions)} versions: give one for each")
        for weight in weights:
            if not math.isfinite(weight):
                raise UsageError(f"a weight is {weight}: use numbers that add up to 1")
        inputs = [
            {"run": version.run, "average": version.average, "rev": version.id, "weight": weight}
            for version, weight in zip(versions, weights, strict=True)
        ]
        body = {"inputs": inputs} | ({} if name is None else {"name": name})
        answer = self._transport.post(path_of("runs", versions[0].run, "blend"), body, answer_s=ANSWER_S)
        return self._transport.read(answer, Blended.from_json)

    def recalibrate(self, version: Version, buffers: Mapping[str, Tensor]) -> Version:
        """Write a version as `{average}-bn`, with these buffers in place of its own. Needs torch.

        The same buffers again give the same version.

        Args:
            version: any version that is not itself recalibrated.
            buffers: by name in the state dict, with the shapes and dtypes of the version.

        Raises:
            NotFound: the server does not have the version.
            RequestRefused: a tensor is no buffer of the model, does not fit, or is not finite; the text names it.
            ReaderError: torch is not installed.
        """
        try:
            from safetensors.torch import save
        except ImportError as error:
            raise ReaderError("sending buffers needs torch (and numpy): install them") from error
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in buffers.items()})
        path = path_of("runs", version.run, "averages", version.average, "versions", version.id, "recalibrate")
        answer = self._transport.upload(path, data, answer_s=ANSWER_S)
        return self._transport.read(answer, Version.from_json)

    def delete(self, version: Version) -> None:
        """Delete a derived version.

        Raises:
            NotFound: the server does not have it.
            RequestRefused: it is not a derived version, or it is being read.
        """
        self._transport.delete(path_of("runs", version.run, "averages", version.average, "versions", version.id))
