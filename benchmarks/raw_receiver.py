"""The fastest receiver that pyzmq offers: it receives frames into existing memory and does nothing else.

Takes the lengths of a snapshot and of a frame. Prints one JSON line with its address, and sends an empty message after
each complete snapshot.
"""

from __future__ import annotations

import json
import mmap
import sys

import zmq

WINDOW_FRAMES = 8


def main() -> None:
    """Receive until the process is ended."""
    nbytes, frame_bytes = int(sys.argv[1]), int(sys.argv[2])
    memory = memoryview(mmap.mmap(-1, nbytes))
    with zmq.Context() as context, context.socket(zmq.PAIR) as pair:
        pair.setsockopt(zmq.RCVHWM, WINDOW_FRAMES)
        pair.bind("tcp://127.0.0.1:0")
        print(json.dumps({"endpoint": pair.getsockopt_string(zmq.LAST_ENDPOINT)}), flush=True)
        while True:
            for begin in range(0, nbytes, frame_bytes):
                pair.recv_into(memory[begin : begin + frame_bytes])
            pair.send(b"")


if __name__ == "__main__":
    main()
