"""A worker program with a fault in it: `python program.py '{"url": ..., "folder": ..., ...}'`.

A failpoint is installed here, around a verb of the store, the read or the handler; the product
knows nothing of it. It ends the process by SIGKILL, or stops it by SIGSTOP, just before the n-th
call of that verb or just after it.

    point   a verb of StreamStore, `read`, `handler`, `batch` or `on_dead`; "" for none
    moment  "before" or "after"
    nth     which call of it, from 1; "after" a taking one, only if it took something
    signal  "SIGKILL" or "SIGSTOP"
    lose_reads  that many replies to reads are dropped, as when a connection breaks
    settings    of the handler, of which `breaker` is a Breaker's; lease_s, stock (true for the
                default times)
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from bus import Breaker, Bus, Worker
from bus.instrument.logging import attach, configure
from bus.streams import stream
from bus.streams.answers import Taken
from bus.streams.connection import ConnectionLost
from bus.streams.doorbell import SharedReader
from bus.streams.reader import Reader
from bus.streams.stream import StreamStore
from bus.worker import reclaimer
from bus.worker.executor import Executor, Suspended
from tests.faults import deeds

if TYPE_CHECKING:
    from collections.abc import Callable

PLACES: dict[str, tuple[type, str]] = {
    "read": (Reader, "read"),
    "batch": (Executor, "call_batch"),
    "on_dead": (Executor, "call_on_dead"),
}


def _brought(point: str, result: Any) -> bool:
    """Whether a call that takes entries has taken any; other calls always count."""
    return (
        bool(result) if point == "read" else not isinstance(result, Taken) or bool(result.entries)
    )


def install(point: str, moment: str, nth: int, name: str) -> None:
    """Wrap the verb so that this process signals itself at its n-th call."""
    calls = 0

    def reached(now: str) -> None:
        nonlocal calls
        calls += now == moment
        if now == moment and calls == nth:
            os.kill(os.getpid(), signal.Signals[name])

    if point == "handler":
        install_around_handlers(reached)
        return
    owner, method = PLACES.get(point, (StreamStore, point))
    if point == "read" and stream.SHARED_READERS_FROM == 1:
        owner = SharedReader
    inner = getattr(owner, method)

    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        reached("before")
        result = await inner(*args, **kwargs)
        if _brought(point, result):
            reached("after")
        return result

    setattr(owner, method, wrapped)


def install_around_handlers(reached: Callable[[str], None]) -> None:
    """Say when a handler is about to be called, and when it has ended, suspended or not."""
    begin, finish = Executor.begin, Executor.finish

    def begins(*args: Any) -> Any:
        reached("before")
        ended = begin(*args)
        if not isinstance(ended, Suspended):
            reached("after")
        return ended

    async def finishes(*args: Any) -> Any:
        ended = await finish(*args)
        reached("after")
        return ended

    Executor.begin = begins  # type: ignore[method-assign]
    Executor.finish = finishes  # type: ignore[method-assign]


def lose_reads(count: int) -> None:
    """Drop the replies to the first `count` reads that brought something."""
    kind = SharedReader if stream.SHARED_READERS_FROM == 1 else Reader
    inner = kind.read
    lost = 0

    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal lost
        result = await inner(*args, **kwargs)
        if result and lost < count:
            lost += 1
            raise ConnectionLost("connection lost: by the test", sent=True)
        return result

    kind.read = wrapped  # type: ignore[method-assign]


async def main(wish: dict[str, Any]) -> None:
    """Work until SIGTERM."""
    journal = deeds.Journal(Path(wish["folder"]))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    lease_s = wish.get("lease_s", deeds.LEASE_S)
    settings = wish.get("settings", {})
    if wish.get("stock"):
        lease_s = 15.0
        settings = {"visibility_s": 30.0, **settings}
    if "breaker" in settings:
        settings["breaker"] = Breaker(**settings["breaker"])
    bus = Bus.connect(wish["url"])
    attach(bus.telemetry)
    async with bus:
        handler = deeds.deeds(journal, **settings)
        async with Worker(bus, [handler], lease_s=lease_s, name=wish.get("name")):
            await stop.wait()


if __name__ == "__main__":
    wish = json.loads(sys.argv[1])
    configure("json")
    reclaimer.SWEEP_S, reclaimer.SWEEP_LEASE_MS = 0.1, 400
    if wish.get("doorbell"):  # as if it had many handlers
        stream.SHARED_READERS_FROM = 1
    if wish.get("point"):
        install(wish["point"], wish["moment"], wish.get("nth", 1), wish.get("signal", "SIGKILL"))
    if wish.get("lose_reads"):
        lose_reads(wish["lose_reads"])
    uvloop.run(main(wish))
