"""PEFT: the active adapter is streamed as PEFT saves it, and a downloaded average is a folder that PEFT loads."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import DataParallel
from torch.optim import SGD

from ema_reader import Reader
from support.fake_worker import OfflineClient
from support.processes import ServerProcess
from support.small_llama import write_small_llama
from trainer_client import EmaClient, PlanError
from trainer_client.model.adapters import Adapter
from trainer_client.model.plan import Plan
from trainer_client.model.selection import Selection
from trainer_client.pulling.module_copy import ModuleCopy

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from trainer_client.transformers import EmaCallback

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")

_STEPS = 4
_DECAY = 0.9
_TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def _any_version_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 5.24 asks for a PEFT that does not exist yet before it does anything with adapters."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("peft") / "data") as process:
        yield process


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base model with its files, as `save_pretrained` writes them."""
    return write_small_llama(tmp_path_factory.mktemp("base"))


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lora(**given: Any) -> Any:
    return LoraConfig(r=2, lora_alpha=4, target_modules=_TARGETS, task_type="CAUSAL_LM", **given)


def one(config: Any) -> Callable[[Any], Any]:
    return lambda model: get_peft_model(model, config)


def two_adapters(model: Any) -> Any:
    peft_model = get_peft_model(model, lora(), adapter_name="first")
    peft_model.add_adapter("second", LoraConfig(r=3, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    peft_model.set_adapter("second")
    return peft_model


def added_to_transformers(model: Any) -> Any:
    model.add_adapter(lora(), adapter_name="added")
    return model


def without_task(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=_TARGETS))


KINDS: dict[str, Callable[[Any], Any]] = {
    "lora": one(lora()),
    "dora": one(lora(use_dora=True)),
    "lora with biases": one(lora(bias="all")),
    "modules_to_save": one(lora(modules_to_save=["lm_head"])),
    "embeddings targeted": one(LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")),
    "ia3": one(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "two adapters": two_adapters,
    "add_adapter of transformers": added_to_transformers,
    "without a task": without_task,
}


def optimizer_of(model: Any) -> SGD:
    return SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)


def train(model: Any, optimizer: SGD, after: Callable[[], None] = lambda: None) -> None:
    """Train on random tokens."""
    for _ in range(_STEPS):
        tokens = torch.randint(0, 20, (2, 8))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        after()


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """What `save_pretrained` writes of the active adapter."""
    name = next(iter(model.active_adapters() if callable(model.active_adapters) else model.active_adapters))
    extra = {"selected_adapters": [name]} if isinstance(model, PeftModel) else {}
    model.save_pretrained(folder, **extra)
    inner = folder / name
    return load_file((inner if inner.is_dir() else folder) / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_downloaded_average_loads_with_peft_and_is_the_float64_replay(
    server: ServerProcess, base_folder: Path, tmp_path: Path, kind: str
) -> None:
    torch.manual_seed(1)
    model = KINDS[kind](base(base_folder))
    replay: dict[str, Tensor] = {}
    run = kind.replace(" ", "-").replace("_", "-")

    def record() -> None:
        for name, tensor in saved(model, tmp_path / "saved").items():
            known = replay.setdefault(name, tensor.double())
            replay[name] = known + (1 - _DECAY) * (tensor.double() - known)

    with EmaClient(server.zmq, run=run, averages=["raw", f"ema:{_DECAY}"], when_behind="wait") as client:

        def after() -> None:
            client.update(model)
            record()

        train(model, optimizer_of(model), after)
    with Reader(server.http) as reader:
        for average in ("raw", "ema-0.9"):
            reader.download(reader.version(run, average), tmp_path / average)
        assert set(reader.load(reader.version(run, "raw"))) == set(replay)

    last, files = saved(model, tmp_path / "saved"), tmp_path / "raw" / "adapter_model.safetensors"
    raw, ema = load_file(files), load_file(tmp_path / "ema-0.9" / "adapter_model.safetensors")
    assert raw.keys() == ema.keys() == last.keys()
    for name, tensor in last.items():
        assert torch.equal(raw[name], tensor), name
        assert torch.allclose(ema[name].double(), replay[name], rtol=1e-6, atol=1e-8), name
    loaded = PeftModel.from_pretrained(base(base_folder), tmp_path / "ema-0.9").eval()
    again = saved(loaded, tmp_path / "again")
    assert again.keys() == ema.keys()
    for name, tensor in again.items():
        assert torch.equal(tensor, ema[name]), name


def test_the_last_version_gives_the_outputs_of_the_trained_model(
    server: ServerProcess, base_folder: Path, tmp_path: Path
) -> None:
    model = KINDS["modules_to_save"](base(base_folder))
    with EmaClient(server.zmq, run="outputs", averages=["raw"], when_behind="wait") as client:
        optimizer = optimizer_of(model)
        compiled: Any = torch.compile(model, backend="eager")
        client.attach(DataParallel(compiled), optimizer)
        train(model, optimizer)
    with Reader(server.http) as reader:
        folder = reader.download(reader.version("outputs", "raw"), tmp_path / "out")
    loaded = PeftModel.from_pretrained(base(base_folder), folder).eval()
    tokens = torch.arange(10)[None]

    assert torch.equal(loaded(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    assert config["base_model_name_or_path"] == str(base_folder)


def test_the_callback_of_the_trainer_streams_the_adapter_with_the_tokenizer(
    server: ServerProcess, base_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = KINDS["modules_to_save"](base(base_folder)), AutoTokenizer.from_pretrained(base_folder)
    tokens = [{"input_ids": torch.arange(number, number + 8), "labels": torch.arange(8)} for number in range(8)]
    given = TrainingArguments(tmp_path / "trainer", max_steps=3, report_to=[], use_cpu=True, save_strategy="no")
    callback = EmaCallback(server.zmq, "trainer", ["raw"], when_behind="wait")
    trainer = Trainer(model, given, train_dataset=tokens, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    with Reader(server.http) as reader:
        folder = reader.download(reader.version("trainer", "raw"), tmp_path / "out")

    expected = saved(model, tmp_path / "saved")
    loaded = saved(PeftModel.from_pretrained(base(base_folder), folder), tmp_path / "again")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    assert AutoTokenizer.from_pretrained(folder)("w3")["input_ids"] == [3]
    assert not (folder / "config.json").exists()


def test_the_config_is_the_one_that_save_pretrained_writes(base_folder: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        model = KINDS[kind](base(base_folder))
        saved(model, tmp_path / kind)
        adapter = Adapter.of(model)
        assert adapter is not None
        inner = tmp_path / kind / adapter.name
        written = (inner if inner.is_dir() else tmp_path / kind) / "adapter_config.json"
        ours, theirs = json.loads(adapter.config()), json.loads(written.read_text())
        if not isinstance(model, PeftModel):
            assert theirs.pop("inference_mode") is False  # transformers leaves it as in training
            assert ours.pop("inference_mode") is True
        # PEFT writes its sets in the order of this process; ours is the same in every process.
        config = vars(adapter.model.peft_config[adapter.name])
        unordered = {key for key, value in config.items() if isinstance(value, set)}
        assert ours == theirs | {key: sorted(theirs[key]) for key in unordered}, kind


def test_a_config_among_the_files_stays_as_it_is(server: ServerProcess, base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "mine": true}')
    (tmp_path / "README.md").write_text("# Mine\n")
    with EmaClient(server.zmq, run="mine", averages=["raw"], files=tmp_path) as client:
        client.update(KINDS["lora"](base(base_folder)))
    with Reader(server.http) as reader:
        folder = reader.download(reader.version("mine", "raw"), tmp_path / "out")

    assert json.loads((folder / "adapter_config.json").read_text())["mine"] is True
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_a_selection_streams_the_state_dicts_names(base_folder: Path) -> None:
    model = KINDS["lora"](base(base_folder))
    plan = Plan.of(model, Selection(include=("*lora*",)))

    assert {tensor.name for tensor in plan.manifest.tensors} == {name for name in model.state_dict() if "lora" in name}
    assert plan.adapter is None


def test_one_line_says_that_the_adapter_is_streamed(base_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ema"):
        OfflineClient("tcp://127.0.0.1:1", run="a").update(KINDS["lora"](base(base_folder)))

    (line,) = [line for line in caplog.messages if "adapter" in line]
    assert "'default' is streamed, as PEFT saves it (8 tensors)" in line


def test_an_added_adapter_changes_nothing_and_a_switched_one_does(
    base_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = KINDS["lora"](base(base_folder))
    client = OfflineClient("tcp://127.0.0.1:1", run="a")
    client.update(model)
    model.add_adapter("second", lora())
    client.update(model)
    assert client.stats()["stopped"] is None
    model.set_adapter("second")
    client.update(model)
    assert "the adapter 'second' is active, it was 'default'" in client.stats()["stopped"]
    assert len([line for line in caplog.messages if "no longer streamed" in line]) == 1


def test_an_adapter_of_another_rank_is_a_change_of_the_model(base_folder: Path) -> None:
    model = KINDS["lora"](base(base_folder))
    plan = Plan.of(model)
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=5, target_modules=_TARGETS, task_type="CAUSAL_LM"))
    model.set_adapter("default")
    with pytest.raises(PlanError, match="the model has changed: tensor"):
        plan.renewed(model)


def test_several_active_adapters_are_refused(base_folder: Path) -> None:
    model = KINDS["two adapters"](base(base_folder))
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(PlanError, match="the adapters first, second are active"):
        Plan.of(model)


def test_prompts_that_peft_computes_are_refused_with_what_to_do(base_folder: Path) -> None:
    model = get_peft_model(base(base_folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(PlanError, match="include="):
        Plan.of(model)
    plan = Plan.of(model, Selection(include=("prompt_encoder*",)))
    assert [tensor.name for tensor in plan.manifest.tensors] == ["prompt_encoder.default.embedding.weight"]


def test_embeddings_are_streamed_if_the_vocabulary_was_resized(base_folder: Path, tmp_path: Path) -> None:
    model = base(base_folder)
    model.resize_token_embeddings(24)
    peft_model = get_peft_model(model, lora())
    with pytest.warns(UserWarning, match="resized"):
        expected = saved(peft_model, tmp_path)

    adapter = Adapter.of(peft_model)
    assert adapter is not None
    assert set(adapter.tensors()) == set(expected)
    assert any("embed_tokens" in name for name in expected)


def test_the_config_of_the_model_is_as_before_after_a_plan(base_folder: Path) -> None:
    model = KINDS["lora"](base(base_folder))
    config = dict(vars(model.peft_config["default"]))
    Plan.of(model)
    assert vars(model.peft_config["default"]) == config


def test_a_copy_of_the_model_takes_an_average_of_its_adapter(base_folder: Path) -> None:
    model = KINDS["lora"](base(base_folder))
    copy = ModuleCopy(model, torch.device("cpu"))
    weights = {name: torch.full_like(tensor, 0.5) for name, tensor in get_peft_model_state_dict(model).items()}
    copy.fill(weights)
    found = get_peft_model_state_dict(copy.module)

    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    with pytest.raises(PlanError, match="does not fit"):
        copy.fill(dict(list(weights.items())[1:]))
    copy.take(model)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in copy.module.state_dict().items())


def test_an_average_of_the_adapter_is_pulled_into_another_model(server: ServerProcess, base_folder: Path) -> None:
    model, teacher = KINDS["modules_to_save"](base(base_folder)), KINDS["modules_to_save"](base(base_folder))
    with EmaClient(server.zmq, run="pulled", averages=["ema:0.5,name=ema"], when_behind="wait") as client:
        optimizer = optimizer_of(model)
        client.attach(model, optimizer)
        pull = client.pull(teacher, every=1, url=server.http)
        train(model, optimizer)
        assert pull.wait(30.0), pull.error
        with Reader(server.http) as reader:
            average = reader.load(reader.version("pulled", "ema", f"step-{pull.step}"))
        found = get_peft_model_state_dict(teacher)
        assert found.keys() == average.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in average.items())


def test_a_full_model_and_its_tokenizer_load_from_a_downloaded_folder(
    server: ServerProcess, base_folder: Path, tmp_path: Path
) -> None:
    model = base(base_folder)
    with EmaClient(server.zmq, run="full", averages=["ema:0.9"], files=base_folder, when_behind="wait") as client:
        train(model, optimizer_of(model), lambda: client.update(model))
    with Reader(server.http) as reader:
        folder = reader.download(reader.version("full", "ema-0.9"), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert loaded.state_dict().keys() == model.state_dict().keys()
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    assert tokenizer("w3 w5 nothing")["input_ids"] == [3, 5, 19]
    assert (folder / "generation_config.json").exists()


def test_lightning_validates_with_an_average_of_the_adapter(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lightning.pytorch")
    from support.lightning_training import loader, module_class, trainer
    from trainer_client.lightning import EmaCallback as LightningCallback

    monkeypatch.setenv("EMA_URL", server.http)
    package = "lightning.pytorch"
    module = module_class(package)()
    module.net = get_peft_model(module.net, LoraConfig(r=2, lora_alpha=1, target_modules=["0", "4"]))
    averages = ["raw", "ema:0.9,name=ema"]
    callback = LightningCallback(
        server.zmq, "lightning", averages, module="net", validate=["raw", "ema"], when_behind="wait"
    )
    fitted = trainer(package, tmp_path, callback)
    fitted.fit(module, loader(), loader())

    metrics = {name: float(value) for name, value in fitted.callback_metrics.items()}
    assert metrics["raw/val_loss"] == metrics["val_loss"]
    assert metrics["ema/val_loss"] != metrics["val_loss"]
    with Reader(server.http) as reader:
        set_peft_model_state_dict(module.net, reader.load("lightning/ema"))
    again = trainer(package, tmp_path).validate(module, loader(), verbose=False)
    assert metrics["ema/val_loss"] == pytest.approx(again[0]["val_loss"], rel=1e-6)
