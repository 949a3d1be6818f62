"""Names and targets as people write them: `RUN`, `RUN/AVERAGE`, `RUN/AVERAGE@REV`."""

from __future__ import annotations

from ema_proto.errors import LocalProtocolError
from ema_proto.names import check_name
from ema_reader.errors import UsageError


def parse_target(text: str) -> tuple[str, str, str]:
    """Split `RUN/AVERAGE[@REV]`; REV is a version id or its first 7 digits or more, `step-N` or `latest` (default).

    Raises:
        UsageError: a part is missing or not a valid name.
    """
    name, at, rev = text.partition("@")
    run, _, average = name.partition("/")
    if not run or not average or "/" in average or (at and not rev):
        raise UsageError(f"{text!r} is not RUN/AVERAGE[@REV], for example resnet34/ema-0.999@step-2000")
    return named("run", run), named("average", average), rev or "latest"


def named(kind: str, name: str) -> str:
    """The name of a run or an average (`kind`), checked.

    Raises:
        UsageError: it is not a valid name; the text says what a name is.
    """
    try:
        return check_name(kind, name)
    except LocalProtocolError as error:
        raise UsageError(str(error)) from None
