"""On a real CUDA device: no torn snapshot in thousands of steps, no synchronisation, no memory beyond the scratch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer
from torch.profiler import ProfilerActivity, profile

from ema_proto.wire.messages import Mode
from support.fake_worker import FakeWorker, KeepingWorker, client_of
from support.late_copies import delay_copies
from support.waiting import eventually
from trainer_client.model.plan import Plan
from trainer_client.staging.cpu import CpuStager
from trainer_client.staging.device import Cuda
from trainer_client.staging.overlapped import OverlappedStager
from trainer_client.staging.slots import Slot, make_slots
from trainer_client.staging.stagers import Stagers

# torch warns of its own prototypes (the check for synchronisations) and of what a device's libraries lack.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::UserWarning")]

SCRATCH_BYTES_MAX = 64 << 20
STEPS = 2000
SURE_EVERY = 8  # so many steps have one snapshot for certain; the others have one if a slot happens to be free


class CheckingWorker(FakeWorker):
    """Checks each snapshot in its slot, in the thread that offers it, and releases the slot."""

    def __init__(self) -> None:
        super().__init__(slots=2)
        self.checked = 0
        self.torn: list[int] = []

    def acquire(self, wait_s: float, *, reconnecting: bool = False) -> Slot | None:
        if len(self.waits) % SURE_EVERY == 0:
            eventually(lambda: bool(self.free), "a slot is free")
        return super().acquire(wait_s, reconnecting=reconnecting)

    def _send(self, slot: Slot, step: int, mode: Mode) -> None:
        self.checked += 1
        if not bool((slot.tensor.view(torch.float32) == step).all()):
            self.torn.append(step)
        self.give_back(slot)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The current CUDA device; what a test issued to it ends with the test."""
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()


class Carrying(nn.Module):
    """120 MB of zeros on every way that a tensor can take: copying them takes longer than writing them."""

    seen: Tensor
    wide: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        large = [nn.Parameter(torch.zeros(4_000_000, device=device)) for _ in range(4)]
        small = [nn.Parameter(torch.zeros(100, device=device)) for _ in range(50)]
        permuted = [nn.Parameter(torch.zeros(1000, 1000, device=device).t())]
        self.weights = nn.ParameterList([*large[:2], *small, *permuted, *large[2:]])
        self.register_buffer("seen", torch.zeros(30, device=device))
        self.register_buffer("wide", torch.zeros(13_000_000, device=device))  # more than the scratch holds


class Filling(Optimizer):
    """Its n-th step fills its parameters with n, unseen by their versions: only waiting for the copy keeps it whole."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.steps = 0

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Issue the writes."""
        self.steps += 1
        for parameter in self.param_groups[0]["params"]:
            parameter.data.fill_(self.steps)


def _carry(model: Carrying, optimizer: Filling, steps: int) -> None:
    """The loop runs ahead of the device; forward writes the buffers."""
    for _ in range(steps):
        model.seen.fill_(optimizer.steps + 1)
        model.wide.fill_(optimizer.steps + 1)
        optimizer.step()


@pytest.mark.parametrize("stream", ["the default stream", "another stream"])
def test_no_snapshot_in_thousands_of_steps_is_torn(device: torch.device, stream: str) -> None:
    model, worker = Carrying(device), CheckingWorker()
    optimizer = Filling(model.parameters())
    torch.cuda.synchronize()

    with torch.cuda.stream(torch.cuda.Stream(device) if stream == "another stream" else None):
        with client_of(worker) as client:
            client.attach(model, optimizer)
            _carry(model, optimizer, STEPS)
            assert client.flush(timeout_s=120)
        torch.cuda.synchronize()

    assert client.steps == STEPS
    assert worker.checked >= STEPS // SURE_EVERY
    assert worker.torn == []
    assert client.stats()["torn"] == 0


@pytest.mark.parametrize("waits", [True, False])
def test_snapshots_tear_only_without_the_wait_before_the_next_step(
    device: torch.device, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_copies(monkeypatch)
    if not waits:
        monkeypatch.setattr(Stagers, "hold_back_writes", lambda *_: None)
    model, worker = Carrying(device), CheckingWorker()
    optimizer = Filling(model.parameters())

    with client_of(worker) as client:
        client.attach(model, optimizer)
        _carry(model, optimizer, 40)
        assert client.flush(timeout_s=120)

    assert worker.checked >= 5
    assert bool(worker.torn) is not waits


@pytest.mark.parametrize("announced", [True, False])
def test_write_through_data_tears_unless_announced(
    device: torch.device, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_copies(monkeypatch)
    model, worker = Carrying(device), CheckingWorker()
    optimizer = Filling(model.parameters())
    with client_of(worker) as client:
        client.attach(model, optimizer)
        for _ in range(20):
            _carry(model, optimizer, 1)
            if announced:
                client.before_weight_write()
            for parameter in model.parameters():
                parameter.data.fill_(-1)
            assert client.flush(timeout_s=60)

    assert worker.checked == 20
    assert len(worker.torn) == (0 if announced else 20)


def test_write_seen_in_the_version_counter_drops_the_snapshot(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_copies(monkeypatch)
    model, worker = Carrying(device), CheckingWorker()
    optimizer = Filling(model.parameters())
    with client_of(worker) as client:
        client.attach(model, optimizer)
        _carry(model, optimizer, 1)
        with torch.no_grad():
            model.weights[0].add_(1)
        assert client.flush(timeout_s=60)

        assert (client.stats()["torn"], worker.checked) == (1, 0)


def _trained(device: torch.device) -> tuple[nn.Module, SGD, Tensor]:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(64 * 28 * 28, 100)).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(8, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    return model, SGD(model.parameters(), lr=1e-3, momentum=0.9), images


def _step(model: nn.Module, optimizer: Optimizer, images: Tensor) -> None:
    optimizer.zero_grad()
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("overlap", [True, False])
def test_real_training_is_streamed_bit_for_bit(device: torch.device, overlap: bool) -> None:
    model, optimizer, images = _trained(device)
    worker, expected = KeepingWorker(), dict[int, dict[str, Tensor]]()
    with client_of(worker, overlap=overlap) as client:
        client.attach(model, optimizer)
        for number in range(1, 41):
            _step(model, optimizer, images)
            expected[number] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert client.flush(timeout_s=60)

    assert len(worker.snapshots) >= 2
    for number, tensors in worker.snapshots.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[number][name].cpu()), (number, name)


def test_manual_update_is_copied_on_return(device: torch.device) -> None:
    model, worker = Carrying(device), CheckingWorker()
    client = client_of(worker)
    for step in range(1, 6):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(step)

        client.update(model, step)

        for parameter in model.parameters():
            parameter.data.fill_(-1)
        assert (worker.checked, worker.torn) == (step, [])
    client.close()


def test_every_dtype_and_stride_equals_a_plain_copy(device: torch.device) -> None:
    module = nn.Module()
    module.permuted = nn.Parameter(torch.randn(60, 70, 80, device=device).permute(2, 0, 1))
    module.wide = nn.Parameter(torch.randn(9_000_000, device=device))
    module.tall = nn.Parameter(torch.randn(3000, 3000, device=device).t())  # longer than the bounce
    module.sliced = nn.Parameter(torch.randn(300, 3000, device=device)[:, ::3])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        module.register_buffer(f"some_{str(dtype)[6:]}", torch.randn(7, 5, device=device).to(dtype).t())
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16):
        module.register_buffer(f"some_{str(dtype)[6:]}", torch.arange(11).remainder(2).to(dtype).to(device))
    module.register_buffer("expanded", torch.ones(1, device=device).expand(4))
    module.register_buffer("scalar", torch.tensor(3.5, device=device))
    module.register_buffer("empty", torch.zeros(0, 4, device=device))
    plan = Plan.of(module)
    slot, expected = make_slots(plan.manifest.nbytes, 2)
    CpuStager(plan.manifest).stage(plan.tensors(), expected)
    stager = OverlappedStager(plan.manifest, Cuda(device))

    for _ in range(2):
        slot.tensor.zero_()
        assert stager.stage(plan.tensors(), slot).wait()
        assert bytes(slot.view) == bytes(expected.view)


def test_gpu_memory_is_bounded_by_the_scratch(device: torch.device) -> None:
    model, optimizer, images = _trained(device)

    def peak() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(10):
            _step(model, optimizer, images)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device)

    peak()
    without = peak()
    with client_of(KeepingWorker()) as client:
        client.attach(model, optimizer)
        assert peak() - without <= SCRATCH_BYTES_MAX


def _events(model: nn.Module, optimizer: Optimizer, images: Tensor) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            _step(model, optimizer, images)
        torch.cuda.synchronize()
    return Counter(event.name for event in trace.events() or [])


def test_trace_shows_no_added_synchronisation_or_allocation(device: torch.device) -> None:
    model, optimizer, images = _trained(device)
    _events(model, optimizer, images)
    without = _events(model, optimizer, images)
    with client_of(KeepingWorker()) as client:
        client.attach(model, optimizer)
        _events(model, optimizer, images)
        ours = _events(model, optimizer, images)
        assert client.flush(timeout_s=60)

    assert ours["cudaMemcpyAsync"] > without["cudaMemcpyAsync"], "the trace shows the copies"
    for call in ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaMemcpy", "cudaMalloc", "cudaHostRegister"):
        # One more than that is the profiler's own, at its end. cudaEventSynchronize is our other thread's.
        assert ours[call] <= without[call] + 1, call


def test_training_thread_issues_nothing_that_synchronises(device: torch.device) -> None:
    model, optimizer, images = _trained(device)
    with client_of(KeepingWorker()) as client:
        client.attach(model, optimizer)
        for _ in range(3):
            _step(model, optimizer, images)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                _step(model, optimizer, images)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert client.stats()["skipped"]["error"] == 0


def test_slots_are_pinned_while_the_client_is_open(device: torch.device) -> None:
    model, worker = Carrying(device), CheckingWorker()
    client = client_of(worker)
    client.attach(model, Filling(model.parameters()))

    assert all(slot.tensor.is_pinned() for slot in worker.slots)
    client.close()
    assert not any(slot.tensor.is_pinned() for slot in worker.slots)


def test_failed_pinning_is_reported_and_leaves_no_error(device: torch.device) -> None:
    cuda = Cuda(device)
    (slot,) = make_slots(1 << 20, 1)
    assert cuda.pin(slot.tensor) is None

    assert cuda.pin(slot.tensor) is not None, "it is pinned already"
    assert torch.ones(3, device=device).add_(1).sum().item() == 6
    cuda.unpin(slot.tensor)
    cuda.unpin(slot.tensor)
    assert torch.ones(3, device=device).add_(1).sum().item() == 6


def test_snapshots_to_unpinned_memory_are_right(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Cuda, "pin", lambda *_: "out of memory")
    model, worker = Carrying(device), CheckingWorker()
    optimizer = Filling(model.parameters())
    with client_of(worker) as client:
        client.attach(model, optimizer)
        _carry(model, optimizer, 20)
        assert client.flush(timeout_s=60)

    assert worker.checked >= 2
    assert worker.torn == []
    assert sum("out of memory" in record.message for record in caplog.records) == 1


def test_captured_step_takes_no_snapshot_and_the_graph_is_valid(device: torch.device) -> None:
    weight = nn.Parameter(torch.zeros(300_000, device=device))
    module = nn.Module()
    module.weight = weight
    optimizer = Adam([weight], lr=1.0, capturable=True)
    weight.grad = torch.ones_like(weight)
    worker = KeepingWorker()
    with client_of(worker) as client:
        client.attach(module, optimizer)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        assert client.flush(timeout_s=60)
        before, taken = weight.detach().clone(), client.steps
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()

        assert client.steps == taken == 3
        assert client.stats()["skipped"]["capturing"] == 1
        graph.replay()
        client.update(module, 4)
        assert bool((weight < before).all())
        assert torch.equal(worker.snapshots[4]["weight"], weight.detach().cpu())


def test_parameter_moved_during_the_copy_is_copied_from_its_old_memory(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay_copies(monkeypatch)
    model, worker = Carrying(device), CheckingWorker()
    optimizer = Filling(model.parameters())
    with client_of(worker) as client:
        client.attach(model, optimizer)
        for _ in range(20):
            _carry(model, optimizer, 1)
            for parameter in model.parameters():
                parameter.data = torch.full_like(parameter, -1)  # the allocator would hand out what was given back
            assert client.flush(timeout_s=60)

    assert worker.checked == 20
    assert worker.torn == []


def test_graph_captured_during_copies_is_valid(device: torch.device) -> None:
    model, worker, counted = Carrying(device), CheckingWorker(), torch.zeros(10, device=device)
    optimizer = Filling(model.parameters())
    with client_of(worker) as client:
        client.attach(model, optimizer)
        for _ in range(20):
            _carry(model, optimizer, 2)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(200):  # a capture that lasts
                    counted.add_(1)
            graph.replay()
        assert client.flush(timeout_s=60)
        assert client.stats()["skipped"]["error"] == 0

    assert counted.tolist() == [4000.0] * 10
    assert worker.torn == []


def test_gpu_without_room_for_the_scratch_logs_one_warning(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = nn.ParameterList([nn.Parameter(torch.zeros(50_000, device=device)) for _ in range(200)])  # 40 MB
    worker, optimizer = CheckingWorker(), Filling(parameters.parameters())
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        torch.cuda.memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory, device
    )
    try:
        with client_of(worker) as client:
            client.attach(parameters, optimizer)
            for _ in range(3):
                optimizer.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)

    assert (worker.checked, worker.torn) == (3, [])
    assert sum("out of memory" in record.message for record in caplog.records) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_gpu_without_the_model_gets_no_context() -> None:
    program = Path(__file__).parents[2] / "support" / "on_the_second_gpu.py"
    environ = {**os.environ, "PYTHONPATH": str(program.parents[1])}

    result = subprocess.run(
        [sys.executable, program], env=environ, capture_output=True, text=True, timeout=200, check=False
    )

    assert (result.returncode, result.stdout) == (0, "steps [1, 2, 3], a context on GPU 0: False\n"), result.stderr
