"""Which files `files=` stands for, and which it refuses."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ema_proto import limits
from trainer_client.companions import read_companions
from trainer_client.errors import SettingsError

CONFIG = b'{"model_type": "llama"}'


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONFIG if path.name == "config.json" else name.encode())
    return folder


def names(*paths: Path, config: str | None = None) -> list[str]:
    return [file.spec.name for file in read_companions(paths, config).files]


def test_a_checkpoint_of_transformers_gives_what_from_pretrained_needs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = ["README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    inner = ["additional_chat_templates/tool_use.jinja"]
    left_out = ["model.safetensors", "model.safetensors.index.json", "optimizer.pt", "rng_state.pth", "scheduler.pt"]
    left_out += ["trainer_state.json", "training_args.bin", ".gitattributes", "my notes.txt", "version.json"]
    left_out += ["checkpoint-500/model.safetensors", "checkpoint-500/tokenizer.json", "runs/host/events.out.tfevents.1"]
    write(tmp_path, *kept, *inner, *left_out, "config.json")

    with caplog.at_level(logging.INFO, "ema"):
        read = read_companions([tmp_path], None)

    assert [file.spec.name for file in read.files] == [kept[0], *inner, *kept[1:]]
    assert read.config == CONFIG.decode()
    (line,) = caplog.messages
    assert "companion files (5, of " in line
    assert "model.safetensors" in line


def test_a_folder_of_diffusers_leaves_out_the_models_in_it(tmp_path: Path) -> None:
    write(tmp_path, "model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt")
    write(tmp_path, "unet/config.json", "unet/diffusion_pytorch_model.safetensors")

    assert names(tmp_path) == ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt"]


def test_files_that_are_links_are_followed_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "blobs", "0123")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "tokenizer.json").symlink_to(tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "dangling.json").symlink_to(tmp_path / "blobs" / "none")

    assert names(tmp_path / "snapshot") == ["tokenizer.json"]


def test_files_and_folders_can_be_listed_together(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer/vocab.txt", "README.md", "weights.bin")

    assert names(tmp_path / "tokenizer", tmp_path / "README.md", tmp_path / "weights.bin") == ["vocab.txt", "README.md"]
    assert names() == []


def test_config_that_is_given_goes_before_a_folders_and_excludes_a_file(tmp_path: Path) -> None:
    write(tmp_path, "config.json", "a.json")

    read = read_companions([tmp_path], "{}")

    assert (read.config, [file.spec.name for file in read.files]) == ("{}", ["a.json"])
    with pytest.raises(SettingsError, match="give one of them"):
        read_companions([tmp_path / "config.json"], "{}")


def test_content_and_digest_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()

    (file,) = read_companions([tmp_path], None).files

    assert (file.data, file.spec.nbytes) == (b"", 0)
    assert file.spec.sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("name", ["my notes.txt", ".hidden", "version.json", "generation.json", "größe.txt"])
def test_a_listed_file_with_a_name_that_is_not_allowed_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="file name"):
        read_companions([write(tmp_path, name) / name], None)


def test_what_cannot_be_read_or_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"none\.json' cannot be read: No such file"):
        read_companions([tmp_path / "none.json"], None)
    write(tmp_path, "a/x.json", "b/x.json")
    with pytest.raises(SettingsError, match="name of another"):
        read_companions([tmp_path / "a", tmp_path / "b"], None)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(limits.FILE_BYTES_MAX + 1)
    with pytest.raises(SettingsError, match=r"large\.json' is over the limit"):
        read_companions([tmp_path], None)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(limits.FILE_BYTES_MAX)
    monkeypatch.setattr("trainer_client.companions.FILES_BYTES_MAX", limits.FILE_BYTES_MAX)
    with pytest.raises(SettingsError, match="in all"):
        read_companions([tmp_path], None)
    monkeypatch.setattr("trainer_client.companions.FILES_MAX", 1)
    with pytest.raises(SettingsError, match="over the limit of 1"):
        read_companions([tmp_path], None)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SettingsError, match="config is not a JSON object"):
        read_companions([tmp_path / "config.json"], None)
