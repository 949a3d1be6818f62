"""Train on the digits, synthesise power averages of many widths, and plot the accuracy of each.

    pip install '.[demo]' --group plots && python scripts/plot_sigma_rel.py docs/guides/sigma_rel.svg

A real server keeps two power averages and their ring while a network trains; all widths are synthesised after that,
downloaded, and evaluated on the half of the images that was held out. Some widths are also kept during the run for
comparison. Prints all figures as JSON, and plots those without a warning of the server. Takes a minute per seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import torch
from torch.nn.functional import cross_entropy

from ema_cli.demo.child import Child
from ema_cli.demo.digits import DigitNet, held_out_accuracy, load
from ema_proto.averages.rules import AverageSpec
from ema_reader import Reader
from trainer_client import EmaClient, PowerEma, Raw

STEPS = 5000
RING_STEPS = 125
KEPT = (0.05, 0.1)
ALSO_KEPT = (0.02, 0.03, 0.15, 0.2, 0.25)
SYNTHESISED = (0.02, 0.025, 0.03, 0.04, 0.06, 0.075, 0.09, 0.12, 0.15, 0.175, 0.2, 0.225, 0.25)
_BATCH_IMAGES = 8
_START_S = 60.0

Accuracies: TypeAlias = Mapping[str, dict[float, float]]  # "synthesised" or "kept": accuracy by sigma_rel; "raw": at 0


def measure(seeds: list[int], folder: Path) -> list[Accuracies]:
    """Train once for each seed; the accuracies of its averages."""
    command = ["-m", "ema_cli", "serve", "--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0"]
    command += ["--data", str(folder / "data"), "--ring-size", "64"]
    with Child("server", command, folder / "server.log") as server:
        addresses = server.first_line(_START_S)
        with Reader(addresses["http"]) as reader:
            return [_measure_one(reader, addresses["zmq"], seed) for seed in seeds]


def _measure_one(reader: Reader, endpoint: str, seed: int) -> Accuracies:
    run, beside = f"digits-{seed}", f"digits-{seed}-kept"
    _train(endpoint, {run: (Raw(), *map(PowerEma, KEPT)), beside: tuple(map(PowerEma, ALSO_KEPT))}, seed)
    kept = {width: _accuracy(reader, run, f"power-{width:g}") for width in KEPT}
    kept |= {width: _accuracy(reader, beside, f"power-{width:g}") for width in ALSO_KEPT}
    synthesised: dict[float, float] = {}
    doubtful: dict[float, float] = {}
    for width in SYNTHESISED:
        made = reader.derived.synthesize(run, sigma_rel=width)
        which = synthesised if made.warning is None else doubtful
        which[width] = _accuracy(reader, run, made.version.average)
    raw = {0.0: _accuracy(reader, run, "raw")}
    return {"raw": raw, "kept": kept, "synthesised": synthesised, "doubtful": doubtful}


def _train(endpoint: str, runs: Mapping[str, tuple[AverageSpec, ...]], seed: int) -> None:
    """The demo's recipe, a constant high learning rate and small batches, streamed into several runs at once."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    digits, model = load(), DigitNet()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.005, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-4)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(EmaClient(endpoint, run, averages, when_behind="wait"))
            for run, averages in runs.items()
        ]
        for client in clients:
            client.attach(model, optimizer)
        for step in range(1, STEPS + 1):
            batch = torch.randint(len(digits.train_labels), (_BATCH_IMAGES,))
            optimizer.zero_grad()
            cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch]).backward()
            optimizer.step()
            if step % RING_STEPS == 0 and not clients[0].checkpoint(step):
                raise RuntimeError(f"no generation of step {step}, so none in the ring: {clients[0].stats()}")


def _accuracy(reader: Reader, run: str, average: str) -> float:
    model = DigitNet()
    model.load_state_dict(reader.load(reader.version(run, average)))
    return held_out_accuracy(model)


def draw(found: list[Accuracies], file: Path) -> None:
    """Draw the mean over the seeds, and each of them faintly."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for number, one in enumerate(found):
        label = f"each of {len(found)} runs" if not number else None
        axis.plot(
            *_percent(one["synthesised"] | {w: one["kept"][w] for w in KEPT}),
            color="#0072b2",
            alpha=0.25,
            lw=1,
            label=label,
        )
    mean = {kind: _mean([one[kind] for one in found]) for kind in ("raw", "kept", "synthesised")}
    line = mean["synthesised"] | {width: mean["kept"][width] for width in KEPT}
    axis.plot(*_percent(line), color="#0072b2", lw=2, label="synthesised after the run, mean")
    axis.plot(*_percent({w: mean["kept"][w] for w in KEPT}), "o", color="#d55e00", label="the two that it is made of")
    axis.plot(
        *_percent({w: mean["kept"][w] for w in ALSO_KEPT}), "o", mfc="none", color="#d55e00", label="kept as well"
    )
    axis.axhline(100 * mean["raw"][0.0], color="#666666", ls="--", lw=1.2, label="the last weights")
    axis.set_xlabel("width of the profile, sigma_rel", fontsize=10)
    axis.set_ylabel("accuracy on held-out digits, %", fontsize=10)
    axis.legend(frameon=False, fontsize=9, loc="center")
    axis.spines[["top", "right"]].set_visible(False)
    with mpl.rc_context({"svg.hashsalt": "ema-sidecar", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None, "Creator": None})


def _mean(of: list[dict[float, float]]) -> dict[float, float]:
    """Of the widths that all of them have."""
    return {width: fmean(one[width] for one in of) for width in of[0] if all(width in one for one in of)}


def _percent(by_width: Mapping[float, float]) -> tuple[list[float], list[float]]:
    widths = sorted(by_width)
    return widths, [100 * by_width[width] for width in widths]


def main() -> None:
    """Read the command line, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.seeds, Path(folder))
    print(json.dumps({"seeds": given.seeds, "accuracies": found}))
    draw(found, given.file)


if __name__ == "__main__":
    main()
