"""`ema averages` and `ema ledger`, and their errors when the server refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ema_cli.app import build
from ema_reader import NotFound, Reader, ReaderError, RequestRefused
from ema_server.averager.jobs import AddAverage, Changed, Job, RemoveAverage, Unchanged, WhyNot
from ema_server.storage.catalog import Version
from support.served import Served


def _ema(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    result = CliRunner().invoke(build(), list(arguments))
    return result.exit_code, result.stdout, result.stderr


def _with_ledger(served: Served) -> Version:
    version = served.publish("digits", 3).versions[0]
    path = version.folder / "version.json"
    ledger = {"origin": 0, "set": [1], "ranges": [[1, 3, 1]]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "ledger": ledger, "paces": []}))
    return version


def test_averages_print_as_a_table_or_json(served: Served, url: str) -> None:
    served.show("digits", 100, ["raw", "ema-0.9"])
    served.show("young", None, ["ema-0.9"])

    code, table, _ = _ema("averages", "digits", "--url", url)
    _, as_json, _ = _ema("averages", "digits", "--url", url, "--json")

    assert code == 0
    lines = [line.split() for line in table.splitlines()]
    assert lines[0][:6] == ["name", "step", "updates", "gap_steps", "decay", "half_life_steps"]
    assert lines[2] == ["ema-0.9", "100", "100", "0", "0.9", "6.6", "4.5", "25.000%", "float32", "ema:0.9"]
    assert json.loads(as_json)["averages"][1]["initial_share"] == 0.25


class _Foreign(BaseHTTPRequestHandler):
    """Answers every request with empty JSON."""

    def do_GET(self) -> None:
        body = b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_answer_of_another_server_is_a_clear_error() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Foreign)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with Reader(f"http://127.0.0.1:{server.server_port}", token="") as reader:
            asked: list[Callable[[], object]] = [
                lambda: reader.averages.of("digits"),
                lambda: reader.averages.add("digits", "ema:0.5"),
                lambda: reader.averages.ledger("digits", "raw"),
                lambda: reader.derived.synthesize("digits", sigma_rel=0.1),
            ]
            for ask in asked:
                with pytest.raises(ReaderError, match="does not answer as an ema server does"):
                    ask()
    finally:
        server.shutdown()
        thread.join(30.0)
        server.server_close()


def test_ledger_is_a_table_with_its_gaps(served: Served, url: str) -> None:
    version = _with_ledger(served)

    _, table, _ = _ema("ledger", "digits/ema-0.9", "--url", url)
    _, tail, _ = _ema("ledger", "digits/ema-0.9@step-3", "--tail", "1", "--url", url)
    _, as_json, _ = _ema("ledger", f"digits/ema-0.9@{version.id}", "--url", url, "--json")

    assert [line.split() for line in table.splitlines()] == [
        ["step", "share"],
        ["3", "0.1"],
        ["2", "0.09"],
        ["1", "0.81"],
    ]
    assert tail.splitlines()[1:] == ["   3  0.1", "0.9 of it lies in older steps"]
    assert sum(share for _, share in json.loads(as_json)["steps"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("averages", "other"), 3, "No such run"),
        (("averages", "digits", "--remove", "swa"), 3, "has no average 'swa'"),
        (("averages", "digits", "--add", "mean"), 2, "unknown average 'mean'"),
        (("averages", "digits", "--add", "ema:0.5", "--remove", "nope"), 2, "more than one --add or --remove"),
        (("averages", "digits", "--name", "x"), 2, "--name belongs to --add"),
        (("averages", "digits", "--add", "ema:0.5", "--add", "ema:0.6"), 2, "more than one --add or --remove"),
        (("averages", "digits", "--remove", "raw", "--remove", "x"), 2, "more than one --add or --remove"),
        (("ledger", "digits"), 2, "is not RUN/AVERAGE"),
        (("ledger", "digits/swa"), 3, "swa"),
    ],
)
def test_invalid_request_is_one_line_and_an_exit_code(
    served: Served, url: str, arguments: tuple[str, ...], code: int, text: str
) -> None:
    served.show("digits", 100, ["raw"])

    found, out, errors = _ema(*arguments, "--url", url)

    assert (found, out) == (code, "")
    assert errors.startswith("ema: ")
    assert text in errors
    assert len(errors.splitlines()) == 1


def test_reader_adds_and_removes_and_reports_refusals(tmp_path: Path) -> None:
    served = Served(tmp_path / "data")
    asked: list[Job] = []

    def submit(job: Job) -> None:
        asked.append(job)
        assert isinstance(job, AddAverage | RemoveAverage)
        if isinstance(job, AddAverage):
            served.show("digits", 100, ["raw", job.rule.name])
            job.reply(Changed(job.rule.name))
        else:
            job.reply(Unchanged(WhyNot.CONFLICT, "it is the last"))

    served.services = replace(served.services, submit=submit)
    served.show("digits", 100, ["raw"])
    with served.listening() as url, Reader(url, token="") as reader:
        assert reader.averages.add("digits", "ema:0.9995").name == "ema-0.9995"
        assert reader.averages.add("digits", "swa", name="mean").name == "mean"
        with pytest.raises(RequestRefused, match="it is the last"):
            reader.averages.remove("digits", "raw")
        with pytest.raises(NotFound, match="has no average 'swa'"):
            reader.averages.remove("digits", "swa")
        with pytest.raises(RequestRefused, match="unknown average"):
            reader.averages.add("digits", "mean")
    served.close()
    assert [type(job).__name__ for job in asked] == ["AddAverage", "AddAverage", "RemoveAverage"]
