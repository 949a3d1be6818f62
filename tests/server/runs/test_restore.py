"""A run that is written to disk and read back continues bit for bit like one that was never interrupted."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ema_proto.averages.specs import parse_averages
from ema_proto.wire import messages
from ema_proto.wire.manifest import Role
from ema_proto.wire.messages import Mode
from ema_server.averager.jobs import Quarantined
from ema_server.compute.device import HOST
from ema_server.compute.pool import WorkerPool
from ema_server.publishing.commit import Content, commit
from ema_server.publishing.writer import DraftAverage, GenerationWriter
from ema_server.rules.window import Entry
from ema_server.runs.restore import load_run
from ema_server.runs.run import Run, new_run
from ema_server.storage.records import GenerationInfo
from support.examples import examples
from support.oracle import EPS32
from support.server_core import encode, joined, manifest_of, running_core, versions_by_average

_RULES = (
    "raw",
    "ema:0.9",
    "ema:0.999,warmup=timm,buffers=copy",
    "ema:half_life=50,warmup=tf,acc=float64",
    "ema:0.99,warmup=debias,exclude=head.*",
    "power:sigma_rel=0.05,acc=float64",
    "swa",
    "swa:start=6,every=4,include=*e",
    "window:3",
    "window:4,every=5,acc=float64,buffers=copy",
    "wsd:start=5,steps=20,shape=cosine",
)
_NAMED = tuple(f"{rule}{',' if ':' in rule else ':'}name=a{index}" for index, rule in enumerate(_RULES))


def _weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "double": torch.rand(3, generator=generator, dtype=torch.float64),
        "single": torch.rand(7, generator=generator) * 8 - 4,
        "head.half": torch.rand(5, generator=generator).bfloat16(),
        "statistic": torch.rand(5, generator=generator),
        "u": torch.rand(2, generator=generator),
        "seen": torch.tensor(step),
    }


_MANIFEST = manifest_of(_weights(1), {"statistic": Role.BUFFER, "u": Role.STRUCTURAL})


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """Two threads, small blocks."""
    pool = WorkerPool(2, 4)
    yield pool
    pool.close()


def _new_run(origin: int) -> Run:
    asked = messages.Join(run="r", first_step=origin + 1, manifest=_MANIFEST, averages=parse_averages(_NAMED))
    return new_run(asked, "2026-01-01T00:00:00Z", HOST)


def _written_and_read(run: Run, pool: WorkerPool, folder: Path) -> Run:
    """The run, through the files of a generation, into memory of its own."""
    temporary, step = folder / ".tmp-1", run.last_step or 0
    averages = tuple(
        DraftAverage(
            temporary / ("windows" if holding.is_snapshot else "averages") / average.rule.name,
            holding.memory,
            holding.files,
        )
        for average in run.averages
        for holding in average.holdings
    )
    draft = GenerationWriter(temporary, averages)
    pool.write(run.segments, [holding.form for holding in run.holdings], draft)
    info = GenerationInfo(1, "2026-01-01T00:00:00Z", "request", pinned=False, finished=False)
    return load_run(commit(draft, Content(run.record(step), run.manifest, run.config), info), {}, HOST)


def _content(run: Run) -> list[Tensor]:
    """The bytes of every average, of a window's snapshots too, oldest first."""
    held: list[Tensor] = []
    for average in run.averages:
        held.append(average.memory.data)
        held += [average.slots[entry.slot].data for entry in average.entries]
    return held


def _apply(run: Run, pool: WorkerPool, step: int, mode: Mode) -> None:
    run.apply(pool, step, mode, encode(_MANIFEST, _weights(step)), None)


@settings(max_examples=examples(20))
@given(
    strides=st.lists(st.tuples(st.integers(1, 7), st.sampled_from(["update"] * 9 + ["set"])), min_size=2, max_size=25),
    breaks=st.sets(st.integers(1, 24), min_size=1, max_size=2),
    origin=st.integers(0, 9),
)
def test_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(
    pool: WorkerPool, strides: Sequence[tuple[int, Mode]], breaks: set[int], origin: int
) -> None:
    """For every rule, with gaps and sets, at any place: bytes, ledgers, ages and shares."""
    whole, broken, step = _new_run(origin), _new_run(origin), origin
    with tempfile.TemporaryDirectory() as folder:
        for index, (stride, mode) in enumerate(strides):
            if index in breaks:
                (Path(folder) / str(index)).mkdir()
                broken = _written_and_read(broken, pool, Path(folder) / str(index))
            step += stride
            _apply(whole, pool, step, mode)
            _apply(broken, pool, step, mode)

    assert broken.record(step) == whole.record(step)
    assert all(torch.equal(one, other) for one, other in zip(_content(broken), _content(whole), strict=True))


def test_window_is_read_back_oldest_first(pool: WorkerPool, tmp_path: Path) -> None:
    run = _new_run(0)
    for step in (1, 2, 3, 4, 5):
        _apply(run, pool, step, "update")
    (tmp_path / "g").mkdir()
    back = _written_and_read(run, pool, tmp_path / "g")

    assert back.averages[8].entries == (Entry(3, 1, 0), Entry(4, 1, 1), Entry(5, 1, 2))
    assert [entry.slot for entry in run.averages[8].entries] != [0, 1, 2]


def test_ages_and_shares_follow_the_weights_of_the_rule(pool: WorkerPool) -> None:
    """`age' = (1 - w) (age + delta)`, `share' = (1 - w) share`; those of a window are those of its snapshots."""
    run = _new_run(0)
    for step in (1, 2, 5):
        _apply(run, pool, step, "update")
    found = {average.rule.spec: (average.age_steps, average.initial_share) for average in run.averages}

    assert found["raw"] == (0.0, 0.0)
    assert found["ema:0.9"] == pytest.approx((0.9**3 * (0.9 * 1 + 3), 0.9**4))
    assert found["swa"] == pytest.approx((1 / 5 * 4 + 1 / 5 * 3, 1 / 5))
    assert found["window:3"] == (0.0, 0.0)
    _apply(run, pool, 6, "update")
    assert (run.averages[8].age_steps, run.averages[8].initial_share) == pytest.approx((2 / 3, 0.0))
    _apply(run, pool, 9, "set")
    assert {(average.age_steps, average.initial_share) for average in run.averages} == {(0.0, 1.0)}


def test_only_a_float64_accumulator_moves_above_0_99999(tmp_path: Path) -> None:
    """Weights 5 % away from an average at 1: each update is below half a unit in the last place of float32."""
    there = {"w": torch.full((50,), 1.05)}
    with running_core(tmp_path) as core:
        joined(core.join("r", manifest_of(there), ["ema:0.999999,name=narrow", "ema:0.999999,acc=float64,name=wide"]))
        core.apply("r", 1, {"w": torch.ones(50)})
        for step in range(2, 302):
            core.apply("r", step, there)
        versions = versions_by_average(core.publish("r"))
        narrow, wide = (core.load(versions[name])["w"] for name in ("narrow", "wide"))

    expected = 1 + (1 - 0.999999**300) * (there["w"].double() - 1)
    assert torch.equal(narrow, torch.ones(50))
    assert (wide.double() - expected).abs().max().item() <= EPS32
    assert expected[0] - 1 > 10 * EPS32


def test_float64_average_is_published_as_float32_and_restored_as_float64(tmp_path: Path) -> None:
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, ["ema:0.9,acc=float64", "ema:0.9"]))
        for step in (1, 2, 3):
            core.apply("r", step, _weights(step))
        versions = versions_by_average(core.publish("r"))
        published = core.load(versions["ema-0.9-acc-float64"])

    assert {value.dtype for value in published.values()} == {torch.float32, torch.int64}
    assert {file.name for file in versions["ema-0.9-acc-float64"].files} >= {"model.safetensors", "state.safetensors"}
    exact = _weights(1)["single"].double()
    for step in (2, 3):
        exact = exact * 0.9 + _weights(step)["single"].double() * 0.1
    assert (published["single"].double() - exact).abs().max().item() <= 4 * EPS32


def test_constant_parameter_stays_bit_for_bit(tmp_path: Path) -> None:
    """Frozen parameters are averaged like others: nothing happens to one, until it is unfrozen; then it is averaged."""
    frozen = {"w": torch.rand(500) * 8 - 4}
    rules = ["ema:0.999", "power:sigma_rel=0.1", "swa", "window:3", "ema:0.99,acc=float64"]
    with running_core(tmp_path) as core:
        joined(core.join("r", manifest_of(frozen, {"w": Role.FROZEN}), rules))
        for step in range(1, 20):
            core.apply("r", step, frozen)
        versions = versions_by_average(core.publish("r"))
        assert all(torch.equal(core.load(version)["w"], frozen["w"]) for version in versions.values())
        core.apply("r", 20, {"w": frozen["w"] + 1})
        thawed = core.load(versions_by_average(core.publish("r"))["ema-0.999"])["w"]

    torch.testing.assert_close(thawed, frozen["w"] + 0.001, rtol=0, atol=1e-5)


def test_nonfinite_snapshot_changes_no_average(tmp_path: Path) -> None:
    """For every rule: the same version as before, though the snapshots of a window move about."""
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, _NAMED))
        for step in (1, 2, 3, 4, 5, 6):
            core.apply("r", step, _weights(step))
        before = versions_by_average(core.publish("r"))
        for name in ("double", "single", "head.half"):
            dirty = {**_weights(7), name: _weights(7)[name].clone().index_fill_(0, torch.tensor([1]), torch.nan)}
            assert isinstance(core.apply("r", 7, dirty), Quarantined)
        assert versions_by_average(core.publish("r")) == before


def test_generations_without_a_format_in_their_files_are_resumed(tmp_path: Path) -> None:
    """As releases before `format=pt` wrote them: the data of each file begins earlier."""
    with running_core(tmp_path) as core:
        joined(core.join("r", _MANIFEST, _NAMED))
        for step in (1, 2, 3, 4, 5, 6):
            core.apply("r", step, _weights(step))
        (folder,) = {version.folder.parent.parent for version in versions_by_average(core.publish("r")).values()}
    _strip_metadata(folder)
    with running_core(tmp_path) as core:
        assert joined(core.join("r", _MANIFEST, _NAMED, first_step=7)).last_step == 6
        core.apply("r", 7, _weights(7))
        resumed = versions_by_average(core.publish("r"))
        found = {name: core.load(version) for name, version in resumed.items()}
    with running_core(tmp_path / "other") as core:
        joined(core.join("r", _MANIFEST, _NAMED))
        for step in (1, 2, 3, 4, 5, 6, 7):
            core.apply("r", step, _weights(step))
        for name, version in versions_by_average(core.publish("r")).items():
            expected = core.load(version)
            assert all(torch.equal(expected[tensor], value) for tensor, value in found[name].items()), name


def _strip_metadata(generation: Path) -> None:
    """Rewrite every safetensors file of a generation without metadata, and its entry in `generation.json`."""
    record = json.loads((generation / "generation.json").read_text())
    for path, entry in record["files"].items():
        if path.endswith(".safetensors"):
            data = (generation / path).read_bytes()
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            assert header.pop("__metadata__") == {"format": "pt"}
            text = json.dumps(header, separators=(",", ":")).encode()
            old = len(text).to_bytes(8, "little") + text + data[8 + length :]
            (generation / path).unlink()
            (generation / path).write_bytes(old)
            entry.update(size=len(old), sha256=hashlib.sha256(old).hexdigest())
    (generation / "generation.json").write_text(json.dumps(record))


def test_unusual_tensors_pass_through_every_rule(tmp_path: Path) -> None:
    """Tied, 0-d, empty and non-contiguous tensors, integers and bools; what does not change comes out as it went in."""
    odd = {
        "tied": torch.rand(3, 4).t(),
        "scalar": torch.tensor(0.3),
        "brain": torch.rand(9).bfloat16(),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "index": torch.arange(169, dtype=torch.int16),
        "large": torch.tensor(2**53 + 1),
        "double": torch.rand(2, dtype=torch.float64),
    }
    manifest = manifest_of(odd, aliases={"tied": ("other.name",)})
    with running_core(tmp_path) as core:
        joined(core.join("r", manifest, [rule for rule in _NAMED if "head" not in rule]))
        for step in (1, 2, 5, 6, 7, 30):
            core.apply("r", step, odd)
        for version in versions_by_average(core.publish("r")).values():
            held = core.load(version)
            assert torch.equal(held.pop("other.name"), held["tied"]), version.average
            for name, value in odd.items():
                assert held[name].shape == value.shape
                assert torch.equal(held[name], value.to(held[name].dtype)), (version.average, name)
