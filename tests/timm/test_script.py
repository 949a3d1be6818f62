"""`python -m trainer_client.timm`: a script runs unchanged, and its average is kept by a server.

Most tests run a stand-in of timm around timm's own averaging file, since timm itself requires torchvision. The last one
runs timm's own train.py on images where `TIMM_TRAIN_PY` says where it is and torchvision can be imported:
`TIMM_TRAIN_PY=pytorch-image-models/train.py PYTHONPATH=pytorch-image-models pytest tests/timm`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.oracle import EPS32, largest_difference
from support.processes import ServerProcess
from support.real_timm import model_ema

_SCRIPT = Path(__file__).parent / "stand_in_train.py"
_TRAIN_PY = os.environ.get("TIMM_TRAIN_PY", "")
_BOUND = 60 * 9 * EPS32 * 4.0
_ROOT = Path(__file__).parents[2]

_TASK = """
from timm.utils.model_ema import ModelEmaV3
class ClassificationTask:
    trainable_module_ema = None
    def __init__(self, model): self.model = model
    def get_trainable_module(self, ema=False): return self.trainable_module_ema if ema else self.model
    def setup_ema(self, **given): self.trainable_module_ema = ModelEmaV3(self.model, **given)
    def update_ema(self, step):
        if self.trainable_module_ema is not None: self.trainable_module_ema.update(self.model, step=step)
"""


@pytest.fixture
def timm(tmp_path: Path) -> Path:
    """A folder with a package `timm`, whose averaging file is timm's own."""
    package = tmp_path / "site" / "timm"
    for folder in ("utils", "task"):
        (package / folder).mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '1.0.stand-in'\n")
    (package / "utils" / "__init__.py").write_text("from .model_ema import ModelEmaV3\n")
    shutil.copy(str(model_ema().__file__), package / "utils" / "model_ema.py")
    (package / "task" / "__init__.py").write_text("from .task import ClassificationTask\n")
    (package / "task" / "task.py").write_text(_TASK)
    return package


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server; each test has its own run."""
    with ServerProcess(tmp_path_factory.mktemp("shared") / "data") as process:
        yield process


def _run(*command: object, site: Path | str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(_ROOT), str(_ROOT / "proto"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _env(server: ServerProcess, run: str) -> dict[str, str]:
    return {"EMA_ENDPOINT": server.zmq, "EMA_URL": server.http, "EMA_RUN": run}


def _outputs(tmp_path: Path, *names: str) -> list[Path]:
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


def _compare(one: Path, other: Path) -> float:
    """The largest difference of two checkpoints; the trained weights must be bit-identical."""
    here, there = (torch.load(path, weights_only=False) for path in (one, other))
    assert largest_difference(here["state_dict"], there["state_dict"]) == 0
    return largest_difference(here["state_dict_ema"], there["state_dict_ema"])


def test_same_command_gives_the_same_average_and_metrics(tmp_path: Path, timm: Path, server: ServerProcess) -> None:
    inside, outside = _outputs(tmp_path, "inside", "outside")
    command = (_SCRIPT, "data", "--model-ema", "--model-ema-decay", "0.95", "--model-ema-warmup", "--output")
    plain = _run(*command, inside, site=timm.parent)
    remote = _run("-m", "trainer_client.timm", *command, outside, site=timm.parent, env=_env(server, "same"))

    assert (plain.returncode, remote.returncode) == (0, 0), remote.stderr
    assert plain.stdout.count("(EMA)") == 3
    assert plain.stdout == remote.stdout
    for epoch in range(3):
        name = f"checkpoint-{epoch}.pth.tar"
        assert _compare(inside / name, outside / name) <= _BOUND
    for text in ("1.0.stand-in", "timm.task.task.ModelEmaV3", "timm.utils.ModelEmaV3", "run same"):
        assert text in remote.stderr
    status = server.get("/v1/runs/same")
    assert (status["state"], status["step"], status["gap_steps"]) == ("finished", 60, 0)


@pytest.mark.parametrize("flag", ["--model-ema-force-cpu", "--model-ema-f"])
def test_force_cpu_no_longer_disables_validation(tmp_path: Path, timm: Path, server: ServerProcess, flag: str) -> None:
    (outside,) = _outputs(tmp_path, "outside")
    command = ("-m", "trainer_client.timm", _SCRIPT, "data", "--model-ema", flag, "--epochs", 1, "--output", outside)
    remote = _run(*command, site=timm.parent, env=_env(server, f"forced{len(flag)}"))

    assert remote.stdout.count("(EMA)") == 1
    assert "is not passed on" in remote.stderr


@pytest.mark.parametrize("resumed", ["cut", "new"])
def test_interrupted_training_resumes_from_its_checkpoint(
    tmp_path: Path, timm: Path, server: ServerProcess, resumed: str
) -> None:
    """In the run that it had, which stays open when the script fails, or in a new one."""
    inside, outside = _outputs(tmp_path, "inside", "outside")
    first = f"cut-before-{resumed}"
    command = (_SCRIPT, "data", "--model-ema", "--model-ema-decay", "0.98", "--model-ema-warmup", "--output")
    ours = ("-m", "trainer_client.timm", *command, outside)
    assert _run(*command, inside, site=timm.parent).returncode == 0
    cut = _run(*ours, "--fail-after", 1, site=timm.parent, env=_env(server, first))
    assert cut.returncode == 1
    assert "the disk of the trainer is full" in cut.stderr
    assert server.get(f"/v1/runs/{first}")["state"] != "finished"

    checkpoint, run = outside / "checkpoint-1.pth.tar", first if resumed == "cut" else "new"
    again = _run(*ours, "--resume", checkpoint, site=timm.parent, env=_env(server, run))
    assert again.returncode == 0, again.stderr
    assert _compare(inside / "checkpoint-2.pth.tar", outside / "checkpoint-2.pth.tar") <= _BOUND
    assert server.get(f"/v1/runs/{run}")["state"] == "finished"


def _changed(timm: Path, before: str, after: str, name: str = "utils/model_ema.py") -> None:
    text = (timm / name).read_text()
    assert before in text
    (timm / name).write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("class ModelEmaV3", "class ModelEmaV4"), "ModelEmaV3"),
        (("exclude_buffers: bool = False", "exclude_buffers: bool = False, sharded=False"), "sharded differ"),
        (
            ("def update(self, model, step: Optional[int] = None)", "def update(self, model, epoch, step=None)"),
            "update()",
        ),
        (("from timm.utils.model_ema import ModelEmaV3", "class ModelEmaV3: pass", "task/task.py"), "RemoteModelEma"),
    ],
    ids=["another class", "another parameter", "another call", "a class of the task's own"],
)
def test_unknown_timm_version_is_refused_before_anything_runs(
    tmp_path: Path, timm: Path, change: tuple[str, ...], says: str
) -> None:
    if change[0].startswith("class"):
        (timm / "utils" / "__init__.py").write_text("")
        (timm / "task" / "task.py").write_text(_TASK.replace("ModelEmaV3", "ModelEmaV4"))
    _changed(timm, *change)
    refused = _run("-m", "trainer_client.timm", _SCRIPT, "data", "--model-ema", "--output", tmp_path, site=timm.parent)

    assert refused.returncode == 2
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list(tmp_path.glob("*.tar"))


def test_script_with_its_own_averaging_is_refused(tmp_path: Path, timm: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("print('I ran')\n")
    refused = _run("-m", "trainer_client.timm", script, site=timm.parent)

    assert refused.returncode == 2
    assert "Use RemoteModelEma in the script instead" in refused.stderr
    assert refused.stdout == ""


def test_script_that_makes_no_requested_average_says_so(tmp_path: Path, timm: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("from timm.utils import ModelEmaV3\n")

    assert _run("-m", "trainer_client.timm", script, site=timm.parent).returncode == 0
    ended = _run("-m", "trainer_client.timm", script, "--model-ema", site=timm.parent)
    assert ended.returncode == 2
    assert "nothing was averaged" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [([], 2, "usage:"), (["--help"], 0, "usage:"), (["no/such/train.py"], 2, "no/such/train.py is no file")],
    ids=str,
)
def test_wrong_arguments_are_one_line(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    ended = _run("-m", "trainer_client.timm", *arguments, site=tmp_path)

    assert ended.returncode == code
    assert says in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_missing_timm_or_server_is_named(tmp_path: Path, timm: Path) -> None:
    (tmp_path / "none" / "timm").mkdir(parents=True)
    (tmp_path / "none" / "timm" / "__init__.py").write_text("import torchvision_that_is_not_there\n")
    command = ("-m", "trainer_client.timm", _SCRIPT, "data", "--model-ema", "--output", tmp_path)
    missing = _run(*command, site=tmp_path / "none")
    assert missing.returncode == 2
    assert "torchvision_that_is_not_there" in missing.stderr

    alone = _run(*command, site=timm.parent, env={"EMA_ENDPOINT": "tcp://127.0.0.1:9", "EMA_RUN": "r"})
    assert alone.returncode == 2
    assert "nothing listens at tcp://127.0.0.1:9" in alone.stderr
    assert "Traceback" not in alone.stderr


def _images(root: Path) -> None:
    """Digits of scikit-learn as image files, four classes of them."""
    images: Any = pytest.importorskip("PIL.Image")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    for index, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / ("train" if index % 4 else "validation") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        if digit < 4:
            images.fromarray((image * 15.9).astype("uint8")).resize((32, 32)).convert("RGB").save(
                folder / f"{index}.png"
            )
    for folder in root.glob("*/[4-9]"):
        folder.rmdir()


@pytest.mark.timeout(600)
@pytest.mark.skipif(not _TRAIN_PY, reason="TIMM_TRAIN_PY does not say where timm's train.py is")
def test_timms_own_script_trains_three_epochs_with_the_same_result(tmp_path: Path, server: ServerProcess) -> None:
    _images(tmp_path / "data")
    command = (
        *(_TRAIN_PY, tmp_path / "data", "--model", "test_resnet", "--device", "cpu", "--num-classes", 4),
        *("--img-size", 32, "--batch-size", 32, "--epochs", 3, "--warmup-epochs", 0, "--cooldown-epochs", 0),
        *("--lr", 0.05, "--workers", 1, "--model-ema", "--model-ema-decay", 0.95, "--model-ema-warmup"),
        *("--output", tmp_path / "out", "--experiment"),
    )
    plain = _run(*command, "inside", site="")
    remote = _run("-m", "trainer_client.timm", *command, "outside", site="", env=_env(server, "own-script"))

    assert (plain.returncode, remote.returncode) == (0, 0), plain.stderr + remote.stderr
    inside, outside = tmp_path / "out" / "inside", tmp_path / "out" / "outside"
    assert _compare(inside / "last.pth.tar", outside / "last.pth.tar") <= _BOUND
    assert (inside / "summary.csv").read_text() == (outside / "summary.csv").read_text()
