"""`ema push`: copies a version to a file system of fsspec or to the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from ema_reader.cli import render
from ema_reader.cli.options import Json, Target, Token, Url, exits
from ema_reader.pushing.push import push_version
from ema_reader.pushing.stores import open_store
from ema_reader.reader import DEFAULT_URL, Reader
from ema_reader.targets import parse_target


def push(
    target: Target,
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="hf://OWNER/NAME, s3://BUCKET/FOLDER or file:///FOLDER.")
    ],
    public: Annotated[bool, typer.Option("--public", help="A repository of the Hub that is made is public.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    json: Json = False,
) -> None:
    """Copy a version, verified, with a model card of its rule, ledger digest and scores. Prints where it is.

    The credentials are those of the destination's own tools: the profile of s3fs, HF_TOKEN or hf auth login.
    """
    with exits(), Reader(url, token) as reader:
        version = reader.version(*parse_target(target))
        store = open_store(destination, public=public, own_endpoint=reader.url)
        names = push_version(reader, version, store)
        shown = {"version": version, "address": store.address, "files": names}
        typer.echo(render.as_json(shown) if json else store.address)
