"""The client in a training script: which steps are sent, their content, and what is raised."""

from __future__ import annotations

import gc
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD, Optimizer

from ema_proto.averages.rules import Raw
from ema_proto.errors import RejectCode
from support.fake_worker import OfflineClient
from support.waiting import eventually
from trainer_client import ClientClosed, JoinError, PlanError, RewindError, SettingsError

ENDPOINT = "tcp://127.0.0.1:5555"


def _client(**given: Any) -> OfflineClient:
    return OfflineClient(ENDPOINT, **{"run": "r", **given})


def _training() -> tuple[nn.Linear, SGD]:
    model = nn.Linear(2, 2)
    return model, SGD(model.parameters(), lr=0.1)


def _train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        optimizer.step()


def test_generated_run_name_is_printed_without_logging_set_up(caplog: pytest.LogCaptureFixture) -> None:
    client = OfflineClient(ENDPOINT)

    assert [(record.levelno, client.run in record.message) for record in caplog.records] == [(logging.WARNING, True)]


def test_constructor_connects_and_does_not_join() -> None:
    client = _client()

    assert client.worker.asked == ["greet"]
    assert client.worker.joins == []


def test_attach_joins_at_once_with_everything_the_server_needs() -> None:
    model, optimizer = _training()
    client = _client(step=7, every=2, resume="must", averages=["raw"], config={"a": 1}, checksum=True, incarnation=3)

    client.attach(model, optimizer)

    (join,) = client.worker.joins
    assert (join.run, join.first_step, join.every, join.resume, join.incarnation) == ("r", 8, 2, "must", 3)
    assert (join.averages, join.checksum, join.reconnect) == ((Raw(),), True, False)
    assert join.config == '{\n  "a": 1\n}\n'
    assert [spec.name for spec in join.manifest.tensors] == ["weight", "bias"]


def test_every_real_optimizer_step_is_sent() -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)

    _train(model, optimizer, 3)

    assert client.worker.steps == [1, 2, 3]
    assert client.steps == 3


def test_step_skipped_by_a_gradient_scaler_is_not_counted() -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaled: Tensor = scaler.scale(model(torch.ones(1, 2)).square().sum() * factor)
        scaled.backward()
        scaler.step(optimizer)
        scaler.update()

    assert client.worker.steps == [1, 2]


def test_first_of_several_optimizers_counts() -> None:
    model, first = _training()
    second = SGD(model.parameters(), lr=0.1)
    client = _client()
    client.attach(model, [first, second])

    _train(model, second, 2)
    _train(model, first, 1)

    assert client.worker.steps == [1]


def test_every_sends_the_divisible_steps() -> None:
    model, optimizer = _training()
    client = _client(every=3, step=4)
    client.attach(model, optimizer)

    _train(model, optimizer, 6)

    assert client.worker.steps == [6, 9]


def test_weights_written_after_step_do_not_change_what_was_sent() -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)
    _train(model, optimizer, 1)
    expected = model.weight.detach().clone()

    nn.init.zeros_(model.weight)

    assert torch.equal(client.worker.sent(0)["weight"], expected)
    assert not torch.equal(expected, model.weight)


def test_weights_written_after_update_do_not_change_what_was_sent() -> None:
    model, _ = _training()
    client = _client()
    expected = model.weight.detach().clone()
    client.update(model)

    nn.init.zeros_(model.weight)

    assert torch.equal(client.worker.sent(0)["weight"], expected)


def test_first_bare_update_says_how_many_steps_preceded_it() -> None:
    model, _ = _training()
    client = _client()

    client.update(model, 41)
    client.update(model)

    assert client.worker.joins[0].first_step == 41
    assert client.worker.steps == [41, 42]


def test_update_accepts_tensors_and_numpy_integers_as_step() -> None:
    model, _ = _training()
    client = _client()

    client.update(model, torch.tensor(5))

    assert client.worker.steps == [5]


@pytest.mark.parametrize("step", [0, -1, 1.5])
def test_first_update_without_a_valid_step_is_refused(step: Any) -> None:
    client = _client()

    with pytest.raises(SettingsError, match=f"step={step}"):
        client.update(nn.Linear(1, 1), step)
    assert client.worker.joins == []


def test_first_update_behind_the_steps_already_taken_is_refused() -> None:
    with pytest.raises(SettingsError, match="100 steps"):
        _client(step=100).update(nn.Linear(1, 1), 50)


def test_repeated_step_is_skipped_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = _training()
    client = _client()
    for step in (5, 5, 4, 6):
        client.update(model, step)

    assert client.worker.steps == [5, 6]
    assert client.stats()["skipped"]["repeated"] == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_step_is_skipped_without_waiting_when_no_slot_is_free() -> None:
    model, _ = _training()
    client = _client()
    client.update(model)
    client.worker.free.clear()

    client.update(model)

    assert client.worker.waits == [0.0, 0.0]
    assert client.stats()["skipped"]["busy"] == 1
    assert client.steps == 2


def test_waiting_is_bounded_by_the_given_timeout() -> None:
    client = _client(when_behind="wait", wait_timeout_s=2.5)

    client.update(nn.Linear(1, 1))

    assert client.worker.waits == [2.5]


@pytest.mark.parametrize(("state", "reason"), [("disconnected", "offline"), ("failed", "stopped")])
def test_missing_server_is_counted_and_raises_nothing(state: str, reason: str) -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)
    client.worker.state = state

    _train(model, optimizer, 2)

    assert client.stats()["skipped"][reason] == 2
    assert client.worker.steps == []


def test_unexpected_failure_drops_a_snapshot_and_not_the_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)
    slots = len(client.worker.free)

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(torch, "_foreach_copy_", out_of_memory)
    _train(model, optimizer, 2)

    assert client.stats()["skipped"]["error"] == 2
    assert len(client.worker.free) == slots
    assert [("not enough memory" in record.message) for record in caplog.records] == [True]


def test_interrupted_copy_releases_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = _training()
    client = _client()
    client.update(model)
    slots = len(client.worker.free)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.update(model)

    assert len(client.worker.free) == slots


def test_model_changed_after_joining_raises_from_the_step() -> None:
    model, optimizer = _training()
    client = _client(on_change="raise")
    client.attach(model, optimizer)
    slots = len(client.worker.free)
    model.to(torch.float64)

    with pytest.raises(PlanError, match="'weight'"):
        optimizer.step()
    assert len(client.worker.free) == slots


def test_unsupported_model_leaves_the_client_usable() -> None:
    client = _client()
    with pytest.raises(PlanError):
        client.update(nn.ReLU())

    client.update(nn.Linear(1, 1))

    assert client.worker.steps == [1]


def test_refused_run_raises_and_closes_the_client() -> None:
    model, optimizer = _training()
    client = _client()
    client.worker.refuse = JoinError("in use", RejectCode.RUN_IN_USE)

    with pytest.raises(JoinError) as caught:
        client.attach(model, optimizer)

    assert caught.value.code is RejectCode.RUN_IN_USE
    assert client.worker.closed == 1
    with pytest.raises(ClientClosed):
        client.attach(model, optimizer)
    optimizer.step()


def test_remove_stops_the_snapshots_and_attach_starts_them_again() -> None:
    model, optimizer = _training()
    client = _client()
    handle = client.attach(model, optimizer)
    _train(model, optimizer, 1)
    handle.remove()
    handle.remove()
    _train(model, optimizer, 1)
    client.attach(model, optimizer)
    _train(model, optimizer, 1)

    assert client.worker.steps == [1, 2]
    assert len(client.worker.joins) == 1


def test_attaching_twice_is_an_error() -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)

    with pytest.raises(SettingsError, match="attached already"):
        client.attach(model, optimizer)


@pytest.mark.parametrize("optimizer", [[], None, nn.Linear(1, 1), [None]])
def test_non_optimizer_is_refused_before_joining(optimizer: Any) -> None:
    client = _client()

    with pytest.raises(SettingsError):
        client.attach(nn.Linear(1, 1), optimizer)
    assert client.worker.joins == []


def test_state_dict_resumes_the_same_run_at_the_same_step() -> None:
    model, optimizer = _training()
    before = OfflineClient(ENDPOINT)
    before.attach(model, optimizer)
    _train(model, optimizer, 3)
    state = before.state_dict()

    after = OfflineClient(ENDPOINT)
    after.load_state_dict(state)
    after.attach(model, optimizer)

    assert (after.worker.joins[0].run, after.worker.joins[0].first_step) == (before.run, 4)


def test_given_run_name_is_kept_when_a_state_is_loaded() -> None:
    client = _client(run="mine")

    client.load_state_dict({"run": "theirs", "step": 5})

    assert client.state_dict() == {"run": "mine", "step": 5}


@pytest.mark.parametrize("state", [{}, {"run": "r"}, {"run": "r", "step": -1}, {"run": "a/b", "step": 1}, None])
def test_invalid_state_is_refused(state: Any) -> None:
    with pytest.raises(SettingsError):
        _client().load_state_dict(state)


def test_loading_a_state_after_joining_rewinds() -> None:
    model, _ = _training()
    client = _client()
    client.update(model, 10)
    client.worker.rewind_to = 4

    client.load_state_dict({"run": "r", "step": 5})
    client.update(model)

    assert client.worker.asked[-1] == "rewind 5"
    assert client.worker.steps == [10, 6]


def test_loading_another_runs_state_after_a_generated_join_is_an_error() -> None:
    client = OfflineClient(ENDPOINT)
    client.update(nn.Linear(1, 1))

    with pytest.raises(SettingsError, match="before attach"):
        client.load_state_dict({"run": "other", "step": 5})


def test_rewind_returns_the_averages_step_and_counts_on_from_the_trainers() -> None:
    model, _ = _training()
    client = _client()
    client.update(model, 10)
    client.worker.rewind_to = 3

    assert client.rewind(5) == 3
    assert client.steps == 5


def test_failed_rewind_raises_and_changes_nothing() -> None:
    model, _ = _training()
    client = _client()
    client.update(model, 10)

    with pytest.raises(RewindError):
        client.rewind(5)
    assert client.steps == 10
    for step in (6, 10, 11):
        client.update(model, step)
    assert client.worker.steps == [10, 11], "what the run has already is not sent again"
    assert client.stats()["skipped"]["repeated"] == 2


def test_rewind_before_joining_says_what_to_do() -> None:
    with pytest.raises(RewindError, match="load_state_dict"):
        _client().rewind(5)


def test_checkpoint_behind_the_run_is_refused_without_a_request() -> None:
    model, _ = _training()
    client = _client()
    client.update(model, 10)

    assert not client.checkpoint(9)
    assert client.checkpoint(10)
    assert client.worker.asked.count("checkpoint") == 1


def test_flush_returns_the_workers_answer() -> None:
    model, _ = _training()
    client = _client()
    assert client.flush()
    client.update(model)
    client.worker.answer = False

    assert not client.flush(durable=True)
    assert client.worker.asked == ["greet", "flush durable=True"]


def test_clean_exit_finishes() -> None:
    with _client() as client:
        client.update(nn.Linear(1, 1))

    assert client.worker.asked[-1] == "finish"
    assert client.stats()["client"] == "finished"


def test_exception_closes_and_leaves_the_run_open() -> None:
    client = _client()

    def fail() -> None:
        with client:
            client.update(nn.Linear(1, 1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "finish" not in client.worker.asked
    assert client.stats()["client"] == "closed"


def test_training_continues_after_the_client_ended() -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)
    client.finish()

    _train(model, optimizer, 1)

    assert client.worker.steps == []


def test_closed_client_reports_it_in_every_method() -> None:
    model, optimizer = _training()
    client = _client()
    client.close()
    client.close()

    for use in (
        lambda: client.update(model),
        lambda: client.attach(model, optimizer),
        lambda: client.flush(),
        lambda: client.checkpoint(1),
        lambda: client.rewind(1),
        lambda: client.before_weight_write(),
        lambda: client.load_state_dict({"run": "r", "step": 1}),
    ):
        with pytest.raises(ClientClosed, match="make a new one"):
            use()
    assert client.worker.closed == 1
    assert client.state_dict() == {"run": "r", "step": 0}
    assert "closed" in repr(client)


def test_garbage_collected_client_is_closed_in_another_thread() -> None:
    client = _client()
    client.update(nn.Linear(1, 1))
    worker, closed_in = client.worker, list[str]()

    def close(timeout_s: float) -> None:
        closed_in.append(threading.current_thread().name)

    worker.when_closed = close
    del client
    gc.collect()

    eventually(lambda: closed_in == ["ema-close"], "the worker is closed")


def test_finish_returns_whether_the_server_confirmed() -> None:
    client = _client()
    client.update(nn.Linear(1, 1))
    client.worker.answer = False

    assert not client.finish()
    assert not client.finish()
    assert client.stats()["client"] == "closed"


def test_run_without_a_snapshot_does_not_count_as_finished(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)

    assert not client.finish()
    assert "ends without a snapshot" in caplog.text


def test_checkpoint_of_an_older_step_is_false(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = _training()
    client = _client(every=2)
    client.update(model, 4)
    client.worker.free.clear()
    client.update(model, 6)
    nn.init.zeros_(model.weight)

    assert not client.checkpoint(7)
    assert "no checkpoint at step 7: the generation holds step 4" in caplog.text


@pytest.mark.parametrize("behind", [0, 2])
def test_finish_reports_unsent_last_steps(caplog: pytest.LogCaptureFixture, behind: int) -> None:
    model = nn.Linear(1, 1)
    client = _client(every=2)
    for step in range(1, 8):
        client.update(model, step)
    client.worker.free.clear()
    for step in range(8, 8 + 2 * behind):
        client.update(model, step)

    assert client.finish()
    ends = [record.getMessage() for record in caplog.records if "ends with step" in record.getMessage()]
    assert ends == [
        "ema: run r ends with step 6: those up to 10 were not sent; when_behind='wait' sends every step"
    ] * (behind > 0)


@pytest.mark.parametrize("ending", ["checkpoint", "finish"])
def test_last_step_without_a_slot_is_sent_before_the_run_is_published(ending: str) -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)
    _train(model, optimizer, 1)
    client.worker.free.clear()
    _train(model, optimizer, 2)
    assert client.stats()["skipped"]["busy"] == 2
    client.worker.free.append(client.worker.slots[0])

    assert client.checkpoint(3) if ending == "checkpoint" else client.finish()
    assert client.worker.steps == [1, 3]
    assert client.worker.asked[-1] == ending
    assert client.stats()["skipped"]["busy"] == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(client.worker.sent(1)[name], tensor)


def _write(model: nn.Module, client: OfflineClient) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(1.0)


def _announce(model: nn.Module, client: OfflineClient) -> None:
    client.before_weight_write()
    next(model.parameters()).data.add_(1.0)


@pytest.mark.parametrize("write", [_write, _announce])
def test_last_step_is_not_sent_with_weights_written_since(
    write: Callable[[nn.Module, OfflineClient], None], caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)
    _train(model, optimizer, 1)
    client.worker.free.clear()
    _train(model, optimizer, 1)
    client.worker.free.append(client.worker.slots[0])
    write(model, client)

    assert client.finish()
    assert client.worker.steps == [1]
    assert client.stats()["skipped"]["busy"] == 1
    assert "ends with step 1" in caplog.text


def test_skipped_last_step_is_sent_before_the_weights_are_written() -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)
    _train(model, optimizer, 1)
    client.worker.free.clear()
    _train(model, optimizer, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    client.worker.free.append(client.worker.slots[0])
    client.before_weight_write(1.0)
    next(model.parameters()).data.add_(1.0)

    assert client.finish()
    assert client.worker.steps == [1, 2]
    assert client.stats()["skipped"]["busy"] == 0
    for name, tensor in before.items():
        assert torch.equal(client.worker.sent(1)[name], tensor)


def test_time_spent_in_the_loop_is_measured() -> None:
    model, _ = _training()
    client = _client()
    client.update(model)
    client.update(model)

    stats = client.stats()
    assert 0 < stats["blocked_s_max"] <= stats["blocked_s_total"] <= 2 * stats["blocked_s_max"]
    assert stats["offered"] == 2


@pytest.mark.filterwarnings("ignore:Guards may run slower")  # Python 3.13.0 only
@pytest.mark.slow
def test_compiled_model_streams_under_its_own_names() -> None:
    model, optimizer = _training()
    compiled: Any = torch.compile(model, backend="eager")
    client = _client()
    client.attach(compiled, optimizer)

    _train(compiled, optimizer, 1)

    assert torch.equal(client.worker.sent(0)["weight"], model.weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_compiled_optimizer_step_is_sent_and_not_recompiled() -> None:
    model, optimizer = _training()
    client = _client()
    client.attach(model, optimizer)
    step: Any = torch.compile(optimizer.step, backend="eager")
    graphs = []
    for count in range(1, 13):
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        step()
        graphs.append(counters["stats"]["unique_graphs"])

        assert client.worker.steps == list(range(1, count + 1))
        assert torch.equal(client.worker.sent(-1)["weight"], model.weight)
    assert graphs[-1] == graphs[2]


def test_what_the_server_says_about_the_averages_of_a_finished_run_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    client = _client()
    client.update(nn.Linear(1, 1))
    client.worker.warning = "average ema-0.9999: 92% of it is still the weights that it began with"

    assert client.finish()
    assert "run r is finished: average ema-0.9999: 92% of it is still" in caplog.text


def test_the_publish_interval_is_part_of_the_request_to_join() -> None:
    asked, silent = _client(publish_every_steps=100), _client()
    for client in (asked, silent):
        client.update(nn.Linear(1, 1))

    assert [client.worker.joins[0].publish_every_steps for client in (asked, silent)] == [100, None]
