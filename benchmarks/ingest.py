"""Throughput of snapshots from a trainer's model into an average over TCP, against a plain transfer of the bytes.

Ours: copy into the slot, send, receive, check for NaN and Inf, average, acknowledge; as fast as `when_behind="wait"`
allows. Rival: prepared frames of the same size, sent without a copy and received into existing memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from benchmarks.models import QUICK_WIDTHS, WIDTHS, Transformer, parameter_bytes
from benchmarks.raw_receiver import WINDOW_FRAMES
from benchmarks.result import Row, Section, Spread, interleaved
from benchmarks.served import START_S, serving, streaming
from ema_cli.demo.child import Child
from ema_proto.limits import CHUNK_BYTES_DEFAULT

_WAIT_MS = 60_000


def measure(*, quick: bool) -> Section:
    """One average of the larger model."""
    size, width = list((QUICK_WIDTHS if quick else WIDTHS).items())[-1]
    model = Transformer(width)
    nbytes, snapshots, rounds = parameter_bytes(model), 2 if quick else 10, 1 if quick else 7
    with (
        serving(4 * nbytes) as server,
        streaming(server.zmq, "ingest", "zmq", model) as ours,
        _raw(nbytes, server.folder) as rival,
    ):
        seconds = interleaved(rounds, ours=lambda: ours(snapshots), rival=lambda: rival(snapshots))
    rates = {arm: [nbytes * snapshots / second / 1e9 for second in taken] for arm, taken in seconds.items()}
    row = Row(
        f"{size}, float32, `ema:0.9999`",
        Spread.of(rates["ours"]).show("GB/s"),
        Spread.of(rates["rival"]).show("GB/s"),
        Spread.ratio(rates["ours"], rates["rival"]),
        "≥ 0.5, later 0.8",
    )
    return Section("ingest: tcp, averaging included", "pyzmq `recv_into`", (row,))


@contextmanager
def _raw(nbytes: int, folder: Path) -> Iterator[Callable[[int], float]]:
    """A function that sends `nbytes` a number of times, and returns the seconds until the last byte was received."""
    payload = memoryview(bytearray(nbytes))
    frames = [payload[begin : begin + CHUNK_BYTES_DEFAULT] for begin in range(0, nbytes, CHUNK_BYTES_DEFAULT)]
    command = ["-m", "benchmarks.raw_receiver", str(nbytes), str(CHUNK_BYTES_DEFAULT)]
    with (
        Child("receiver", command, folder / "receiver.log") as receiver,
        zmq.Context() as context,
        context.socket(zmq.PAIR) as pair,
    ):
        pair.setsockopt(zmq.LINGER, 0)
        pair.setsockopt(zmq.SNDHWM, WINDOW_FRAMES)
        pair.setsockopt(zmq.SNDTIMEO, _WAIT_MS)
        pair.setsockopt(zmq.RCVTIMEO, _WAIT_MS)
        pair.connect(receiver.first_line(START_S)["endpoint"])

        def send(snapshots: int) -> float:
            started = time.perf_counter()
            for _ in range(snapshots):
                for frame in frames:
                    pair.send(frame, copy=False)
            for _ in range(snapshots):
                pair.recv()
            return time.perf_counter() - started

        yield send
