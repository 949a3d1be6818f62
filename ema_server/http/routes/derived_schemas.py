"""The JSON of versions that are made of others, as types. Holds no behaviour but validation."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ema_proto.limits import STEP_MAX
from ema_server.http.schemas import Finite, Name, Out, VersionOut


class SynthesizeIn(BaseModel):
    """Which power average to make: its width or its exponent, as of which step (the newest), under which name."""

    model_config = ConfigDict(extra="forbid")

    sigma_rel: Finite | None = None
    gamma: Finite | None = None
    step: Annotated[int, Field(ge=1, le=STEP_MAX)] | None = None
    name: Name | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> SynthesizeIn:
        if (self.sigma_rel is None) == (self.gamma is None):
            raise ValueError("give either sigma_rel, for example 0.12, or gamma")
        return self


class InputOut(Out):
    """One stored average in a sum: its version was `id` at `step`."""

    average: str
    step: int
    id: str
    share: float


class SynthesizedOut(Out):
    """A version made of stored power averages, and how good it is.

    `estimated_error` is the relative L2 error of its profile, `amplification` the sum of the shares' absolute values,
    `rounding` what that makes of the stored weights' rounding at worst; `origin`: the step its time is counted from.
    """

    version: VersionOut
    sigma_rel: float
    gamma: float
    origin: int
    estimated_error: float
    amplification: float
    rounding: float
    warning: str | None
    inputs: tuple[InputOut, ...]
