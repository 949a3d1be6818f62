"""A blend: the weighted sum of versions, as a derived version of the run of the first of them.

The versions may be of several steps, and of several runs of one model (the manifests have one digest). What an average
copies instead of averaging, integers for example, comes from the first version; the rule of the first that is not `raw`
decides which tensors these are.

A blend weighs each step by the sum of its shares in the versions, each times the weight of the version. Its
`version.json` has the ledgers of the versions, unless one of them has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ema_proto.averages.rules import AverageSpec, Raw, Uniform
from ema_proto.averages.specs import parse_average
from ema_proto.wire.manifest import Manifest, TensorSpec
from ema_server.derived.combine import NotFinite, Term, combined
from ema_server.derived.queue import DerivationQueue, NameTaken
from ema_server.derived.run_model import model_of
from ema_server.derived.store import Derivation, DerivedStore
from ema_server.storage.catalog import Version
from ema_server.storage.companions import sources_in
from ema_server.storage.records import CONFIG_FILE, VERSION_FILE, BrokenGeneration, read_json
from ema_server.tensors.file_plan import MODEL_FILE
from ema_server.tensors.selection import copied_names

BLENDED = "blended"
INPUTS_MAX = 64
SUM_TOLERANCE = 1e-6  # by which the weights may miss 1, as decimals of them do


class CannotBlend(Exception):
    """The versions do not fit together, or their sum is not finite; the text says what to do."""


class BadWeights(ValueError):
    """The weights are not finite, or do not add up to 1."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """A version and its weight in a blend."""

    version: Version
    weight: float


def check_weights(weights: Sequence[float]) -> None:
    """Check that weights are finite and add up to 1.

    Raises:
        BadWeights: they do not.
    """
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if not all(map(math.isfinite, weights)):
        raise BadWeights(f"the weights are {shown}: use finite numbers that add up to 1")
    total = math.fsum(weights)
    if abs(total - 1.0) > SUM_TOLERANCE:
        scaled = f"; divided by it they are {', '.join(f'{weight / total:.9g}' for weight in weights)}" if total else ""
        raise BadWeights(f"the weights {shown} add up to {total:.9g}, not to 1{scaled}")


def default_name(inputs: Sequence[Weighted]) -> str:
    """The name of a blend: each average with its weight, and with its run or its step where these differ.

    For example `ema_0.7-raw_0.3`. It may be too long for a name.
    """
    first = inputs[0].version
    one_step = all(each.version.step == first.step for each in inputs)

    def part(each: Weighted) -> str:
        run = "" if each.version.run == first.run else f"{each.version.run}."
        step = "" if one_step else f".{each.version.step}"
        return f"{run}{each.version.average}{step}_{each.weight:.12g}"

    return "-".join(map(part, inputs))


def blend(deriving: DerivationQueue, inputs: Sequence[Weighted], name: str) -> tuple[Version, bool]:
    """Write the weighted sum of versions as a version of `name`; returns it, and whether it did not exist before.

    Args:
        deriving: the queue, whose thread calls this.
        inputs: what is added up, of which the first gives the run and the step; their weights add up to 1.
        name: the average to list it under.

    Raises:
        CannotBlend: the versions are of different models, or a sum is not finite.
        NameTaken: the name belongs to other versions.
        BrokenGeneration, BadModelFile: a stored file is damaged.
        OSError: the disk fails.
        VersionGone: a version was deleted, or its run was set aside.
        Stopped: the server began to stop.
    """
    store = deriving.store
    with ExitStack() as held:
        for each in inputs:
            held.enter_context(store.catalog.hold(each.version))
        known = _known(store, inputs, name)
        if known is not None:
            return known, False
        first = inputs[0].version
        rule = _treatment(inputs)
        pieces = combined([_term(each) for each in inputs], _copied(store, inputs, rule))
        config = first.folder / CONFIG_FILE
        try:
            version = store.write(
                _derivation(inputs, name, rule),
                deriving.pieces(pieces),
                config.read_bytes() if config.exists() else None,
                sources_in(first),
            )
        except NotFinite as error:
            raise CannotBlend(f"{error}: a version of raw has what the trainer sent, NaN and Inf included") from None
        return version, True


def _known(store: DerivedStore, inputs: Sequence[Weighted], name: str) -> Version | None:
    """The blend of the same versions made earlier."""
    run, asked = inputs[0].version.run, _inputs_json(inputs)
    for version in store.catalog.versions(run, name):
        facts = store.provenance(version) if version.derived == BLENDED else {}
        if _recipe(facts.get("inputs", ())) != _recipe(asked):
            what = version.derived or "tracked by its trainer"
            raise NameTaken(f"{name!r} of run {run!r} is {what}, of other averages or weights: use another name")
        if facts["inputs"] == asked:
            return version
    return None


def _recipe(inputs: Sequence[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """What versions of one name have in common."""
    return [(each["run"], each["average"], each["weight"]) for each in inputs]


def _inputs_json(inputs: Sequence[Weighted]) -> list[dict[str, Any]]:
    return [
        {
            "run": each.version.run,
            "average": each.version.average,
            "step": each.version.step,
            "id": each.version.id,
            "weight": each.weight,
        }
        for each in inputs
    ]


def _treatment(inputs: Sequence[Weighted]) -> AverageSpec:
    """The rule of the first version that is not `raw`, which averages nothing itself."""
    rules = [parse_average(each.version.spec) for each in inputs]
    return next((rule for rule in rules if not isinstance(rule, Raw)), rules[0])


def _copied(store: DerivedStore, inputs: Sequence[Weighted], rule: AverageSpec) -> frozenset[str]:
    """The names of the tensors that are copied from the first version.

    Raises:
        CannotBlend: the versions are of different models.
    """
    runs = dict.fromkeys(each.version.run for each in inputs)
    models = {run: model_of(store.catalog, run) for run in runs}
    first = inputs[0].version.run
    for run, model in models.items():
        _check_alike(first, models[first].manifest, run, model.manifest)
    exempt = frozenset[str]().union(*(model.exempt for model in models.values()))
    return copied_names(models[first].manifest, exempt, Uniform() if isinstance(rule, Raw) else rule)


def _check_alike(first: str, manifest: Manifest, run: str, other: Manifest) -> None:
    if manifest.digest == other.digest:
        return
    specs, others = ({tensor.name: tensor for tensor in each.tensors} for each in (manifest, other))
    for name in dict.fromkeys((*specs, *others)):
        one, two = _described(specs.get(name)), _described(others.get(name))
        if one != two:
            detail = f"tensor {name!r} is {one} in {first}, and {two} in {run}"
            break
    else:
        detail = "they have the same tensors in another order"
    raise CannotBlend(f"runs {first!r} and {run!r} have different models: {detail}")


def _described(tensor: TensorSpec | None) -> str:
    if tensor is None:
        return "missing"
    tied = f", tied with {', '.join(tensor.aliases)}" if tensor.aliases else ""
    return f"{tensor.dtype} {list(tensor.shape)}{tied}"


def _term(each: Weighted) -> Term:
    file = each.version.file(MODEL_FILE)
    if file is None:
        raise BrokenGeneration(f"version {each.version.id} has no {MODEL_FILE}")
    return Term(each.version.folder / MODEL_FILE, file.sha256, each.weight)


def _derivation(inputs: Sequence[Weighted], name: str, rule: AverageSpec) -> Derivation:
    first = inputs[0].version
    ledgers = [_ledgers(each) for each in inputs]
    known = [ledger for found in ledgers if found is not None for ledger in found]
    return Derivation(
        run=first.run,
        average=name,
        spec=rule.spec,
        step=first.step,
        updates=first.updates,
        gap_steps=first.gap_steps,
        kind=BLENDED,
        provenance={"inputs": _inputs_json(inputs), "ledgers": known if None not in ledgers else None},
    )


def _ledgers(each: Weighted) -> list[dict[str, Any]] | None:
    """What a version contributes: the ledger of each average in it with its weight; None if it has none.

    The `paces` are those of the run, which some rules need for the shares of the steps.
    """
    version = each.version
    written = read_json((version.folder / VERSION_FILE).read_bytes())
    try:
        if "derived" not in written:
            return [{key: written[key] for key in _LEDGER_KEYS} | {"weight": each.weight}]
        inner = written["derived"].get("ledgers")
        return None if inner is None else [one | {"weight": one["weight"] * each.weight} for one in inner]
    except (KeyError, TypeError, AttributeError) as error:
        raise BrokenGeneration(f"{VERSION_FILE} of version {version.id} is not a version: {error!r}") from None


_LEDGER_KEYS = ("run", "average", "spec", "step", "ledger", "paces")
