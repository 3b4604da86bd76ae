"""One timed run of one system in a process of its own: `python -m bench.child SYSTEM TEST ...`.

Prints one JSON line. Counts are checked here, before a rate exists.
"""

import argparse
import asyncio
import gc
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from bench import bare_hiredis, bare_redispy
from bench.work import LANES, STREAM, DocumentCreated, make_events, peak_rss_mb
from bus import Bus, Worker, event_handler


async def consume_bus(
    url: str, group: str, count: int, handler: Callable[[Any], Awaitable[None]]
) -> float:
    """Run a Worker with all its parts until `count` entries are acked."""
    times: dict[str, float] = {}
    acked = 0
    done = asyncio.Event()

    def listen(name: str, fields: dict[str, Any]) -> None:
        nonlocal acked
        if name == "worker.started":
            times["start"] = time.perf_counter()
        else:
            acked += fields["count"]
            if acked >= count:
                times["end"] = time.perf_counter()
                done.set()

    async with Bus.connect(url) as bus:
        bus.telemetry.attach("worker.started", listen)
        bus.telemetry.attach("delivery.acked", listen)
        decorated = event_handler(DocumentCreated, group=group)(handler)
        async with Worker(bus, handlers=[decorated]):
            await done.wait()
    return times["end"] - times["start"]


async def consume(system: str, url: str, group: str, count: int) -> dict[str, Any]:
    """Drain `count` entries with a no-op handler; check that each was handled and acked."""
    handled = 0

    async def handler(_: DocumentCreated) -> None:
        nonlocal handled
        handled += 1

    run = consume_bus if system == "bus" else bare_redispy.consume
    cpu = time.process_time()
    seconds = await run(url, group, count, handler)
    cpu = time.process_time() - cpu
    async with Bus.connect(url) as bus:
        pending = (await bus.redis.xpending(STREAM, group))["pending"]
    if handled != count or pending:
        raise SystemExit(f"{system}: handled {handled} of {count}, {pending} pending")
    return {"rate": count / seconds, "cpu_us": cpu / count * 1e6, "rss_mb": peak_rss_mb()}


async def publish(system: str, url: str, count: int) -> dict[str, Any]:
    """Publish `count` events from 100 concurrent callers that await each; check the stream."""
    events = make_events(count)
    bus = Bus.connect(url)
    publisher: Any = bus if system == "bus" else await bare_hiredis.Publisher.open(url)
    await publisher.publish(events[0])
    before = await bus.redis.xlen(STREAM)
    waiting = iter(events)
    gc.collect()
    gc.freeze()

    async def lane() -> None:
        for event in waiting:
            await publisher.publish(event)

    started = time.perf_counter()
    await asyncio.gather(*(lane() for _ in range(LANES)))
    seconds = time.perf_counter() - started
    added = await bus.redis.xlen(STREAM) - before
    if publisher is not bus:
        await publisher.close()
    await bus.close()
    if added != count:
        raise SystemExit(f"{system}: {added} entries added, {count} published")
    return {"rate": count / seconds}


def main() -> None:
    """Run one test and print its figures."""
    p = argparse.ArgumentParser()
    p.add_argument("system", choices=("bus", "bare-redis-py", "bare-hiredis"))
    p.add_argument("test", choices=("consume", "publish"))
    p.add_argument("--url", required=True)
    p.add_argument("--group", default="g")
    p.add_argument("--count", type=int, required=True)
    a = p.parse_args()
    if a.test == "consume":
        figures = uvloop.run(consume(a.system, a.url, a.group, a.count))
    else:
        figures = uvloop.run(publish(a.system, a.url, a.count))
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main()
