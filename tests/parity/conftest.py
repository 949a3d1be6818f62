"""One run through the complete service, and every library's own average of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ema_proto.averages.specs import parse_average
from ema_reader import Reader
from ema_reader.values import Ledger
from support.library_peers import Peer, State, Update
from support.parity_model import STEPS, Walk, Walker
from support.parity_table import PEERS
from support.processes import ServerProcess
from trainer_client import EmaClient

_RUN = "parity"


@dataclass(slots=True)
class Compared:
    """Results of the run: weights by step, the libraries' averages by label, ours and their ledgers by rule."""

    walk: Walk
    libraries: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    ours: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def pair(self, peer: Peer) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Our average and the library's; skips the test where the library is not installed."""
        if peer.label in self.absent:
            pytest.skip(self.absent[peer.label])
        return self.ours[peer.rule], self.libraries[peer.label]


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """1,000 steps through a real server and through all libraries."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread does not help with tensors this small
    try:
        return _compare(tmp_path_factory.mktemp("parity") / "data")
    finally:
        torch.set_num_threads(threads)


def _compare(data: Path) -> Compared:
    found = Compared(Walk())
    begun: dict[str, tuple[Update, State]] = {}
    for peer in PEERS:
        try:
            begun[peer.label] = peer.begin(found.walk.model)
        except pytest.skip.Exception as missing:
            found.absent[peer.label] = str(missing.msg)
    rules = {peer.rule: parse_average(peer.rule) for peer in PEERS}
    optimizer = Walker(found.walk)
    with ServerProcess(data) as server:
        client = EmaClient(server.zmq, _RUN, {rule.name: rule for rule in rules.values()}.values(), when_behind="wait")
        client.attach(found.walk.model, optimizer)
        for step in range(1, STEPS + 1):
            optimizer.step()
            for update, _ in begun.values():
                update(step)
        assert client.finish()
        assert sum(client.stats()["skipped"].values()) == 0
        with Reader(server.http) as reader:
            for text, rule in rules.items():
                version = reader.version(_RUN, rule.name, f"step-{STEPS}")
                found.ours[text] = reader.load(version)
                found.ledgers[text] = reader.averages.ledger(_RUN, rule.name, version.id)
    found.libraries = {label: state() for label, (_, state) in begun.items()}
    return found
