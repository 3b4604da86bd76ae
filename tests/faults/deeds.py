"""What the workers of the fault tests do, in processes of their own and in the test's.

Every step is written to a journal: one line, one `os.write`, so that what a killed process did is
known. Each event carries a canary that must never show up in a log.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bus import Backoff, DeadLettered, Delivery, Event, Reject, event_handler
from tests.witness import eventually

if TYPE_CHECKING:
    from bus import Handler

CANARY = "c4n4ry-p4yl04d"
PASSWORD = "c4n4ry-p4ssw0rd"
GROUP = "deeds"
STREAM = "bus:{deed:0}"
LEASE_S = 0.6
MAX_ATTEMPTS = 3


class Deed(Event, type="deed.done"):
    """kind: what its handler does; see `deeds`."""

    n: int
    kind: str = "quick"
    text: str = CANARY


class Journal:
    """Lines appended by all processes of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal"
        self.path.touch()

    def write(self, step: str, n: int, attempt: int = 0) -> None:
        line = f"{step} {n} {attempt} {os.getpid()}\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, line.encode())
        os.close(fd)

    def lines(self, step: str, pid: int | None = None) -> list[tuple[int, int]]:
        """(n, attempt) of every line of `step`, of one process or all."""
        finished = self.path.read_text().split("\n")[:-1]  # the last may be half written
        rows = [line.split() for line in finished]
        return [
            (int(n), int(attempt))
            for name, n, attempt, by in rows
            if name == step and pid in (None, int(by))
        ]

    def times(self, step: str) -> Counter[int]:
        """How often each n went through `step`."""
        return Counter(n for n, _ in self.lines(step))

    def flag(self, name: str) -> Path:
        """A file whose existence says something to another process."""
        return self.folder / name


async def _act(deed: Deed, delivery: Delivery[Deed], journal: Journal) -> None:
    match deed.kind:
        case "killer":
            await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGKILL)
        case "bystander":  # still at it when a killer beside it strikes
            for _ in range(5):
                await asyncio.sleep(0)
        case "nap":
            await asyncio.sleep(0.005)
        case "hold":
            await eventually(journal.flag("go on").exists)
        case "block":
            while not journal.flag("go on").exists():
                time.sleep(0.005)  # noqa: ASYNC251 - the fault: the loop hangs
    if deed.kind.startswith("stop"):
        os.kill(os.getpid(), signal.SIGSTOP)
    _fail(deed, delivery, journal)


def _fail(deed: Deed, delivery: Delivery[Deed], journal: Journal) -> None:
    match deed.kind:
        case "call" if not journal.flag("service is up").exists():
            raise ConnectionError(f"nobody answers: {deed.text}")
        case "flaky" if delivery.attempt == 1:
            raise ValueError(f"not yet: {deed.text}")
        case "doomed":
            raise ValueError(f"never: {deed.text}")
        case "stop and fail":
            raise ValueError(f"after the pause: {deed.text}")
        case "stop and reject":
            raise Reject("after the pause")


def deeds(journal: Journal, *, gate: asyncio.Event | None = None, **settings: Any) -> Handler[...]:
    """The one handler. gate: it waits for this before it does anything."""

    async def on_dead(dead: DeadLettered, bus: Any) -> None:
        journal.write("on_dead", dead.event.n, dead.delivery.attempt)

    settings = {
        "group": GROUP,
        "visibility_s": LEASE_S,
        "concurrency": 8,
        "max_attempts": MAX_ATTEMPTS,
        "backoff": Backoff(base_s=0.05, factor=1.0, jitter=0.0),
        "on_dead": on_dead,
        "breaker": None,  # dead letters at once; the breaker's tests are those of the guarantees
        **settings,
    }

    if "batch" in settings:

        @event_handler(Deed, **settings)
        async def do_all(deliveries: list[Delivery[Deed]]) -> None:
            for delivery in deliveries:
                journal.write("start", delivery.event.n, delivery.attempt)
            for delivery in deliveries:
                try:
                    await _act(delivery.event, delivery, journal)
                except ValueError as error:
                    delivery.fail(error)
                else:
                    journal.write("end", delivery.event.n, delivery.attempt)

        return do_all

    @event_handler(Deed, **settings)
    async def do(deed: Deed, delivery: Delivery[Deed]) -> None:
        journal.write("start", deed.n, delivery.attempt)
        if gate is not None:
            await gate.wait()
        else:
            await _act(deed, delivery, journal)
        journal.write("end", deed.n, delivery.attempt)

    return do
