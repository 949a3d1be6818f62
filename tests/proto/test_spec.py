"""SPEC.md says what the code does: its tables are read and compared, its state tables are played."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ema_proto import limits
from ema_proto.dtypes import ITEM_BYTES
from ema_proto.errors import RejectCode
from ema_proto.names import OWN_FILES, RESERVED
from ema_proto.receiver.gang import ClaimState
from ema_proto.sender.events import SenderState
from ema_proto.wire import codec
from ema_proto.wire import messages as m
from ema_proto.wire.slot_offer import SLOT_OFFER_BYTES, SlotOffer
from support.messages import EXAMPLES
from support.peers import RECEIVER_STATES, receiver_after, sender_after
from support.stage import TYPES

NOTHING = "\N{EN DASH}"
SPEC = (Path(__file__).parents[2] / "proto" / "SPEC.md").read_text()


def table(after: str, first_column: str) -> list[dict[str, str]]:
    """The first table after this heading whose first column has this title."""
    lines = SPEC[SPEC.index(after) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def bare(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_message_table_has_every_type_number_and_direction() -> None:
    rows = {int(row["type"]): row for row in table("## 3.", "type")}

    assert {number: row["message"] for number, row in rows.items()} == TYPES
    for number, row in rows.items():
        both = number == m.Heartbeat.type
        assert row["direction"] == ("both" if both else "T→S" if number < 64 else "S→T")


def test_message_table_names_every_key_of_every_body() -> None:
    rows = {row["message"]: bare(row["body keys"]) for row in table("## 3.", "type")}
    for message in EXAMPLES.values():
        if isinstance(message, m.Join):  # what is None is left out of the body
            message = replace(message, publish_every_steps=100, host="machine", pid=1, files=(), gang="job")
        if isinstance(message, m.Joined):
            message = replace(message, set_aside="run-20260101", missing_files=(), send=((0, 0),), chunk_bytes=65536)
        if isinstance(message, m.Begin):
            message = replace(message, slot=0)
        if isinstance(message, m.Welcome):
            message = replace(message, shm="/run/ema/socket")
        if isinstance(message, m.Finished):
            message = replace(message, warning="an average is too long")
        if not isinstance(message, m.Chunk | m.File):
            assert set(message.body()) == set(rows[TYPES[message.type]])
    described = {key for row in table("## 3.", "key") for key in bare(row["key"])}
    assert described == {key for keys in rows.values() for key in keys}


def test_own_file_names_and_limits_of_files_are_listed() -> None:
    section = SPEC[SPEC.index("**Companion files.**") : SPEC.index("JOINED names the contents")]

    own = section[section.index("own files, in any case") :].partition("A file has")[0]
    assert set(bare(own)) == OWN_FILES
    for limit in (limits.FILE_NAME_CHARS_MAX, limits.FILE_BYTES_MAX, limits.FILES_BYTES_MAX):
        assert f"{limit:,}" in section


def test_message_table_names_uses_of_step_and_attempt() -> None:
    rows = {row["message"]: row["header"] for row in table("## 3.", "type")}
    for message in EXAMPLES.values():
        header, _ = codec.encode(message, session=bytes(16), epoch=1)
        used = codec.decode_header(header)
        if used.step:
            assert rows[TYPES[message.type]].startswith("step, attempt" if used.attempt else "step")
        if rows[TYPES[message.type]] == NOTHING:
            assert (used.step, used.attempt, used.offset, used.crc32) == (0, 0, 0, None)


def test_header_table_agrees_with_the_codec() -> None:
    rows = table("## 2.", "offset")
    position = 0
    for row in rows:
        assert int(row["offset"]) == position
        position += int(row["bytes"])
    at = {row["field"]: slice(int(row["offset"]), int(row["offset"]) + int(row["bytes"])) for row in rows}
    header = codec.encode_header(codec.Header(4, bytes(range(16)), 5, 6, 7, 8, 9, 10, 11, 12))
    read = {field: int.from_bytes(header[where], "little") for field, where in at.items()}

    assert position == limits.HEADER_BYTES
    assert header[at["magic"]] == limits.MAGIC
    assert header[at["session"]] == bytes(range(16))
    expected = {"type": 4, "epoch": 5, "length": 6, "step": 7, "attempt": 8, "offset": 9, "crc32": 10}
    expected |= {"major": 11, "minor": 12, "flags": 1, "reserved": 0}
    assert {field: read[field] for field in expected} == expected


def test_slot_offer_table_agrees_with_the_codec() -> None:
    rows = table("## 17.", "offset")
    packet = SlotOffer(bytes(range(16)), 7, 8).encode()
    at = {row["field"]: slice(int(row["offset"]), int(row["offset"]) + int(row["bytes"])) for row in rows}

    assert sum(int(row["bytes"]) for row in rows) == SLOT_OFFER_BYTES == len(packet)
    assert packet[at["magic"]] == limits.MAGIC
    assert packet[at["session"]] == bytes(range(16))
    read = {field: int.from_bytes(packet[where], "little") for field, where in at.items()}
    assert {"major": 1, "minor": 0, "slots": 7, "bytes": 8}.items() <= read.items()
    assert f"1 … {limits.SHARED_SLOTS_MAX}" in next(row["meaning"] for row in rows if row["field"] == "slots")


def test_limits_table_equals_limits_py_and_gives_reasons() -> None:
    rows = {row["limit"]: row for row in table("## 13.", "limit")}
    named = {name for name in vars(limits) if name.isupper()} - {"MAGIC", "VERSION_MAJOR", "VERSION_MINOR"}

    assert set(rows) == named
    for name, row in rows.items():
        assert row["value"] == str(getattr(limits, name)), name
        assert len(row["reason"]) > 3, name


def test_version_and_time_tables_equal_limits_py() -> None:
    times = {row["what"]: row["seconds"] for row in table("## 10.", "what")}

    assert f"The version is {limits.VERSION_MAJOR}.{limits.VERSION_MINOR}." in SPEC
    expected = [limits.HANDSHAKE_S, limits.SERVER_SILENT_S, limits.STALL_S, limits.REQUEST_S]
    expected += [limits.HEARTBEAT_S, limits.RECONNECT_PAUSE_S, limits.REJOIN_PAUSE_MAX_S]
    expected += [limits.RANKS_WAIT_S, limits.RANKS_WAIT_S, limits.SERVER_SILENT_S, limits.PART_WAIT_S]
    expected += [limits.FINISHED_KEPT_S]
    expected += [limits.PROBE_S, limits.SESSION_LOST_S]
    assert [float(value.split("…")[-1].split(",")[0]) for value in times.values()] == expected


def test_reject_table_has_every_code_with_scope_and_cure() -> None:
    rows = {row["code"].strip("`"): (row["scope"], row["the sender"]) for row in table("## 12.", "code")}

    assert rows == {code.value: (code.scope.value, code.cure.value) for code in RejectCode}


def test_dtypes_and_reserved_names_are_listed() -> None:
    dtypes = next(row for row in table("## 4.", "key") if row["key"] == "`dtype`")

    assert bare(dtypes["type and bounds"]) == list(ITEM_BYTES)
    assert set(bare(SPEC[SPEC.index("and not, in any case") : SPEC.index("Two averages of a run")])) == RESERVED


SENDER_TABLE = table("### Sender", "from the server")
RECEIVER_TABLE = table("### Receiver", "from the trainer")


def test_state_tables_have_every_state_and_message() -> None:
    sender_states = {state.value for state in SenderState} - {"disconnected", "failed", "closed"}
    from_server = {name for kind, name in TYPES.items() if kind >= 64} | {"HEARTBEAT"}
    from_trainer = {name for kind, name in TYPES.items() if kind < 64}

    assert set(SENDER_TABLE[0]) == {"from the server"} | sender_states
    assert from_server == {
        row["from the server"].split()[0] for row in SENDER_TABLE if row["from the server"][1].isupper()
    }
    assert set(RECEIVER_TABLE[0]) == {"from the trainer", "strange", "greeted"} | {state.value for state in ClaimState}
    assert tuple(RECEIVER_TABLE[0])[1:] == RECEIVER_STATES
    assert from_trainer == {row["from the trainer"] for row in RECEIVER_TABLE if row["from the trainer"].isupper()}


@pytest.mark.parametrize("row", SENDER_TABLE, ids=lambda row: row["from the server"])
@pytest.mark.parametrize("state", ["greeting", "greeted", "joining", "streaming"])
def test_sender_follows_its_state_table(row: dict[str, str], state: str) -> None:
    expected = row[state]

    assert sender_after(state, row["from the server"]) == (state if expected == NOTHING else expected)


@pytest.mark.parametrize("row", RECEIVER_TABLE, ids=lambda row: row["from the trainer"])
@pytest.mark.parametrize("state", RECEIVER_STATES)
def test_receiver_follows_its_state_table(row: dict[str, str], state: str) -> None:
    assert receiver_after(state, row["from the trainer"]) == row[state]
