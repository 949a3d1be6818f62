"""Resources that a client takes of a device, and when they are released: scratch, pinned memory, a thread, hooks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.device_training import Training, opened
from support.waiting import eventually
from trainer_client import RewindError
from trainer_client.staging.overlapped import OverlappedStager


@pytest.mark.parametrize("what", ["flush", "checkpoint", "finish", "rewind"])
def test_requests_wait_a_bounded_time_for_earlier_copies(what: str) -> None:
    training = Training()
    training.worker.rewind_to = 0
    training.attach()
    training.optimizer.step()
    ask: dict[str, Any] = {
        "flush": lambda s: training.client.flush(s),
        "checkpoint": lambda s: training.client.checkpoint(1, s),
        "finish": lambda s: training.client.finish(s),
        "rewind": lambda s: training.client.rewind(0, s),
    }

    if what == "rewind":
        with pytest.raises(RewindError, match="has not copied"):
            ask[what](0.01)
    elif what != "finish":  # which closes
        assert not ask[what](0.01)
    assert training.worker.asked == []
    training.device.advance(10.0)
    assert ask[what](30.0) in (True, 0)
    assert training.worker.steps == [1]
    assert [word.split()[0] for word in training.worker.asked] == [what]


def test_closing_ends_the_thread_that_waits_for_copies() -> None:
    before = set(threading.enumerate())
    training = Training()
    training.attach()
    training.optimizer.step()
    (waiting,) = set(threading.enumerate()) - before
    training.device.advance(10.0)

    training.client.close()

    assert training.worker.steps == [1]
    assert not waiting.is_alive()


def test_garbage_collected_client_is_closed() -> None:
    training = Training()
    training.attach()
    training.optimizer.step()
    training.end()
    worker = training.worker

    opened.clear()
    del training
    gc.collect()

    eventually(lambda: worker.closed == 1, "the worker is closed")


def _stagers() -> list[OverlappedStager]:
    return [thing for thing in gc.get_objects() if type(thing) is OverlappedStager]


def test_finished_client_holds_neither_the_model_nor_copy_resources() -> None:
    before = set(map(id, _stagers()))
    training = Training()
    training.attach()
    training.optimizer.step()
    training.device.idle()
    model = weakref.ref(training.model)
    (stager,) = [weakref.ref(stager) for stager in _stagers() if id(stager) not in before]

    gc.disable()
    try:
        assert training.client.finish()
        del training.model, training.optimizer
        training.device.copied.clear()
        assert (model(), stager()) == (None, None)
    finally:
        gc.enable()
    assert training.client.steps == 1


def test_memory_is_allocated_by_attach_and_not_by_steps() -> None:
    training = Training()
    training.attach()
    allocated = list(training.device.allocated)

    training.train(5)

    assert training.device.allocated == allocated
    assert training.device.hosts == 2, "one for each slot"


def test_slots_are_pinned_when_joining_and_unpinned_after_the_last_read() -> None:
    training = Training()
    training.attach()
    pinned = list(training.device.pinned)

    training.train(5)

    assert training.device.pinned == pinned == [slot.tensor.data_ptr() for slot in training.worker.slots]
    still: list[list[int]] = []
    training.worker.when_closed = lambda timeout_s: still.append(list(training.device.pinned))
    training.end()
    training.client.close()
    assert still == [pinned]
    assert training.device.pinned == []


def test_memory_with_a_pending_copy_stays_pinned() -> None:
    training = Training()
    training.attach()
    training.optimizer.step()

    training.client.close(0.01)

    assert len(training.device.pinned) == 2
    training.device.idle()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_child_issues_nothing() -> None:
    training = Training()
    training.attach()
    training.optimizer.step()
    issued = len(training.device.compute.work)
    nothing = nn.Parameter(torch.zeros(0))  # torch's own threads did not survive the fork: the child computes nothing

    child = os.fork()
    if child == 0:
        training.optimizer.param_groups[0]["params"][:] = [nothing]
        training.optimizer.step()
        training.client.before_weight_write()
        # The one kernel is the optimizer's.
        os._exit(0 if len(training.device.compute.work) == issued + 1 else 3)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    training.end()


@pytest.mark.process
def test_interpreter_exit_during_a_copy_is_clean() -> None:
    program = Path(__file__).parents[2] / "support" / "leaving_during_a_copy.py"

    environ = {**os.environ, "PYTHONPATH": str(program.parents[1])}
    left = subprocess.run(
        [sys.executable, program], env=environ, capture_output=True, text=True, timeout=100, check=False
    )

    assert (left.returncode, left.stdout) == (0, "copied\nsent 1\n"), left.stderr
