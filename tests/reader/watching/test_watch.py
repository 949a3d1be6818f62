"""A watched folder: its versions and link, and what engines and commands are told."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ema_reader import Reader, ReaderError, Version
from ema_reader.errors import UsageError
from ema_reader.watching.folder import WatchedFolder
from ema_reader.watching.targets import Command, Target, parse_engine
from ema_reader.watching.watch import Watch
from ema_server.runs.status_store import RunState
from support.served import WAIT_S, Served
from support.stand_in_engine import Engine, engine
from support.waiting import eventually

NAMES = ["ema-0.9"]


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "a folder"


@pytest.fixture
def sglang() -> Iterator[Engine]:
    with engine() as made:
        yield made


class Recorded:
    """A target that notes what it gets, and where the link led."""

    name = "recorded"

    def __init__(self, *errors: Exception) -> None:
        self.taken: list[tuple[str, str]] = []
        self._errors = list(errors)

    def take(self, version: Version, folder: Path, link: Path) -> None:
        assert link.resolve() == folder.resolve()
        assert json.loads((folder / "version.json").read_bytes())["id"] == version.id
        self.taken.append((version.id, folder.name))
        if self._errors:
            raise self._errors.pop(0)


def watching(reader: Reader, into: Path, *targets: Target, keep: int = 2) -> list[Version]:
    """Watch until the run is finished."""
    with WatchedFolder(into, "digits", "ema-0.9", keep) as folder:
        return list(Watch(reader, "digits", "ema-0.9", folder, targets, poll_s=0.05).deliveries())


def finish(served: Served, step: int) -> None:
    served.show("digits", step, NAMES, RunState.FINISHED)


def versions_in(into: Path) -> list[str]:
    return sorted(path.name for path in into.iterdir() if path.name.startswith("step-"))


def test_newest_version_is_downloaded_linked_and_delivered(served: Served, reader: Reader, into: Path) -> None:
    served.publish("digits", 100)
    newest = served.publish("digits", 200).versions[0]
    finish(served, 200)
    target = Recorded()

    delivered = watching(reader, into, target)

    name = f"step-200-{newest.id[:12]}"
    assert [version.id for version in delivered] == [newest.id]
    assert target.taken == [(newest.id, name)]
    assert os.readlink(into / "current") == name  # noqa: PTH115 -- the text, not a path
    weights = (newest.folder / "model.safetensors").read_bytes()
    assert (into / "current" / "model.safetensors").read_bytes() == weights


def test_each_new_version_is_delivered_while_the_link_always_leads_to_a_whole_one(
    served: Served, reader: Reader, into: Path
) -> None:
    first = served.publish("digits", 100)
    target, broken, stopped = Recorded(), [], threading.Event()
    found: list[Version] = []
    thread = threading.Thread(target=lambda: found.extend(watching(reader, into, target)))
    thread.start()
    eventually(lambda: len(target.taken) == 1, "the first version", WAIT_S)

    def look() -> None:
        while not stopped.is_set():
            try:
                json.loads((into / "current" / "version.json").read_bytes())
            except (OSError, ValueError) as error:
                broken.append(error)

    looking = threading.Thread(target=look)
    looking.start()
    others = []
    for step in (200, 300, 400):
        others.append(served.publish("digits", step))
        eventually(lambda: len(target.taken) == len(others) + 1, f"step {step}", WAIT_S)
    stopped.set()
    looking.join(WAIT_S)
    finish(served, 400)
    thread.join(WAIT_S)

    published = [generation.versions[0].id for generation in (first, *others)]
    assert [version.id for version in found] == [taken for taken, _ in target.taken] == published
    assert broken == []


@pytest.mark.parametrize(("keep", "steps"), [(1, [300]), (2, [200, 300])])
def test_older_versions_and_incomplete_ones_are_deleted(
    served: Served, reader: Reader, into: Path, keep: int, steps: Sequence[int]
) -> None:
    (into / "step-50-0123456789ab").mkdir(parents=True)
    (into / "mine").mkdir()
    published = {}
    for step in (100, 200, 300):
        published[step] = served.publish("digits", step).versions[0]
        finish(served, step)
        watching(reader, into, keep=keep)

    assert versions_in(into) == [f"step-{step}-{published[step].id[:12]}" for step in steps]
    assert (into / "mine").exists()


def test_old_version_that_cannot_be_deleted_is_only_logged(
    served: Served, reader: Reader, into: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    for step in (100, 200):
        served.publish("digits", step)
        finish(served, step)
        assert len(watching(reader, into, keep=1)) == 1

    assert "step-100" in caplog.text
    assert "resource busy" in caplog.text


def test_delivered_version_is_not_delivered_again(served: Served, reader: Reader, into: Path) -> None:
    served.publish("digits", 100)
    finish(served, 100)
    watching(reader, into)
    target = Recorded()

    assert watching(reader, into, target) == []
    (into / "current").unlink()
    assert len(watching(reader, into, target)) == 1
    assert len(target.taken) == 1


def test_sglang_is_given_the_folder_and_the_version_as_label(
    served: Served, reader: Reader, into: Path, sglang: Engine
) -> None:
    version = served.publish("digits", 100).versions[0]
    finish(served, 100)

    watching(reader, into, parse_engine(f"sglang={sglang.url}", "key"))

    [(path, body, authorization)] = sglang.requests
    assert path == "/update_weights_from_disk"
    folder = into / f"step-100-{version.id[:12]}"
    assert body == {"model_path": str(folder), "weight_version": version.id}
    assert authorization == "Bearer key"


def test_vllm_is_paused_reloads_is_labelled_and_resumes(
    served: Served, reader: Reader, into: Path, sglang: Engine
) -> None:
    version = served.publish("digits", 100).versions[0]
    finish(served, 100)
    sglang.answers["/update_weight_version"] = (404, {"detail": "Not Found"})  # an older release

    watching(reader, into, parse_engine(f"vllm={sglang.url}", None))

    assert sglang.paths == ["/pause?mode=wait", "/collective_rpc", "/update_weight_version", "/resume"]
    assert sglang.requests[1][1]["method"] == "reload_weights"
    assert sglang.requests[2][1] == {"new_version": version.id}


def test_vllm_resumes_although_it_could_not_load(served: Served, reader: Reader, into: Path, sglang: Engine) -> None:
    served.publish("digits", 100)
    finish(served, 100)
    sglang.answers["/collective_rpc"] = (400, {"error": "no such method"})

    with WatchedFolder(into, "digits", "ema-0.9", 2) as folder:
        watch = Watch(reader, "digits", "ema-0.9", folder, [parse_engine(f"vllm={sglang.url}", None)], poll_s=0.05)
        assert list(watch.deliveries()) == []

    assert sglang.paths == ["/pause?mode=wait", "/collective_rpc", "/resume"]
    assert "no such method" in str(watch.failure)


def test_engine_that_is_away_is_asked_again_until_it_answers(
    served: Served, reader: Reader, into: Path, sglang: Engine
) -> None:
    version = served.publish("digits", 100).versions[0]
    finish(served, 100)
    sglang.answers["/update_weights_from_disk"] = (503, {"message": "starting"})
    found: list[Version] = []
    target = parse_engine(f"sglang={sglang.url}", None)
    thread = threading.Thread(target=lambda: found.extend(watching(reader, into, target)))
    thread.start()

    eventually(lambda: len(sglang.requests) >= 2, "a second request", WAIT_S)
    assert found == []
    sglang.answers.clear()
    thread.join(WAIT_S)

    assert [each.id for each in found] == [version.id]


@pytest.mark.parametrize("answer", [(400, {"success": False, "message": "shapes"}), (200, {"success": False})])
def test_refused_version_is_left_out_and_the_next_one_delivered(
    served: Served, reader: Reader, into: Path, sglang: Engine, answer: tuple[int, object]
) -> None:
    refused = served.publish("digits", 100).versions[0]
    sglang.answers["/update_weights_from_disk"] = answer
    target = parse_engine(f"sglang={sglang.url}", None)
    with WatchedFolder(into, "digits", "ema-0.9", 2) as folder:
        watch = Watch(reader, "digits", "ema-0.9", folder, [target], poll_s=0.05)
        found: list[Version] = []
        thread = threading.Thread(target=lambda: found.extend(watch.deliveries()))
        thread.start()
        eventually(lambda: watch.failure is not None, "the refusal", WAIT_S)
        sglang.answers.clear()
        accepted = served.publish("digits", 200).versions[0]
        eventually(lambda: bool(found), "the next version", WAIT_S)
        finish(served, 200)
        thread.join(WAIT_S)

    assert sglang.labels() == [refused.id, accepted.id]
    assert [version.id for version in found] == [accepted.id]
    assert watch.failure is None


def test_version_that_is_pruned_while_it_is_awaited_gives_way_to_the_next(
    served: Served, reader: Reader, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = served.publish("digits", 100)
    download = reader.download

    def prune_first(version: Version, folder: Path) -> Path:
        if version.id == pruned.versions[0].id:
            served.catalog.remove(pruned, force=True)
            served.publish("digits", 200)
            finish(served, 200)
        return download(version, folder)

    monkeypatch.setattr(reader, "download", prune_first)

    assert [version.step for version in watching(reader, into)] == [200]


@pytest.mark.process
def test_command_gets_its_words_replaced_and_no_shell(
    served: Served, reader: Reader, into: Path, tmp_path: Path
) -> None:
    version = served.publish("digits", 100).versions[0]
    finish(served, 100)
    noted = tmp_path / "noted"
    program = "import json, sys; open(sys.argv[1], 'w').write(json.dumps(sys.argv[2:]))"
    words = f"'{noted}' {{path}} {{link}} {{step}} '{{run}}/{{average}}' {{version}} '$(id) {{json}}'"

    watching(reader, into, Command(f'{sys.executable} -c "{program}" {words}'))

    folder = into / f"step-100-{version.id[:12]}"
    assert json.loads(noted.read_text()) == [
        str(folder),
        str(into / "current"),
        "100",
        "digits/ema-0.9",
        version.id,
        "$(id) {json}",
    ]


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "text"),
    [(f"{sys.executable} -c 'exit(3)'", "exit code 3"), ("/no/such/program {path}", "cannot be started")],
)
def test_command_that_fails_is_a_refusal(served: Served, reader: Reader, into: Path, command: str, text: str) -> None:
    served.publish("digits", 100)
    finish(served, 100)
    with WatchedFolder(into, "digits", "ema-0.9", 2) as folder:
        watch = Watch(reader, "digits", "ema-0.9", folder, [Command(command)], poll_s=0.05)
        assert list(watch.deliveries()) == []

    assert text in str(watch.failure)


@pytest.mark.parametrize("text", ["", "  ", "'open"])
def test_command_without_words_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--cmd"):
        Command(text)


@pytest.mark.parametrize("text", ["sglang", "tgi=http://host", "http://127.0.0.1:1", "vllm=ftp://host"])
def test_engine_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"sglang=URL|http or https"):
        parse_engine(text, None)


def test_folder_of_another_average_is_refused(served: Served, reader: Reader, into: Path) -> None:
    served.publish("digits", 100)
    finish(served, 100)
    watching(reader, into)

    with WatchedFolder(into, "digits", "raw", 2) as folder, pytest.raises(UsageError, match=r"digits/ema-0\.9"):
        folder.delivered()


def test_second_watch_into_the_same_folder_is_refused(into: Path) -> None:
    with (
        WatchedFolder(into, "digits", "raw", 2),
        pytest.raises(ReaderError, match="another ema watch"),
        WatchedFolder(into, "digits", "raw", 2),
    ):
        pass


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b'{"owner": 1}', b'{"owner": {}, "version": 1}'])
def test_damaged_state_is_taken_as_nothing_delivered(served: Served, reader: Reader, into: Path, state: bytes) -> None:
    served.publish("digits", 100)
    finish(served, 100)
    watching(reader, into)
    (into / ".watch.json").write_bytes(state)

    assert len(watching(reader, into)) == 1
