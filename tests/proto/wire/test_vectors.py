"""The golden frames and transcripts, replayed both ways. EMA_REWRITE_VECTORS=1 rewrites them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from ema_proto.errors import RejectCode
from ema_proto.wire import messages as m
from ema_proto.wire.codec import CONTROL_MESSAGES, decode_chunk, decode_file, decode_frames, decode_header, encode
from support.messages import EPOCH, EXAMPLES, PAYLOAD, SESSION
from support.stage import TYPES, play

VECTORS = Path(__file__).parents[3] / "proto" / "vectors"
REWRITE = os.environ.get("EMA_REWRITE_VECTORS") == "1"
# Offset and size of each field, as SPEC.md section 2 says; test_spec.py holds the two together.
LAYOUT = {"major": (4, 1), "type": (6, 1), "flags": (7, 1), "epoch": (24, 8), "step": (32, 8), "attempt": (40, 4)}
LAYOUT |= {"length": (44, 4), "offset": (48, 8), "crc32": (56, 4)}


def vector(name: str, message: m.Message) -> dict[str, Any]:
    header, body = encode(message, session=SESSION, epoch=EPOCH)
    fields = {key: int.from_bytes(header[at : at + size], "little") for key, (at, size) in LAYOUT.items()}
    shown: dict[str, Any] = {"name": name, "message": TYPES[message.type], "fields": fields, "header": header.hex()}
    return shown | ({"payload": PAYLOAD.hex()} if isinstance(message, m.Chunk | m.File) else {"body": body.decode()})


def load() -> list[dict[str, Any]]:
    path = VECTORS / "frames.json"
    if REWRITE:
        frames = [vector(name, message) for name, message in EXAMPLES.items()]
        path.write_text(json.dumps(frames, indent=1, ensure_ascii=False) + "\n")
    loaded: list[dict[str, Any]] = json.loads(path.read_text())
    return loaded


FRAMES = load()


def test_every_message_type_has_a_golden_frame() -> None:
    assert {frame["message"] for frame in FRAMES} == set(TYPES.values())
    assert [frame["name"] for frame in FRAMES] == list(EXAMPLES)


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: frame["name"])
def test_golden_frame_reads_and_writes_identically(frame: dict[str, Any]) -> None:
    header = bytes.fromhex(frame["header"])
    expected = EXAMPLES[frame["name"]]
    if "payload" in frame:
        read = decode_file if isinstance(expected, m.File) else decode_chunk
        message: m.Message = read(decode_header(header))
        body = b""
    else:
        body = frame["body"].encode()
        message = decode_frames((header, body))[1]

    assert message == expected
    assert encode(message, session=SESSION, epoch=EPOCH) == (header, body)


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: frame["name"])
def test_golden_header_has_each_field_at_its_offset(frame: dict[str, Any]) -> None:
    header = bytes.fromhex(frame["header"])

    assert len(header) == 64
    assert header[:4] == b"EMAS"
    assert header[8:24] == SESSION
    assert header[60:] == bytes(4)
    for field, (at, size) in LAYOUT.items():
        assert int.from_bytes(header[at : at + size], "little") == frame["fields"][field], field


def test_golden_checksum_is_that_of_the_payload() -> None:
    frame = next(frame for frame in FRAMES if frame["fields"]["flags"])

    assert frame["fields"]["crc32"] == crc32(bytes.fromhex(frame["payload"]))


def transcripts() -> list[Path]:
    return sorted(VECTORS.glob("*/*.txt"))


@pytest.mark.parametrize("path", transcripts(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_machines_reproduce_each_transcript(path: Path) -> None:
    expected = path.read_text()
    said = play(expected)
    if REWRITE:
        path.write_text(said)
        return

    assert said.splitlines() == expected.splitlines()


def test_every_reject_code_has_a_transcript() -> None:
    assert {path.stem for path in (VECTORS / "rejects").iterdir()} == {code.value for code in RejectCode}
    for path in (VECTORS / "rejects").iterdir():
        assert f'"code":"{path.stem}"' in path.read_text(), path.name


def test_transcripts_show_every_message_type() -> None:
    said = {line.split()[2] for path in transcripts() for line in path.read_text().splitlines() if line[2:4] in "-><-"}

    assert {TYPES[kind] for kind in CONTROL_MESSAGES} <= said
