"""A redrive that is killed again and again, and run twice at once: every letter goes exactly once.

As a program, `python test_redrive_killed.py URL RATE`, it redrives and prints what it did.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from bus import Bus, Delivery, Event, Topic, Worker, event_handler
from tests.witness import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

LETTERS = 2_000
TOPIC = Topic("carry", partitions=2)
STREAMS = ("bus:{carry:0}", "bus:{carry:1}")
RATE = 2_000  # a second: there is time to be killed in


class Carried(Event, type="carry.carried", key="n"):
    n: int


async def main(url: str, rate: float) -> None:
    """Redrive everything."""
    async with Bus.connect(url, topics=[TOPIC]) as bus:
        result = await bus.dead_letters("index").redrive(rate=rate)
    sys.stdout.write(json.dumps([result.matched, result.redriven, result.gone]))


@pytest.fixture
def start(url: str) -> Iterator[Any]:
    """Start the program; whatever still runs in the end is killed."""
    running: list[subprocess.Popen[str]] = []
    root = Path(__file__).parents[2]

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, __file__, url, str(RATE)],
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


async def ns_at(redis: Any, what: str) -> list[int]:
    """The n of all entries of inboxes, or of dead letters."""
    found = []
    for stream in STREAMS:
        rows = await redis.xrange(f"{stream}:{what}:index")
        found += [json.loads(fields[b"data"])["n"] for _, fields in rows]
    return found


async def test_every_letter_is_in_one_place_whenever_a_redrive_is_killed(
    start: Any, url: str
) -> None:
    async with Redis.from_url(url) as redis, Bus.connect(url, topics=[TOPIC]) as bus:
        await bus.topics.record("carry")
        pipe = redis.pipeline()
        for stream in STREAMS:
            pipe.xgroup_create(stream, "index", "0", mkstream=True)
        for n in range(LETTERS):
            letter: dict[Any, Any] = {
                "id": f"e{n}",
                "type": "carry.carried",
                "data": f'{{"n":{n}}}',
            }
            letter |= {"deadreason": "failed", "deaderror": "E: e", "deadtraceback": "x" * 500}
            letter |= {"deadattempts": "5", "deadentry": f"{n + 1}-0", "deadtime": "1"}
            pipe.xadd(f"{STREAMS[n % 2]}:dead:index", letter)
        await pipe.execute()

        async def in_inboxes() -> int:
            return sum([await redis.xlen(f"{s}:inbox:index") for s in STREAMS])

        for _ in range(4):
            before = await in_inboxes()
            process = start()
            await eventually(lambda b=before: _more(in_inboxes, b + 150))
            process.kill()
            assert process.wait() < 0, "it was done before it was killed"
            moved, left = await ns_at(redis, "inbox"), await ns_at(redis, "dead")
            assert Counter(moved + left) == Counter(range(LETTERS))
            assert left
        both = [start(), start()]
        outputs = [await asyncio.to_thread(p.communicate, timeout=60) for p in both]
        assert [p.returncode for p in both] == [0, 0]
        results = [json.loads(out) for out, _ in outputs]
        assert sum(redriven for _, redriven, _ in results) == len(left)
        assert all(matched == redriven + gone for matched, redriven, gone in results)
        assert await ns_at(redis, "dead") == []
        assert Counter(await ns_at(redis, "inbox")) == Counter(range(LETTERS))

        handled: list[tuple[int, str, int]] = []
        others: list[int] = []

        @event_handler(Carried, group="index")
        async def index(event: Carried, delivery: Delivery[Carried]) -> None:
            handled.append((event.n, delivery.envelope.entry_id, delivery.attempt))

        @event_handler(Carried, group="audit")
        async def audit(event: Carried) -> None:
            others.append(event.n)

        async with Worker(bus, [index, audit]) as worker:
            await worker.drained()
        assert sorted(handled) == [(n, f"{n + 1}-0", 1) for n in range(LETTERS)]
        assert others == []
        assert await in_inboxes() == 0


async def _more(count: Any, than: int) -> bool:
    return bool(await count() > than)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
