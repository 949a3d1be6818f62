"""Generates the tables of the docs site from the code: settings, commands, HTTP API, Python defaults, metrics.

`BLOCKS` maps the name in a page's `<!-- generate: NAME -->` to the function that writes the block.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from ema_cli.app import build
from ema_reader import Reader
from ema_server.http.problems import Code
from trainer_client import EmaClient

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- generate: ([\w-]+) -->$", flags=re.MULTILINE)

_ANSWER_S = 20
_STOP_S = 60
_METHODS = ("get", "head", "post", "put", "delete")
_BOUNDS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "minLength": "length ≥",
    "maxLength": "length ≤",
}


def server_settings() -> str:
    """The options of `ema serve`, which are the fields of `ServerConfig`."""
    rows = [
        (f"`{option.opts[0]}`<br>`{option.envvar}`", _default(option.default), option.help)
        for option in _options(_commands()["serve"])
    ]
    return _table(("option, variable", "default", "meaning"), rows)


def trainer_settings() -> str:
    """The arguments of `EmaClient`."""
    return _signature(EmaClient)


def reader_settings() -> str:
    """The arguments of `Reader`."""
    return _signature(Reader)


def commands() -> str:
    """Every command of `ema` with its arguments and options."""
    parts: list[str] = []
    for name, command in _commands().items():
        parts += [f"## ema {name}", inspect.cleandoc(command.help or ""), f"```text\n{_usage(name, command)}\n```"]
        rows = [_parameter(parameter) for parameter in [*_positional(command), *_options(command)]]
        parts.append(_table(("parameter, variable", "default", "meaning"), rows))
    return "\n\n".join(parts)


def endpoints() -> str:
    """Every endpoint of the HTTP API, by tag."""
    by_tag: dict[str, list[str]] = {}
    for path, operations in _api()["paths"].items():
        for method in _METHODS:
            if method in operations:
                operation = operations[method]
                by_tag.setdefault(operation["tags"][0], []).extend(_operation(method, path, operation))
    return "\n\n".join(part for tag, parts in by_tag.items() for part in (f"## {tag.capitalize()}", *parts))


def error_codes() -> str:
    """Every `code` of a problem+json body."""
    rows = [(f"`{word}`", str(status), title) for word, status, title in (code.value[:3] for code in Code)]
    return _table(("code", "status", "title"), rows)


def json_types() -> str:
    """The JSON types of the HTTP API."""
    parts: list[str] = []
    for name, schema in sorted(_api()["components"]["schemas"].items()):
        parts += [f"### {name}", inspect.cleandoc(schema.get("description", ""))]
        required = schema.get("required", [])
        rows = [
            (f"`{field}`", _type(value), "required" if field in required else _default(value.get("default")))
            for field, value in schema.get("properties", {}).items()
        ]
        parts.append(_table(("field", "type", "default"), rows))
    return "\n\n".join(parts)


def metrics() -> str:
    """Every Prometheus metric that the server exposes."""
    text = exposition()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.MULTILINE))
    helps = re.findall(r"^# HELP (\S+) (.*)$", text, flags=re.MULTILINE)
    return _table(("metric", "type", "meaning"), [(f"`{name}`", kinds[name], help_text) for name, help_text in helps])


def exposition() -> str:
    """The answer of `GET /metrics` of a new server."""
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "ema_cli", "serve", "--data", data, "--log-level", "warning"]
        free_ports = ["--zmq", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0"]
        server = subprocess.Popen([*command, *free_ports], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert server.stdout is not None
            address = json.loads(server.stdout.readline())["http"]
            with urllib.request.urlopen(f"{address}/metrics", timeout=_ANSWER_S) as answer:  # noqa: S310  loopback
                return str(answer.read().decode())
        finally:
            server.terminate()
            server.communicate(timeout=_STOP_S)


BLOCKS: Mapping[str, Callable[[], str]] = {
    "server-settings": server_settings,
    "trainer-settings": trainer_settings,
    "reader-settings": reader_settings,
    "commands": commands,
    "endpoints": endpoints,
    "error-codes": error_codes,
    "json-types": json_types,
    "metrics": metrics,
}


def fill(markdown: str) -> str:
    """Replace each mark by its block.

    Raises:
        KeyError: a mark names no block.
    """
    return MARK.sub(lambda mark: BLOCKS[mark[1]](), markdown)


def _api() -> Any:
    return json.loads((ROOT / "proto" / "openapi.json").read_text())


def _commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(build())
    return dict(group.commands)


def _positional(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if parameter.param_type_name == "argument"]


def _options(command: Any) -> list[Any]:
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    return [option for option in options if option.name != "help" and not option.hidden]


def _usage(name: str, command: Any) -> str:
    shown = [each.metavar if each.required else f"[{each.metavar}]" for each in _positional(command)]
    return " ".join(["ema", name, *shown, "[OPTIONS]"])


def _parameter(parameter: Any) -> tuple[str, str, str]:
    options = [] if parameter.param_type_name == "argument" else [*parameter.opts, *parameter.secondary_opts]
    name = " ".join(filter(None, [", ".join(options), parameter.metavar]))
    variable = f"<br>`{parameter.envvar}`" if parameter.envvar else ""
    default = "required" if parameter.required else _default(parameter.default)
    return f"`{name}`{variable}", default, parameter.help or ""


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {method.upper()} {path}"
    yield inspect.cleandoc(operation.get("description", ""))
    parameters = [
        (f"`{parameter['name']}`", parameter["in"], _type(parameter["schema"]), parameter.get("description", ""))
        for parameter in operation.get("parameters", [])
        if parameter["in"] != "path"
    ]
    if parameters:
        yield _table(("parameter", "in", "type", "meaning"), parameters)
    for kind, media in operation.get("requestBody", {}).get("content", {}).items():
        yield f"Body: {_body(kind, media)}"
    answers = [
        (
            "others" if status == "default" else status,
            answer["description"].replace("Successful Response", "Success"),
            ", ".join(_body(kind, media) for kind, media in answer.get("content", {}).items()),
        )
        for status, answer in sorted(operation["responses"].items())
    ]
    yield _table(("status", "meaning", "body"), answers)


def _body(kind: str, media: Mapping[str, Any]) -> str:
    is_json = kind in ("application/json", "application/problem+json") and media.get("schema")
    return _type(media["schema"]) if is_json else f"`{kind}`"


def _type(schema: Mapping[str, Any]) -> str:
    """A short text for a JSON schema."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if schema.get("type") == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})]
        return f"list of {', '.join(_type(item) for item in items)}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"object of {_type(schema['additionalProperties'])}"
    bounds = [f"{word} {schema[key]}" for key, word in _BOUNDS.items() if key in schema]
    return ", ".join([str(schema.get("type", "any value")), *bounds])


def _signature(kind: type) -> str:
    """Arguments of a constructor, described as in its docstring."""
    described = _arguments(kind)
    parameters = [each for each in inspect.signature(kind).parameters.values() if each.name != "self"]
    rows = [(f"`{each.name}`", _default(each.default), described[each.name]) for each in parameters]
    return _table(("argument", "default", "meaning"), rows)


def _arguments(documented: Any) -> dict[str, str]:
    """The `Args:` section of a docstring, by argument."""
    text = (inspect.getdoc(documented) or "") + "\n"
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)+)", text, flags=re.MULTILINE)
    entries = re.findall(r"^    (\w+): ((?:.*\n)(?:^     +.*\n)*)", section[1] if section else "", flags=re.MULTILINE)
    return {name: " ".join(description.split()) for name, description in entries}


def _default(value: object) -> str:
    if value is None or value is inspect.Parameter.empty or value == ():
        return "none"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, str | Path) else f"`{json.dumps(value)}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
