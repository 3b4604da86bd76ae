"""A replay script as a user would write it, run as a process of its own: to be killed.

python -m tests.faults.replay_program URL TOPIC GROUP CHECKPOINT [RATE]
"""

from __future__ import annotations

import asyncio
import sys

from bus import Bus, Event


class Verse(Event, type="saga.verse", key="skald"):
    skald: str
    n: int


async def main(url: str, topic: str, group: str, checkpoint: str, rate: float | None) -> None:
    async with Bus.connect(url) as bus:
        to = bus if group == "--publish" else group
        done = await bus.replay(topic, to=to, checkpoint=checkpoint, rate=rate)
        sys.stdout.write(f"{done.replayed}\n")


if __name__ == "__main__":
    _, url, topic, group, checkpoint, *rest = sys.argv
    asyncio.run(main(url, topic, group, checkpoint, float(rest[0]) if rest else None))
