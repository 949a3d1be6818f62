"""Versions that the server makes of others after them: ask for one, or delete one. Values in, values out, over HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ema_reader.errors import ReaderError, UsageError
from ema_reader.transport import Transport, path_of
from ema_reader.values import Version

if TYPE_CHECKING:
    from torch import Tensor

ANSWER_S = 3600.0  # a large model, of many snapshots, on a slow disk


@dataclass(frozen=True, slots=True)
class Synthesized:
    """A power average that was made after the run, and how good it is.

    Args:
        version: what can be downloaded.
        sigma_rel: its width, relative to the run.
        gamma: its exponent.
        origin: the step that its time is counted from.
        estimated_error: relative L2 error of its profile.
        amplification: sum of the absolute values of the shares of what it was made of.
        rounding: what that makes of the rounding of stored weights, relative to the largest of them, at worst.
        warning: what makes it doubtful; None if nothing does.
        inputs: how many stored averages were added up.
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

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Synthesized:
        """Read the server's answer."""
        return cls(
            version=Version.from_json(value["version"]),
            sigma_rel=value["sigma_rel"],
            gamma=value["gamma"],
            origin=value["origin"],
            estimated_error=value["estimated_error"],
            amplification=value["amplification"],
            rounding=value["rounding"],
            warning=value["warning"],
            inputs=len(value["inputs"]),
        )


class Derived:
    """Asks one server for derived versions. Safe from several threads.

    Args:
        transport: the connection to the server; it stays the caller's.
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
        """Have a power average made of those that a run kept; one that was made before is not made again.

        Args:
            run: the run; it must have kept two power averages at least.
            sigma_rel: the width wanted, for example 0.12; this or `gamma`.
            gamma: the exponent wanted.
            step: as of which step; None for the newest that is stored.
            name: under which it is listed; default `power-SIGMA_REL`.

        Raises:
            UsageError: neither or both of `sigma_rel` and `gamma` are given, or it is NaN or infinite.
            NotFound: the server does not know the run.
            RequestRefused: what is stored does not suffice, or the name is taken; the text says what to do.
            Unreachable: the server is away, or its disk refuses.
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

    def recalibrate(self, version: Version, buffers: Mapping[str, Tensor]) -> Version:
        """Have a version written as `{average}-bn`, with these buffers in place of its own. Needs torch.

        The same buffers again give the same version.

        Args:
            version: any but one that was made so.
            buffers: by their names in the state dict, with the shapes and dtypes that the version has.

        Raises:
            NotFound: the version has been pruned.
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
            NotFound: it is gone already.
            RequestRefused: it is not a derived one, or someone reads it, or did a moment ago.
        """
        self._transport.delete(path_of("runs", version.run, "averages", version.average, "versions", version.id))
