"""A worker of the cleanup that kills itself: `python -m tests.handlers.cleaner '{"url": ...}'`.

per_step   documents and datasets that one step deletes
moment     "before" or "after" its n-th step it ends by SIGKILL
nth        which step, from 1
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

from bus import Worker
from bus.streams.stream import StreamStore
from handlers import cleanup
from tests.handlers.application import connect

LEASE_S = 0.6


def install(moment: str, nth: int) -> None:
    """Wrap what brings transactions to the server."""
    inner = StreamStore.commit
    steps = 0

    async def commit(self: StreamStore, target: Any, group: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += not group  # a transaction has none
        if moment == "before" and steps == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        result = await inner(self, target, group, *args, **kwargs)
        if moment == "after" and steps == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    StreamStore.commit = commit  # type: ignore[method-assign]


async def main(url: str) -> None:
    async with connect(url) as bus, Worker(bus, [cleanup.clean_up], lease_s=LEASE_S):
        await asyncio.Event().wait()


if __name__ == "__main__":
    wish = json.loads(sys.argv[1])
    cleanup.PER_STEP = wish["per_step"]
    install(wish["moment"], wish["nth"])
    asyncio.run(main(wish["url"]))
