"""A replay script as a user would write it, run as a process of its own: to be killed.

python -m tests.faults.replay_program URL TOPIC TO CHECKPOINT [RATE]

TO: a group; `--publish`; or `--write=FILE`, a function that writes the number of each event there.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from bus import Bus, Event


class Verse(Event, type="saga.verse", key="skald"):
    skald: str
    n: int


async def main(url: str, topic: str, to: Any, checkpoint: str, rate: float | None) -> None:
    async with Bus.connect(url) as bus:
        if to == "--publish":
            to = bus
        elif to.startswith("--write="):
            to = _Writer(to.removeprefix("--write="))
        done = await bus.replay(topic, to=to, checkpoint=checkpoint, rate=rate)
        sys.stdout.write(f"{done.replayed}\n")


class _Writer:
    """Writes what it is called with, as it comes: what was written a kill does not undo."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: PTH123, SIM115 - open until it is killed

    def __call__(self, event: Verse) -> None:
        self._file.write(f"{event.n}\n")


if __name__ == "__main__":
    _, url, topic, to, checkpoint, *rest = sys.argv
    asyncio.run(main(url, topic, to, checkpoint, float(rest[0]) if rest else None))
