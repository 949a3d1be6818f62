"""The benchmarks run at smoke sizes; their figures at these sizes are meaningless."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import device, error, gpu_step, gpu_trainer, nginx, rival
from benchmarks.result import Row, Section, Spread, interleaved
from ema_server.compute.accelerator import Accelerator
from support.backends import InlineBackend


@pytest.mark.parametrize("name", command.BENCHMARKS)
@pytest.mark.process
def test_every_benchmark_runs_and_yields_finite_ratios(name: str) -> None:
    if name == "download" and nginx.program() is None:
        pytest.skip("there is no nginx here")
    if name in ("device", "gpu_step") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")

    section = command.BENCHMARKS[name](quick=True)

    assert section.rows
    for row in section.rows:
        assert all(math.isfinite(value) for value in (row.ratio.low, row.ratio.median, row.ratio.high)), row


def test_our_averages_are_as_exact_as_the_best() -> None:
    """300 updates at decay 0.9998. Multiplying by d and adding 1 - d, both rounded, is off by 3e-8 each time."""
    found = error.errors(300, 512, seed=1)
    ours = {name: value for name, value in found.items() if name.startswith("ours")}
    others = {name: value for name, value in found.items() if name not in ours}
    single, double = (
        {value for name, value in ours.items() if name.endswith("float64") is exact} for exact in (False, True)
    )

    assert max(single) <= 1.05 * min(others.values())
    assert len(single) == 1  # all kernels give the same bits
    assert max(double) < 1e-14
    scaled = [value for name, value in others.items() if "NeMo" in name or "get_ema_avg_fn" in name]
    assert len(scaled) == 2
    assert min(scaled) > 10 * max(single)


def test_device_benchmark_runs_on_a_device_made_of_host_memory() -> None:
    rows = device.compared(Accelerator("test:0", InlineBackend()), "host memory", 100_000, rounds=2)

    assert [row.aim for row in rows] == ["≤ 2", "none", "≤ 2"]
    assert all(row.ratio.low > 0 for row in rows)


def test_table_without_a_device_says_how_to_measure_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert "`python -m benchmarks device`" in device.measure(quick=True).markdown()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_benchmark_without_a_cuda_device_says_so() -> None:
    section = gpu_step.measure(quick=True)

    assert section.rows == ()
    assert "No CUDA device here" in section.markdown()


@pytest.mark.parametrize("rounds", [1, 3])
def test_trainer_reports_on_a_gpu_become_rows(rounds: int) -> None:
    arm = {"step_s": 0.1, "blocked_s": 0.0005, "skipped": 0.0, "memory": 1.0}
    reports = {name: {**arm, "step_s": 0.1 + n / 1000, "memory": 1.0 + n} for n, name in enumerate(gpu_trainer.ARMS)}

    rows = gpu_step.rows("87 M", [reports] * rounds)

    assert rows[0].what == "87 M: `attach`"
    assert rows[0].ours.startswith("+1.00 ms (+1.00 to +1.00); blocked 0.50 ms")
    assert rows[0].ratio.median == pytest.approx(1 / 3)


def test_average_on_a_device_equals_the_default() -> None:
    model = nn.BatchNorm1d(3)
    here, there = rival.ModelEma(model, 0.9), rival.ModelEma(model, 0.9, torch.device("cpu"))
    nn.init.normal_(model.weight)
    model.running_mean = torch.randn(3)

    here.update(model)
    there.update(model)

    for ours, theirs in zip(here._average.state_dict().values(), there._average.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs)


def test_arms_alternate_and_the_first_round_is_discarded() -> None:
    called: list[str] = []

    def arm(name: str) -> float:
        called.append(name)
        return float(len(called))

    found = interleaved(2, ours=lambda: arm("A"), rival=lambda: arm("B"))

    assert called == ["A", "B"] * 3
    assert found == {"ours": [3.0, 5.0], "rival": [4.0, 6.0]}


def test_ratio_is_taken_per_round() -> None:
    assert Spread.ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Spread(2.0, 1.0, 3.0)


def test_figures_show_median_minimum_and_maximum() -> None:
    section = Section("title", "rival", (Row("what", "1 s", "2 s", Spread(0.5, 0.25, 12.345), "≤ 1"),), "note")

    assert section.markdown().splitlines()[-3:] == ["| what | 1 s | 2 s | 0.50 (0.25 to 12.3) | ≤ 1 |", "", "note"]


def test_writing_replaces_only_the_tables_of_its_mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    gpu = "<!-- measured on a GPU -->\nsome\n<!-- end -->\nafter\n"
    readme.write_text(f"before\n<!-- measured -->\nold \\1\n<!-- end -->\n{gpu}")
    monkeypatch.setattr(command, "README", readme)

    command.write("new \\1", "measured")
    command.write("newer \\1", "measured")

    assert readme.read_text() == f"before\n<!-- measured -->\n\nnewer \\1\n\n<!-- end -->\n{gpu}"
    command.write("other", "measured on a GPU")
    assert readme.read_text().endswith("<!-- end -->\n<!-- measured on a GPU -->\n\nother\n\n<!-- end -->\nafter\n")


@pytest.mark.parametrize("has_gpu", [False, True])
def test_tables_of_a_gpu_are_replaced_only_where_one_is(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    regions = dict(command.regions())

    assert regions.pop("measured on a GPU", []) == (list(command.GPU_BENCHMARKS) if has_gpu else [])
    assert {*regions.pop("measured"), *command.GPU_BENCHMARKS} == set(command.BENCHMARKS)
    assert regions == {}


@pytest.mark.parametrize(
    ("names", "written"),
    [([], ["measured", "measured on a GPU"]), (["device", "gpu_step"], ["measured on a GPU"]), (["device"], None)],
)
def test_write_takes_all_names_or_those_of_a_gpu(
    names: list[str], written: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(command, "report", lambda names, quick: iter(()))
    monkeypatch.setattr(command, "write", lambda text, mark: marks.append(mark))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--write", *names])

    if written is None:
        with pytest.raises(SystemExit):
            command.main()
    else:
        command.main()
    assert marks == (written or [])


def test_readme_has_the_marks_for_the_tables() -> None:
    text = command.README.read_text()
    measured, gpu = text.index("<!-- measured -->\n"), text.index("<!-- measured on a GPU -->\n")
    ends = [text.index("<!-- end -->\n"), text.rindex("<!-- end -->\n")]

    assert measured < ends[0] < gpu < ends[1]
    for name in command.BENCHMARKS:
        begin, end = (gpu, ends[1]) if name in command.GPU_BENCHMARKS else (measured, ends[0])
        assert f"### {name}:" in text[begin:end]


def test_results_are_written_as_json_after_each_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = Row("what", "1 s", "2 s", Spread(0.5, 0.25, 2.0), "≤ 1")
    monkeypatch.setattr(command, "BENCHMARKS", {name: lambda quick: Section("t", "r", (row,)) for name in ("a", "b")})
    file = tmp_path / "results.json"
    report = command.report(["a", "b"], quick=True, json_file=file)

    next(report)
    next(report)
    first = json.loads(file.read_text())
    next(report)
    second = json.loads(file.read_text())

    assert (list(first["benchmarks"]), list(second["benchmarks"])) == (["a"], ["a", "b"])
    assert second["quick"] is True
    assert second["versions"].startswith("Python ")
    assert second["benchmarks"]["b"]["rows"][0]["ratio"] == {"median": 0.5, "low": 0.25, "high": 2.0}
