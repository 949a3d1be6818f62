"""Which part of a model is streamed: patterns of names, or what is trained.

A choice stays for the run: parameters that are frozen or unfrozen later do not change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ema_proto.names import is_chosen, unmatched
from trainer_client.errors import PlanError
from trainer_client.model.sources import EXTRA_STATE, Source

_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Selection:
    """What is chosen of a model; by default everything.

    Attributes:
        include: patterns of canonical names; empty for all.
        exclude: patterns of names to leave out, even if included.
        trainable_only: only parameters that require a gradient, and no buffers.
        chosen: names that were chosen before.
        rejected: names that were seen before and not chosen.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    trainable_only: bool = False
    chosen: frozenset[str] = frozenset()
    rejected: frozenset[str] = frozenset()

    @property
    def is_whole(self) -> bool:
        return not (self.include or self.exclude or self.trainable_only)

    def choose(self, sources: Sequence[Source]) -> tuple[Source, ...]:
        """The sources that are chosen, in their order; a tied tensor by each of its names.

        Raises:
            PlanError: a pattern matches nothing, or nothing is left.
        """
        names = [source.name for source in sources]
        for what, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in unmatched(patterns, names):
                if what == "exclude" and pattern.endswith(EXTRA_STATE):
                    continue  # extra state is left out anyway, see `sources`
                raise PlanError(f"the pattern {pattern!r} of {what}= matches no tensor of the model: {_some(names)}")
        chosen = tuple(source for source in sources if self._is_chosen(source))
        if not chosen:
            raise PlanError(f"nothing of the model is chosen by {self._described()}: {_some(names)}")
        return chosen

    def fixed(self, sources: Sequence[Source]) -> Selection:
        """This selection with its choice among `sources` fixed."""
        chosen = frozenset(source.name for source in self.choose(sources))
        return replace(self, chosen=chosen, rejected=frozenset(source.name for source in sources) - chosen)

    def _is_chosen(self, source: Source) -> bool:
        if source.name in self.chosen or source.name in self.rejected:
            return source.name in self.chosen
        if not is_chosen(source.name, self.include, self.exclude):
            return False
        tensor = source.maybe_tensor()
        return not self.trainable_only or (not source.is_buffer and tensor is not None and tensor.requires_grad)

    def _described(self) -> str:
        given = [f"{name}={list(patterns)}" for name in ("include", "exclude") if (patterns := getattr(self, name))]
        return " and ".join(given + (["trainable_only=True"] if self.trainable_only else []))


WHOLE = Selection()


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f"its tensors are {', '.join(names[:_NAMES_SHOWN])}{more}"
