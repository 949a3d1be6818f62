"""A link closes while another thread waits for its connections, whichever of the two is faster."""

from __future__ import annotations

import threading
import time

import pytest

from ema_server.ingest.link import RouterLink

_WAIT_S = 30.0


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.02])
def test_close_ends_the_wait_for_connections(delay_s: float) -> None:
    for _ in range(15):
        link = RouterLink()
        link.bind("tcp://127.0.0.1:0")
        ended: list[object] = []

        def watch(link: RouterLink = link, ended: list[object] = ended) -> None:
            while link.happenings(delay_s) is not None:
                time.sleep(delay_s)  # the event of the end is late for this thread
            ended.append(None)

        watching, closing = threading.Thread(target=watch), threading.Thread(target=link.close)
        watching.start()
        closing.start()
        watching.join(_WAIT_S)
        closing.join(_WAIT_S)

        assert ended == [None]
        assert not closing.is_alive()
