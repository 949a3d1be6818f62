"""A complete server without its socket, driven by jobs as by the ingest thread."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ema_proto.averages.specs import parse_average, parse_averages
from ema_proto.averages.step_units import UNKNOWN, StepUnits
from ema_proto.wire import messages
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout
from ema_proto.wire.messages import Mode, Resume
from ema_server.averager.jobs import (
    AddAverage,
    Applied,
    Apply,
    Changed,
    Deleted,
    DeleteRun,
    Durable,
    Failed,
    Finish,
    Join,
    Joined,
    Leave,
    NotInMemory,
    Publish,
    Quarantined,
    Reason,
    Refused,
    RemoveAverage,
    Rewind,
    Rewound,
    Unchanged,
    UseFiles,
)
from ema_server.compute.device import HOST, Device
from ema_server.config import ServerConfig
from ema_server.runs.status_store import RunStatus
from ema_server.server import build
from ema_server.storage.catalog import FileEntry, Version
from ema_server.storage.companions import CompanionStore
from ema_server.tensors.finite import FiniteCheck
from ema_server.tensors.layout import Segment, segments
from ema_server.tensors.selection import can_be_averaged
from support.memory_trainer import specs_of
from support.waiting import eventually

WAIT_S = 30.0
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_walls = itertools.count(1_750_000_000)


def manifest_of(
    tensors: Mapping[str, Tensor],
    roles: Mapping[str, Role] | None = None,
    aliases: Mapping[str, tuple[str, ...]] | None = None,
) -> Manifest:
    """The manifest of tensors in state-dict order; integers are buffers, floats parameters, unless in `roles`."""
    return layout(
        TensorSpec(
            name,
            NAMES[value.dtype],
            tuple(value.shape),
            (roles or {}).get(name, Role.PARAM if value.is_floating_point() else Role.BUFFER),
            0,
            (aliases or {}).get(name, ()),
        )
        for name, value in tensors.items()
    )


def encode(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Tensor:
    """The snapshot's bytes, written tensor by tensor."""
    slot = torch.zeros(manifest.nbytes, dtype=torch.uint8)
    for spec in manifest.tensors:
        value = tensors[spec.name].contiguous().reshape(-1)
        slot[spec.offset : spec.end] = value.view(torch.uint8) if value.numel() else value.to(torch.uint8)
    return slot


def all_segments(manifest: Manifest) -> tuple[Segment, ...]:
    """The segments of a run in which every average averages every tensor that can be averaged."""
    return segments(manifest, lambda tensor: -1 if can_be_averaged(tensor) else 0)


class ServerCore:
    """Submits jobs; each call waits for its answer.

    `checks_first`: snapshots are checked for NaN and Inf before they are submitted, as the chunks of tcp are. Otherwise
    the averager does it.
    """

    def __init__(
        self,
        data: Path,
        clock: Callable[[], float] = time.monotonic,
        device: Device = HOST,
        wall: Callable[[], float] = lambda: float(next(_walls)),
        checks_first: bool = True,
        **settings: Any,
    ) -> None:
        self.checks_first = checks_first
        config = ServerConfig(data=data, **{"publish_every_seconds": 0.0, **settings})
        self.server = build(config, device=device, clock=clock, wall=wall)
        self.data_dir = self.server.data_dir
        self.telemetry = self.server.services.telemetry
        self.statuses = self.server.services.statuses
        self.catalog = self.server.services.catalog
        self.companions = CompanionStore(self.data_dir)  # another one of the same folders
        self.ring = self.server.services.deriving.ring
        self.publisher = self.server.publisher
        self.averager = self.server.averager
        self.announced: list[tuple[str, int]] = []
        self.averager.listen(lambda run, step: self.announced.append((run, step)))
        self.manifests: dict[str, Manifest] = {}
        self.exempt: dict[str, frozenset[str]] = {}

    def start(self) -> None:
        """Start the averager and the publisher."""
        self.server.start()

    def stop(self) -> bool:
        """Publish everything, stop the threads and release the folder."""
        try:
            return self.averager.stop(WAIT_S)
        finally:
            self.server.close()

    def join(
        self,
        run: str,
        manifest: Manifest,
        averages: Sequence[str] = ("raw", "ema:0.9"),
        *,
        first_step: int = 1,
        every: int = 1,
        publish_every_steps: int | None = None,
        resume: Resume = "auto",
        reconnect: bool = False,
        config: str | None = None,
        world: int = 1,
        step_units: StepUnits = UNKNOWN,
        files: Mapping[str, bytes] | None = None,
    ) -> Joined | Refused:
        """Join a run."""
        specs = parse_averages(averages)
        asked = messages.Join(
            run=run,
            first_step=first_step,
            manifest=manifest,
            averages=specs,
            every=every,
            publish_every_steps=publish_every_steps,
            resume=resume,
            reconnect=reconnect,
            config=config,
            world=world,
            samples_per_step=step_units.samples_per_step,
            steps_per_epoch=step_units.steps_per_epoch,
            files=None if files is None else specs_of(files),
        )
        answer: Joined | Refused = self._ask(lambda reply: Join(run, asked, reply))
        if isinstance(answer, Joined):
            self.manifests[run], self.exempt[run] = answer.manifest, answer.exempt
        return answer

    def send(self, run: str, files: Mapping[str, bytes], missing: Sequence[str]) -> None:
        """Store the missing files of a JOIN, and use all of them, as the ingest thread does."""
        entries = tuple(FileEntry(spec.name, spec.nbytes, spec.sha256) for spec in specs_of(files))
        for entry in {entry.sha256: entry for entry in entries if entry.sha256 in missing}.values():
            assert self.companions.receive(run, entry).write(files[entry.name])
        self.averager.submit(UseFiles(run, entries))

    def apply(
        self, run: str, step: int, tensors: Mapping[str, Tensor], mode: Mode = "update"
    ) -> Applied | Quarantined | NotInMemory:
        """Apply a snapshot."""
        answer: Applied | Quarantined | NotInMemory = self._ask(
            lambda reply: self.apply_job(run, step, tensors, reply, mode)
        )
        if isinstance(answer, Applied):
            self.exempt[run] = answer.exempt
        return answer

    def apply_job(
        self,
        run: str,
        step: int,
        tensors: Mapping[str, Tensor],
        reply: Callable[[Applied | Quarantined | NotInMemory], None],
        mode: Mode = "update",
    ) -> Apply:
        """The job of `apply`, not submitted."""
        manifest = self.manifests[run]
        data = encode(manifest, tensors)
        check = FiniteCheck(manifest).exempt(self.exempt[run])
        return Apply(run, step, mode, data, check.check(0, data) if self.checks_first else None, reply)

    def publish(self, run: str, reason: Reason = "request") -> Durable | Failed:
        """Publish a run."""
        answer: Durable | Failed = self._ask(lambda reply: Publish(run, reason, reply))
        return answer

    def rewind(self, run: str, step: int) -> Rewound | Failed:
        """Rewind a run."""
        answer: Rewound | Failed = self._ask(lambda reply: Rewind(run, step, reply))
        return answer

    def finish(self, run: str) -> Durable | Failed:
        """Finish a run."""
        answer: Durable | Failed = self._ask(lambda reply: Finish(run, reply))
        return answer

    def add(self, run: str, spec: str) -> Changed | Unchanged:
        """Add an average."""
        answer: Changed | Unchanged = self._ask(lambda reply: AddAverage(run, parse_average(spec), reply))
        return answer

    def remove(self, run: str, average: str) -> Changed | Unchanged:
        """Remove an average."""
        answer: Changed | Unchanged = self._ask(lambda reply: RemoveAverage(run, average, reply))
        return answer

    def delete(self, run: str) -> Deleted | Unchanged:
        """Delete a run."""
        answer: Deleted | Unchanged = self._ask(lambda reply: DeleteRun(run, reply))
        return answer

    def leave(self, run: str, *, lost: bool = False) -> None:
        """End the session."""
        self.averager.submit(Leave(run, lost))

    def settled(self, run: str, done: Callable[[RunStatus], bool]) -> RunStatus:
        """The run's status once `done` is true for it; each poll goes through the averager."""

        def reached() -> RunStatus | None:
            self._ask(lambda reply: Publish("no-such-run", "request", reply))
            status = self.statuses.get(run)
            return status if status is not None and done(status) else None

        return eventually(reached, f"the status of run {run}", WAIT_S, every_s=0.001)

    def load(self, version: Version) -> dict[str, Tensor]:
        """The tensors of a version, by safetensors' own reader."""
        return load_file(version.folder / "model.safetensors")

    def _ask(self, job: Callable[[Callable[[Any], None]], Any]) -> Any:
        answers: queue.Queue[Any] = queue.Queue()
        self.averager.submit(job(answers.put))
        return answers.get(timeout=WAIT_S)


@contextmanager
def running_core(data: Path, **settings: Any) -> Iterator[ServerCore]:
    """A core within a `with` block, stopped like a server on SIGTERM."""
    core = ServerCore(data, **settings)
    core.start()
    try:
        yield core
    finally:
        core.stop()


def durable(answer: Durable | Failed) -> Durable:
    """The answer; fails unless it is a success."""
    assert isinstance(answer, Durable), answer
    return answer


def joined(answer: Joined | Refused) -> Joined:
    """The answer; fails unless it is a success."""
    assert isinstance(answer, Joined), answer
    return answer


def versions_by_average(answer: Durable | Failed) -> dict[str, Version]:
    """The versions of a successful publication by the average's name."""
    return {version.average: version for version in durable(answer).versions}
