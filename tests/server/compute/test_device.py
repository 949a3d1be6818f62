"""Averages on a device are those on the host, bit for bit on a delayed one made of host memory.

On a GPU they are within float32 rounding. A run that does not fit is refused, freed memory is returned, and an
unusable device is reported at the start.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file
from torch import Tensor

from ema_proto.errors import RejectCode
from ema_proto.wire.manifest import Manifest, Role
from ema_reader import Reader
from ema_server.averager.jobs import Applied, Changed, Durable, Publish, Quarantined, Refused, Rewound
from ema_server.compute.accelerator import Accelerator
from ema_server.compute.backend import Backend
from ema_server.compute.cuda import CudaBackend, CudaStream, DeviceError, open_device
from ema_server.compute.device import HOST, Device
from ema_server.compute.kernel import Target
from ema_server.compute.pool import WorkerPool
from ema_server.compute.upload import Copiers, Upload
from ema_server.tensors.finite import FiniteCheck
from ema_server.tensors.layout import Form, held_nbytes
from support.backends import InlineBackend, LateBackend, LateCopiers
from support.cuda_runtime import GPU, CudaRuntime
from support.processes import ServerProcess
from support.server_core import ServerCore, all_segments, durable, encode, joined, manifest_of, running_core
from support.toy import Toy, check_version
from trainer_client import EmaClient

_AVERAGES = (
    "raw",
    "ema:0.9",
    "ema:0.99,buffers=copy",
    "ema:0.999,warmup=timm,acc=float64,name=exact",
    "window:3,name=window",
    "bema:every=2,buffers=average,name=bema",
)
Files = dict[tuple[str, str], bytes]
_ROLES = {"statistics": Role.BUFFER, "mask": Role.BUFFER, "u": Role.STRUCTURAL}

_BACKENDS: dict[str, Callable[[], Backend]] = {
    "at once": InlineBackend,
    "late": LateBackend,
    **{f"by chance {seed}": lambda seed=seed: LateBackend(seed) for seed in range(3)},  # type: ignore[misc]
}


@pytest.fixture(params=_BACKENDS)
def device(request: pytest.FixtureRequest) -> Device:
    """Blocks and pieces so small that each buffer is used many times over."""
    backend = _BACKENDS[request.param]()
    copiers = LateCopiers() if request.param == "late" else Copiers(3)
    return Accelerator("test:0", backend, block_elements=16, bounce_bytes=64, copiers=copiers)


@cache
def _weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    walk = torch.sin(torch.arange(150.0) * (1 + step / 97)) * 3 + torch.rand(150, generator=generator)
    return {
        "double": walk[:41].double() + torch.rand(41, generator=generator, dtype=torch.float64) * 1e-9,
        "single": walk.reshape(3, 50),
        "brain": walk[:77].bfloat16(),
        "half": walk[7:70].half(),
        "statistics": walk[:5].clone(),
        "mask": torch.full((4, 4), -math.inf).triu(1),
        "u": walk[:6].clone(),
        "seen": torch.tensor(step * 3),
        "small": torch.arange(9, dtype=torch.int8) + step,
        "flags": torch.arange(13) % (step % 3 + 1) == 0,
    }


_MANIFEST = manifest_of(_weights(1), _ROLES, {"single": ("tied",)})


def _publish_amid_snapshots(core: ServerCore, first: int, last: int) -> Durable:
    """Queue a publication between snapshots, so that the snapshot after it finds a draft to write as it goes."""
    answers: list[Any] = []
    for step in range(first, last + 1):
        core.averager.submit(core.apply_job("r", step, _weights(step), answers.append))
        if step == (first + last) // 2:
            core.averager.submit(Publish("r", "request", answers.append))
    core.settled("r", lambda _: len(answers) == last - first + 2)
    (published,) = (answer for answer in answers if not isinstance(answer, Applied))
    return durable(published)


def _files(answer: Durable) -> Files:
    """What the versions of a publication are made of, by average and file."""
    return {
        (version.average, path.name): path.read_bytes()
        for version in answer.versions
        for path in version.folder.iterdir()
        if path.suffix == ".safetensors"
    }


def _life(data: Path, device: Device) -> list[Files]:
    """A run from its first snapshot over publications, a NaN, a rewind, changed averages and two servers."""
    seen = []
    with running_core(data, device=device, kernel="torch") as core:
        joined(core.join("r", _MANIFEST, _AVERAGES))
        seen.append(_files(_publish_amid_snapshots(core, 1, 8)))
        seen.append(_files(durable(core.publish("r"))))
        bad = {**_weights(9), "half": torch.full((63,), math.nan, dtype=torch.float16)}
        assert isinstance(core.apply("r", 9, bad), Quarantined)
        core.apply("r", 11, _weights(11))
        assert isinstance(core.rewind("r", 8), Rewound)
        seen.append(_files(_publish_amid_snapshots(core, 9, 14)))
        core.leave("r")
        core.settled("r", lambda status: status.memory_bytes == 0)
        joined(core.join("r", _MANIFEST, _AVERAGES, first_step=15))
        core.apply("r", 15, _weights(2), mode="set")
    with running_core(data, device=device, kernel="torch") as core:
        joined(core.join("r", _MANIFEST, _AVERAGES, first_step=16))
        assert isinstance(core.add("r", "window:2,name=late"), Changed)
        assert isinstance(core.remove("r", "exact"), Changed)
        for step in range(16, 30, 3):
            not_finite = {"statistics": torch.full((5,), math.nan)} if step in (16, 19, 22) else {}
            core.apply("r", step, _weights(step) | not_finite)
        seen.append(_files(durable(core.finish("r"))))
    return seen


@pytest.mark.slow
def test_run_on_a_device_equals_the_host_bit_for_bit(tmp_path: Path, device: Device) -> None:
    """Float64, float32, both half floats, integers, masks, structural and NaN buffers; gaps, a set, a window."""
    ours, plain = _life(tmp_path / "device", device), _life(tmp_path / "host", HOST)

    assert ours == plain
    assert len({files["ema-0.9", "model.safetensors"] for files in plain}) == len(plain)


def test_late_device_was_late(tmp_path: Path) -> None:
    """The test above would show little if everything had been done at once."""
    backend = LateBackend()
    with running_core(
        tmp_path, device=Accelerator("test:0", backend, block_elements=16, bounce_bytes=64), kernel="torch"
    ) as core:
        joined(core.join("r", _MANIFEST, _AVERAGES))
        core.apply("r", 1, _weights(1))
        before = backend.late
        core.apply("r", 2, _weights(2))

        assert backend.late - before > 100


def _tiny(count: int) -> tuple[Manifest, dict[str, Tensor]]:
    """Tensors that are averaged and copied in turn, so that each is a block of its own."""
    tensors = {f"t{index}": torch.full((3,), float(index)) for index in range(count)}
    roles = {name: Role.STRUCTURAL for index, name in enumerate(tensors) if index % 2}
    return manifest_of(tensors, roles), tensors


def test_many_small_tensors_are_moved_in_few_batches() -> None:
    manifest, tensors = _tiny(1000)
    backend = LateBackend()
    pool = WorkerPool(1, 512, Accelerator("test:0", backend, block_elements=512))
    data = backend.allocate(held_nbytes(manifest, Form.WIDE))
    before = backend.moves
    pool.update(all_segments(manifest), encode(manifest, tensors), [Target(data, Form.WIDE, None)], None)
    pool.close()

    assert len(all_segments(manifest)) == 1000
    assert backend.moves - before == math.ceil(manifest.nbytes / (512 * 8 * 2))
    assert torch.equal(data, encode(manifest, tensors))


@pytest.mark.parametrize("workers", [1, 3])
def test_device_memory_of_a_pool_is_independent_of_the_model(workers: int) -> None:
    taken = []
    for count in (10, 5000):
        manifest, tensors = _tiny(count)
        backend = InlineBackend()
        device = Accelerator("test:0", backend, block_elements=64)
        data = device.allocate(held_nbytes(manifest, Form.WIDE)).data
        before = backend.room_bytes + data.numel()
        pool = WorkerPool(workers, 64, device)
        for _ in range(3):
            pool.update(all_segments(manifest), encode(manifest, tensors), [Target(data, Form.WIDE, None)], None)
        pool.close()
        taken.append(before - backend.room_bytes - data.numel())
        assert torch.equal(data, encode(manifest, tensors))

    assert taken == [(workers + 1) * 2 * 2 * 64 * 8] * 2, "one more is the caller's, as on the host"


def test_failed_pass_leaves_the_stages_usable_and_the_snapshot_unread() -> None:
    manifest, tensors = _tiny(100)
    backend, copiers = LateBackend(), LateCopiers()
    upload = Upload(backend, 16, copiers)
    snapshot = encode(manifest, tensors)

    def fail_half_way() -> None:
        with upload.turn():
            for number, _ in enumerate(upload.blocks(snapshot, all_segments(manifest))):
                if number == 50:
                    raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert all(part.done() for part in copiers.parts), "none reads the snapshot later"
    taken = backend.allocate(manifest.nbytes)
    with upload.turn():
        for block, elements in upload.blocks(snapshot, all_segments(manifest)):
            taken.narrow(0, block.wire_offset, block.count * 4).view(torch.float32).copy_(elements)

    assert torch.equal(taken, snapshot)


def test_memory_is_shown_and_filled_in_order_and_errors_propagate(device: Device) -> None:
    memory = device.allocate(1000)
    content = bytes(index % 251 for index in range(1000))
    begun: list[int] = []

    def give(piece: memoryview, at: int) -> None:
        begun.append(at)
        piece[:] = content[at : at + len(piece)]

    def fail(piece: memoryview, at: int) -> None:
        raise OSError(28, "full")

    assert memory.nbytes == 1000
    with pytest.raises(OSError, match="full"):
        memory.show(0, 1000, fail)
    memory.fill(8, 1000, give)
    shown = bytearray(1000)
    memory.show(3, 997, lambda piece, at: shown.__setitem__(slice(at, at + len(piece)), bytes(piece)))

    assert begun == list(range(8, 1000, 32))
    assert bytes(shown) == bytes(8) + content[8:997] + bytes(3)


def test_snapshot_for_a_device_is_checked_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(InlineBackend):
        device = torch.device("meta")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    manifest = manifest_of({"w": torch.zeros(6_000_000)})
    snapshot = torch.zeros(manifest.nbytes, dtype=torch.uint8)
    snapshot.view(torch.float32)[5_999_999] = math.nan
    together, check, used = threading.Barrier(3), FiniteCheck(manifest), set[int]()

    class Meeting(FiniteCheck):
        def check(self, offset: int, data: Tensor) -> tuple[str, ...]:
            if threading.get_ident() not in used:
                used.add(threading.get_ident())
                together.wait(timeout=30)
            return check.check(offset, data)

    pool = WorkerPool(1, 64, Accelerator("test:0", Elsewhere(), block_elements=64))
    assert pool.not_finite(Meeting(manifest), snapshot) == ("w",)
    pool.close()

    assert len(used) == 3


def test_filled_memory_can_be_computed_with() -> None:
    backend = LateBackend()
    memory = Accelerator("test:0", backend, block_elements=16, bounce_bytes=64).allocate(100)
    memory.fill(0, 100, lambda piece, at: piece.__setitem__(slice(None), bytes([7] * len(piece))))
    stream, shown = backend.stream(), bytearray(100)

    with stream.current():
        memory.data.add_(1)
    stream.mark().wait()
    memory.show(0, 100, lambda piece, at: shown.__setitem__(slice(at, at + len(piece)), bytes(piece)))

    assert shown == bytes([8] * 100)


@pytest.mark.parametrize("nbytes", [1, 255, 256, 1000])
def test_copiers_share_the_copy_and_begin_once_the_memory_is_free(nbytes: int) -> None:
    backend = LateBackend()
    stream, target, source = (
        backend.stream(),
        torch.zeros(1000, dtype=torch.uint8),
        torch.full((nbytes,), 9, dtype=torch.uint8),
    )
    device = backend.allocate(1000)
    with stream.current():
        device.copy_(target, non_blocking=True)  # reads the target once the stream gets there

    parts = Copiers(4).copy(target, source, stream.mark(), 1000)
    for part in parts:
        part.result(timeout=30)
    stream.mark().wait()

    assert len(parts) == (0 if nbytes <= 250 else 4 if nbytes == 1000 else 2)
    assert torch.equal(target[:nbytes], source)
    assert not device.any()


def test_run_too_large_for_the_device_is_refused_and_others_continue(tmp_path: Path) -> None:
    backend = InlineBackend()
    with running_core(
        tmp_path, device=Accelerator("cuda:1", backend, block_elements=16, bounce_bytes=64), kernel="torch"
    ) as core:
        joined(core.join("r", _MANIFEST, _AVERAGES))
        backend.room_bytes = 5000
        refused = core.join("other", _MANIFEST, _AVERAGES)
        assert isinstance(refused, Refused)
        assert refused.code is RejectCode.OUT_OF_MEMORY
        assert f"{len(_AVERAGES)} averages of this model need" in refused.text
        assert refused.text.endswith("bytes of memory on cuda:1")
        assert isinstance(core.apply("r", 1, _weights(1)), Applied)
        backend.room_bytes = 1 << 20
        joined(core.join("other", _MANIFEST, _AVERAGES))


def test_memory_of_an_ended_run_is_returned_to_the_system(tmp_path: Path) -> None:
    backend = InlineBackend()
    with running_core(tmp_path, device=Accelerator("test:0", backend, block_elements=16)) as core:
        joined(core.join("r", _MANIFEST, _AVERAGES))
        core.apply("r", 1, _weights(1))
        before = backend.trimmed
        core.leave("r")
        core.settled("r", lambda status: status.memory_bytes == 0)

        assert backend.trimmed > before


@pytest.mark.parametrize(
    ("built", "devices", "name", "says"),
    [
        (None, 0, "cuda", "device is 'cuda': torch .* was built without CUDA: install a build with it"),
        ("12.6", 0, "cuda:1", "device is 'cuda:1': torch finds no CUDA device: check its driver"),
        ("12.6", 2, "cuda:2", "device is 'cuda:2': torch finds 2 CUDA devices: use cuda:0, cuda:1, or cpu"),
    ],
)
def test_unusable_device_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, built: str | None, devices: int, name: str, says: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)

    with pytest.raises(DeviceError, match=says):
        open_device(name)


def test_device_without_working_memory_is_named_at_server_start(tmp_path: Path) -> None:
    class Full(InlineBackend):
        def allocate(self, nbytes: int) -> torch.Tensor:
            raise MemoryError("CUDA out of memory")

    with (
        pytest.raises(DeviceError, match="device is 'test:0': it cannot be used: CUDA out of memory"),
        running_core(tmp_path, device=Accelerator("test:0", Full(), block_elements=16)),
    ):
        pass


def test_gpu_without_averages_gets_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = CudaRuntime()
    monkeypatch.setattr(torch, "cuda", runtime)
    stream: Any = SimpleNamespace(device=GPU)

    with CudaStream(stream).current():
        assert runtime.current == 1
        mark = CudaStream(stream).mark()
    mark.wait()

    assert runtime.current == 0
    assert runtime.contexts == {1}


def test_cpu_is_the_host() -> None:
    assert open_device("cpu") is HOST


@pytest.mark.gpu
def test_run_on_a_gpu_equals_the_host_within_float32_rounding(tmp_path: Path) -> None:
    """Values stay below 8; no update rounds by more than 9 eps of the largest, and there are fewer than 30."""
    device = Accelerator("cuda:0", CudaBackend(0), block_elements=16, bounce_bytes=64)
    bounds = {"model.safetensors": 30 * 9 * 8 * 2.0**-24, "state.safetensors": 30 * 9 * 8 * 2.0**-53}

    for ours, plain in zip(_life(tmp_path / "device", device), _life(tmp_path / "host", HOST), strict=True):
        assert ours.keys() == plain.keys()
        for (average, file), content in plain.items():
            found, expected = load(ours[average, file]), load(content)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                copied = average == "raw" or not value.is_floating_point() or name in ("mask", "u")
                torch.testing.assert_close(found[name], value, rtol=0, atol=0 if copied else bounds[file])


@pytest.mark.gpu
def test_whole_model_pass_on_a_gpu_equals_the_hosts(tmp_path: Path) -> None:
    """Blocks and buffers of their true sizes, an odd count; twice, so that every stage is used again."""
    manifest = manifest_of({"w": torch.zeros(9_999_991), "b": torch.zeros(5_000_003, dtype=torch.bfloat16)})
    snapshots = [
        encode(manifest, {"w": torch.randn(9_999_991), "b": torch.randn(5_000_003).bfloat16()}) for _ in range(3)
    ]
    held = []
    for device in (HOST, open_device("cuda")):
        pool = WorkerPool(device.workers, device.block_elements, device)
        memory = device.allocate(held_nbytes(manifest, Form.WIDE))
        for weight, snapshot in zip((None, 0.1, 0.001), snapshots, strict=True):
            pool.update(all_segments(manifest), snapshot, [Target(memory.data, Form.WIDE, weight)], None)
        pool.close()
        held.append(memory.data.cpu().view(torch.float32))

    torch.testing.assert_close(held[1], held[0], rtol=0, atol=2 * 9 * 8 * 2.0**-24)


@pytest.mark.gpu
def test_oversized_gpu_allocation_is_refused_and_freed_memory_reused() -> None:
    device = open_device("cuda")
    with pytest.raises(MemoryError, match=r"cannot allocate \d+ bytes on cuda:0: only \d+ are available"):
        device.allocate(1 << 50)
    device.trim()
    before = torch.cuda.memory_reserved(device.torch_device)
    memory = device.allocate(1 << 28)
    assert memory.data.device == device.torch_device
    assert not memory.data.any().item()
    assert torch.cuda.memory_reserved(device.torch_device) > before
    del memory
    device.trim()

    assert torch.cuda.memory_reserved(device.torch_device) <= before


@pytest.mark.gpu
def test_buffers_of_a_gpu_are_pinned() -> None:
    memory = CudaBackend(0).host(1 << 20)
    memory.view[:4] = b"abcd"

    assert memory.data.is_pinned()
    assert bytes(memory.data[:4].tolist()) == b"abcd"


@pytest.mark.process
@pytest.mark.gpu
def test_server_on_a_gpu_serves_what_a_server_on_the_host_does(tmp_path: Path) -> None:
    """As processes, over tcp, with three averages; each file is also held against a replay in float64."""
    specs, found = ("ema:0.9", "ema:0.99", "ema:0.999"), {}
    for name in ("cpu", "cuda"):
        with ServerProcess(tmp_path / name, "--device", name) as server:
            checks = server.get("/readyz")["checks"]
            assert f"averages are kept on {name}" in checks["device"]["detail"]
            with EmaClient(server.zmq, "r", specs, when_behind="wait") as client:
                for step in range(1, 201):
                    client.update(Toy().at(step), step)
            with Reader(server.http) as reader:
                for spec in specs:
                    average = spec.replace(":", "-")
                    folder = reader.download(reader.version("r", average), tmp_path / f"{name}-{average}")
                    check_version(folder)
                    found[name, average] = load_file(folder / "model.safetensors")

    for spec in specs:
        ours, plain = (found[name, spec.replace(":", "-")] for name in ("cuda", "cpu"))
        assert ours.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=200 * 9 * 8 * 2.0**-24, equal_nan=True)
