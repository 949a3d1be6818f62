"""The end of the server: on a signal, or after a thread has died."""

from __future__ import annotations

import asyncio
import threading

from ema_server.server import wait_until_over

WAIT_S = 20.0


def test_signal_ends_the_wait_with_no_dead_thread() -> None:
    async def scene() -> tuple[str, ...]:
        asked = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, asked.set)
        return await asyncio.wait_for(wait_until_over(asked, {"averager": lambda: True}, 60.0), WAIT_S)

    assert asyncio.run(scene()) == ()


def test_dead_thread_ends_the_wait_and_is_named() -> None:
    release = threading.Event()
    threads = {"ingest": threading.Thread(target=release.wait, args=(WAIT_S,)), "averager": threading.Thread()}
    threads["averager"].start()
    threads["averager"].join(WAIT_S)
    threads["ingest"].start()

    async def scene() -> tuple[str, ...]:
        alive = {name: thread.is_alive for name, thread in threads.items()}
        return await asyncio.wait_for(wait_until_over(asyncio.Event(), alive, 0.01), WAIT_S)

    assert asyncio.run(scene()) == ("averager",)
    release.set()
    threads["ingest"].join(WAIT_S)
