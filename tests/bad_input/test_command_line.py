"""Every command with wrong arguments: one line with advice, exit code 2, nothing on stdout, no traceback."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ema_cli.app import COMMANDS, build, run
from ema_proto.averages.specs import parse_average
from ema_reader import Reader, ReaderError
from support.processes import Process

WAIT_S = 60.0


def ema(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run a command line in this process; pytest captures its output."""
    monkeypatch.setattr(sys, "argv", ["ema", *arguments])
    return run(build())


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_option_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    code = ema(monkeypatch, command, "--colour", "red")
    output = capsys.readouterr()

    assert (code, output.out, len(output.err.splitlines())) == (2, "", 1)
    assert output.err.startswith(f"ema {command}: ")
    assert "--colour" in output.err
    assert f"ema {command} --help" in output.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sreve"], "sreve"),
        (["--verbose"], "--verbose"),
        (["serve", "now"], "now"),
        (["serve", "--keep-generation", "3"], "--keep-generations"),
        (["serve", "--data"], "'--data' requires an argument; see ema serve --help"),
        (["serve", "--device", "mps"], "device is 'mps'"),
        (["serve", "--device", "cuda:999"], "device is 'cuda:999'"),
        (["status", "a", "b"], "b"),
        (["status", "--url", "ftp://host"], "ftp://host"),
        (["status", "--url", "http://[::1"], "http://[::1"),
        (["status", "--token", "schl\u00fcssel"], "EMA_TOKEN"),
        (["status", "--token", "from a file\n"], "EMA_TOKEN"),
        (["versions"], "RUN[/AVERAGE]"),
        (["download"], "RUN/AVERAGE"),
        (["download", "digits"], "'digits' is not RUN/AVERAGE"),
        (["download", "a/b/c"], "'a/b/c' is not RUN/AVERAGE"),
        (["download", "a/b@"], "'a/b@' is not RUN/AVERAGE"),
        (["evaluate"], "MODULE:FUNCTION"),
        (["evaluate", "m:f", "--run", "r", "--poll-s", "0"], "--poll-s"),
        (["evaluate", "m", "--run", "r"], "'m' is not module:function"),
        (["evaluate", "json:nothing", "--run", "r"], "no function 'nothing'"),
        (["evaluate", "m:f", "--every-versions", "0"], "--every-versions"),
        (["evaluate", "json:dumps", "--recalibrate-bn", "m"], "'m' is not module:function"),
        (["status", "a/b"], "run name 'a/b' has a character that is not allowed"),
        (["status", "../a"], "run name '../a'"),
        (["versions", ","], "run name ','"),
        (["versions", "a/b@c"], "average name"),
        (["download", "a/,"], "average name ','"),
        (["evaluate", "json:dumps", "--run", "a/b"], "run name 'a/b'"),
        (["evaluate", "json:dumps", "--averages", ","], "average name '' is empty"),
        (["evaluate", "json:dumps", "--averages", ""], "average name '' is empty"),
        (["evaluate", "json:dumps", "--task", ""], "--task is '': use 1 to 200 characters"),
        (["evaluate", "json:dumps", "--worker", "w" * 201], "--worker is 'www"),
        (["validate", "a/b", "--task", ""], "--task is ''"),
        (["averages"], "RUN"),
        (["averages", "r", "--add"], "ema averages: Option '--add' requires an argument"),
        (["averages", "r", "--add", "power:0.05"], "for example power:sigma_rel=0.05"),
        (["averages", ","], "run name ','"),
        (["averages", "r", "--add", "nope:3"], "nope"),
        (["averages", "r", "--add", "ema:0.9", "--name", ","], "average name ','"),
        (["averages", "r", "--remove", "a/b"], "average name 'a/b'"),
        (["ledger", "r"], "'r' is not RUN/AVERAGE"),
        (["synthesize"], "RUN"),
        (["blend"], "RUN/AVERAGE"),
        (["blend", "r"], "'r' is not RUN/AVERAGE"),
        (["blend", "r/ema"], "give another version, for example: ema blend r/ema --with raw --weights 0.7,0.3"),
        (["blend", "r/ema", "--with", "raw"], "give either --weights or --gamma"),
        (["blend", "r/ema", "--with", "raw", "--weights", "1,0", "--gamma", "0"], "give either --weights or --gamma"),
        (["blend", "r/ema", "--with", "raw@", "--gamma", "0"], "'r/raw@' is not RUN/AVERAGE"),
        (["blend", "r/ema", "--with", "raw", "--gamma", "a"], "--gamma 'a' is not a list of numbers"),
        (["blend", "r/ema", "--with", "raw", "--gamma", "nan"], "--gamma 'nan' has a number that is not finite"),
        (["blend", "r/ema", "--with", "raw", "--weights", "1"], "--weights 1 has 1 numbers for 2 versions"),
        (["blend", "r/ema", "--with", "raw", "--with", "swa", "--gamma", "0"], "--gamma is for two versions"),
        (["blend", "r/ema", "--with", "raw", "--gamma", ".1,.2", "--name", "x"], "--name names one average"),
        (["blend", "r/ema", "--with", "raw", "--gamma", ".1", "--max"], "belong to --evaluate"),
        (["synthesize", "a/b", "--sigma-rel", "0.1"], "run name 'a/b'"),
        (["synthesize", "r"], "give the widths to make, for example: ema synthesize r --sigma-rel 0.12"),
        (["synthesize", "r", "--sigma-rel", "nan"], "sigma_rel 'nan' is not a number"),
        (["synthesize", "r", "--sigma-rel", "0.1,"], "sigma_rel '' is not a number"),
        (["synthesize", "r", "--sigma-rel", "0.1,0.9"], "sigma_rel 0.9 is not at least"),
        (["synthesize", "r", "--sigma-rel", "0.1,0.2", "--name", "x"], "--name names one average"),
        (["synthesize", "r", "--sigma-rel", "0.1", "--by", "top1"], "belong to --evaluate"),
        (["synthesize", "r", "--sigma-rel", "0.1", "--evaluate", "m"], "'m' is not module:function"),
        (["synthesize", "r", "--sigma-rel", "0.1", "--gamma", "7"], "give one of them"),
        (["synthesize", "r", "--sigma-rel", "0.1", "--sigma-rel", "0.2", "--name", "x"], "--name names one average"),
        (["metrics"], "RUN"),
        (["metrics", "r", "--by"], "ema metrics: Option '--by' requires an argument"),
        (["best", "a/b"], "run name 'a/b'"),
        (["validate"], "RUN/AVERAGE"),
        (["validate", "digits"], "'digits' is not RUN/AVERAGE"),
        (["recalibrate", "digits/raw"], "--bn"),
        (["recalibrate", "digits", "--bn", "json:dumps"], "'digits' is not RUN/AVERAGE"),
        (["recalibrate", "digits/raw", "--bn", "json:nothing"], "no function 'nothing'"),
        (["healthcheck", "--url"], "--url"),
        (["doctor", "all"], "all"),
        (["demo", "--steps", "1"], "--steps"),
        (["demo", "--steps", "many"], "--steps"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    code = ema(monkeypatch, *arguments)
    output = capsys.readouterr()

    assert (code, output.out, len(output.err.splitlines())) == (2, "", 1), output.err
    assert output.err.startswith("ema")
    assert says in output.err


@pytest.mark.parametrize("rule", ["ema", "power", "swa", "window", "wsd", "raw"])
def test_invalid_rule_is_answered_with_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    code = ema(monkeypatch, "averages", "r", "--add", f"{rule}:speed=5")
    example = capsys.readouterr().err.strip().rpartition("for example ")[2]

    assert code == 2
    assert rule == parse_average(example).KEYWORD


def test_no_arguments_print_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = ema(monkeypatch)
    output = capsys.readouterr()

    assert code == 2
    assert "serve" in output.out + output.err


def test_invalid_switch_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EMA_INSECURE", "maybe")

    assert ema(monkeypatch, "serve") == 2
    assert "EMA_INSECURE" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["def f(:", "raise RuntimeError('no data')", "import no_such_package", "exit()"])
def test_unimportable_module_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    (tmp_path / "broken_evaluation.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "broken_evaluation", raising=False)

    assert ema(monkeypatch, "evaluate", "broken_evaluation:f", "--run", "r") == 2
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1
    assert "broken_evaluation" in output.err


def test_nested_import_failure_shows_its_path_and_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "far_evaluation.py").write_text("import far_training\n")
    (tmp_path / "far_training.py").write_text(
        "\ntry:\n    import zmq\nexcept ImportError as e:\n    raise OSError('no') from e"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "zmq", None)

    assert ema(monkeypatch, "evaluate", "far_evaluation:f", "--run", "r") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "far_evaluation.py:1 > far_training.py:" in line
    assert "OSError: no" in line
    assert "zmq" in line
    assert "pip install '.[trainer]'" in line


def test_missing_module_is_named_with_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    assert ema(monkeypatch, "evaluate", "no_such_evaluation:f") == 2
    assert f"there is no such module, also not in {tmp_path}" in capsys.readouterr().err


@contextmanager
def answering(body: bytes, status: int = 200) -> Iterator[str]:
    """A server that is not an ema server, with one answer to every request; yields its URL."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(WAIT_S)


_FOREIGN = [b"[]", b"{}", b'"hello"', b'{"runs": 3}', b'{"runs": [{}]}', b"<html>", b"null", b'{"versions": [null]}']


@pytest.mark.parametrize("body", _FOREIGN)
@pytest.mark.parametrize("arguments", [["status"], ["status", "r"], ["versions", "r/raw"], ["download", "r/raw"]])
def test_answer_of_another_server_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], body: bytes
) -> None:
    with answering(body) as url:
        code = ema(monkeypatch, *arguments, "--url", url)
        output = capsys.readouterr()

    assert (code, output.out, len(output.err.splitlines())) == (1, "", 1), output
    assert url in output.err


@pytest.mark.parametrize("body", [b"<html>\n<p>404</p>\n</html>", b'{"detail": "Not Found"}', b""])
@pytest.mark.parametrize(
    "arguments", [["status", "r"], ["download", "r/raw"], ["evaluate", "json:dumps", "--run", "r"]]
)
def test_404_of_another_server_is_one_line_without_retries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], body: bytes
) -> None:
    with answering(body, status=404) as url:
        code = ema(monkeypatch, *arguments, "--url", url)
        output = capsys.readouterr()

    assert (code, output.out, len(output.err.splitlines())) == (1, "", 1), output
    assert f"{url} answers 404" in output.err


@pytest.mark.parametrize("target", ["/raw", "r/", "r/raw/x"])
def test_versions_of_an_invalid_name_are_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    assert ema(monkeypatch, "versions", target) == 2
    assert repr(target) in capsys.readouterr().err


@pytest.mark.parametrize("body", _FOREIGN)
def test_another_server_is_not_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], body: bytes
) -> None:
    with answering(body, 503) as url:
        assert ema(monkeypatch, "healthcheck", "--url", url) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("key", ["run", "average", "file"])
@pytest.mark.parametrize("name", ["..", "../../evil", "/etc/evil", "a\\b", "a\0b", ""])
def test_server_names_never_lead_out_of_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, name: str
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    names = {"run": "r", "average": "raw", "file": "model.safetensors", key: name}
    version = {
        "id": "0" * 40,
        "run": names["run"],
        "average": names["average"],
        "spec": "raw",
        "step": 1,
        "updates": 1,
        "gap_steps": 0,
        "created": "2026-01-01T00:00:00Z",
        "files": [{"name": names["file"], "size": 2, "sha256": "0" * 64}],
    }
    with answering(json.dumps(version).encode()) as url, Reader(url) as reader:
        assert ema(monkeypatch, "download", "r/raw", "--url", url) == 1
        with pytest.raises(ReaderError, match="not a plain name"):
            reader.version("r", "raw")

    assert list(tmp_path.rglob("*")) == [inside]


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["versions", "r"],
        ["download", "r/raw"],
        ["validate", "r/raw"],
        ["healthcheck"],
        ["evaluate", "json:dumps", "--run", "r"],
    ],
    ids=" ".join,
)
def test_ctrl_c_ends_a_command_that_waits_for_the_server(tmp_path: Path, arguments: list[str]) -> None:
    """The server accepts the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Process("-m", "ema_cli", *arguments, "--url", url, env={"NO_COLOR": "1"}) as process:
            silent.settimeout(WAIT_S)
            connection, _ = silent.accept()
            with connection:
                connection.settimeout(WAIT_S)
                connection.recv(1)
                process.send(signal.SIGINT)
                code = process.wait(WAIT_S)

    assert (code, list(process.lines)) == (130, [])
    assert not any("Traceback" in line for line in process.errors), list(process.errors)


def test_ctrl_c_ends_the_doctor(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(WAIT_S)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Process("-m", "ema_cli", "doctor", "--http", address, "--data", str(tmp_path)) as process:
            silent.accept()[0].close()
            process.send(signal.SIGINT)
            code = process.wait(WAIT_S)

    assert code in (130, 0, 1)  # it may end before the signal arrives
    assert not any("Traceback" in line for line in process.errors), list(process.errors)


def test_ctrl_c_during_imports_prints_no_traceback(tmp_path: Path) -> None:
    """The interrupt is raised inside an import, which takes most of the time of a short command."""
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    with Process("-m", "ema_cli", "status", env={"PYTHONPATH": path}) as process:
        code = process.wait(WAIT_S)

    assert (code, list(process.errors)) == (130, [])


@pytest.mark.parametrize("arguments", [["doctor", "--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0"], ["--help"]])
def test_full_disk_under_stdout_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "ema_cli", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=WAIT_S, check=False)

    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--zmq", "nonsense", "'nonsense' is not tcp://HOST:PORT or ipc://PATH"),
        ("--zmq", "ipc://", "'ipc://' is not"),
        ("--zmq", "tcp://a:b:c", "'a:b:c' is not HOST:PORT"),
        ("--http", "", "'' is not HOST:PORT"),
        ("--http", ":8080", "':8080' is not HOST:PORT"),
        ("--http", "127.0.0.1:-5", "'127.0.0.1:-5' is not HOST:PORT"),
        ("--data", "/dev/null", "/dev/null is not a folder"),
    ],
)
def test_doctor_reports_a_setting_that_no_server_accepts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str, says: str
) -> None:
    assert ema(monkeypatch, "doctor", option, value) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if says in line]
    assert line.startswith("problem")
    assert f"with {option}" in line
