"""One worker is killed half way; what it had in hand is followed until somebody has finished it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from demo import records, workload
from demo.crew import Crew
from demo.ledger import Place
from demo.watch import LOOK_AGAIN_S, held_by, still_pending, until

Held = list[tuple[str, Place]]
CHARGING = workload.charge.group
IN_HAND = 3  # messages it is to die with
LOOKS = 200  # some seconds; then it is killed with what it has


@dataclass(slots=True)
class Takeover:
    """What became of the killed worker's entries.

    held: group and place of what was pending with it when it died.
    taken_s: from the kill until none of it was pending with the dead any more.
    finished_s: from the kill until all of it was handled or dead-lettered.
    reclaimed: how many entries the other workers say they took over from it.
    """

    pid: int = 0
    held: Held = field(default_factory=list)
    taken_s: float = 0.0
    finished_s: float = 0.0
    reclaimed: int = 0

    @property
    def messages(self) -> int:
        """How many of them were messages to be charged."""
        return sum(group == CHARGING for group, _ in self.held)


async def kill_one(
    redis: Any, crew: Crew, say: Callable[[str], None], killed: asyncio.Event
) -> Takeover:
    """Kill a worker while it charges messages, hire another, follow the entries."""
    worker = crew.workers[0]
    try:
        for _ in range(LOOKS):
            crew.freeze(worker)  # else it would be done with them by the time it dies
            if len(await held_by(redis, worker.pid, [workload.charge])) >= IN_HAND:
                break
            crew.thaw(worker)
            crew.check()
            await asyncio.sleep(LOOK_AGAIN_S)
        killed_s = time.monotonic()
        await crew.kill(worker)
    finally:
        crew.thaw(worker)
        killed.set()
    takeover = Takeover(worker.pid, await _settled_held_by(redis, worker.pid))
    say(
        f"worker {worker.pid} killed (SIGKILL) with {len(takeover.held)} entries in hand,"
        f" {takeover.messages} of them messages to be charged"
    )
    await crew.hire()
    await until(partial(_let_go, redis, worker.pid))
    takeover.taken_s = time.monotonic() - killed_s
    await until(partial(_finished, redis, takeover.held))
    takeover.finished_s = time.monotonic() - killed_s
    takeover.reclaimed = count_reclaimed(crew, worker.pid)
    if takeover.held:
        say(f"they were taken over within {takeover.taken_s:.1f} s")
    return takeover


async def half_way(redis: Any, handled: int) -> None:
    """Return when so many documents were handled."""

    async def enough() -> bool:
        return int(await redis.hlen(records.handled("index"))) >= handled

    await until(enough)


async def _let_go(redis: Any, pid: int) -> bool:
    return not await held_by(redis, pid)


async def _finished(redis: Any, held: Held) -> bool:
    return not await still_pending(redis, held)


async def _settled_held_by(redis: Any, pid: int) -> Held:
    """Look until two looks agree: the server may still be reading the dead worker's last words."""
    before: Held | None = None
    while before != (now := await held_by(redis, pid)):
        before = now
        await asyncio.sleep(LOOK_AGAIN_S)
    return now


def count_reclaimed(crew: Crew, pid: int) -> int:
    """Return how many entries the workers say they took over from the process `pid`."""
    taken = crew.emitted("delivery.reclaimed")
    return sum(fields["count"] for fields in taken if f"-{pid}-" in fields["owner"])
