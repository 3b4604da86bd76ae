"""How costs grow: with the backlog, handlers, partitions, and what is pending and parked.

Prints the figures, writes them to `docs/growth.json`, and draws `docs/growth.png`. Each curve is
one run on one machine: its shape means something, its height is the machine's.
"""

import asyncio
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import redis
import uvloop

from bench.compare import ROOT, SYSTEMS, Bench, Child, child_of
from bench.systems.bus_ import DocumentCreated
from bench.work import BATCH, make_fields
from bus import Bus, Event, Topic, Worker, event_handler
from bus.embedded import EmbeddedServer
from bus.streams import keys

STREAM = "bus:{bench:0}"
Curves = dict[str, dict[int, float]]

_PARK = """
local ids, lane = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], '+', 5000, ARGV[3]), ARGV[4]
for _, row in ipairs(ids) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], lane, 0, row[1], 'RETRYCOUNT', 1, 'JUSTID')
end
return {#ids, ids[#ids] and ids[#ids][1] or ''}
"""


class Spread(Event, type="growth.spread", key="key"):
    """One of many keys."""

    key: str
    n: int


def backlog(sizes: list[int], rounds: int) -> Curves:
    """Consuming a backlog, and publishing behind one; memory of worker and server."""
    found: Curves = {
        "consume_per_s": {},
        "publish_100_callers_per_s": {},
        "worker_rss_mb": {},
        "server_bytes_per_entry": {},
    }
    bench = Bench(["bus"], most_s=2.0, paced=0)
    bus = SYSTEMS["bus"]
    with EmbeddedServer() as server, redis.Redis.from_url(server.url, protocol=2) as client:
        bench.server, bench.client = server, client
        for size in sizes:
            bench._fill("bus", size)  # noqa: SLF001 - the same bench
            used = client.memory_usage(STREAM, samples=0)
            found["server_bytes_per_entry"][size] = used / size
            runs = [
                bench._drained("bus", "consume", size)  # noqa: SLF001 - the same bench
                for _ in range(rounds * (5 if size <= 10_000 else 1))  # noqa: PLR2004 - what is over sooner is noisier
            ]
            found["consume_per_s"][size] = statistics.median(r["rate"] for r in runs)
            found["worker_rss_mb"][size] = max(r["rss_mb"] for r in runs)
            client.xgroup_create(STREAM, "slow", "0")  # somebody needs all of it
            with child_of(bus) as child:
                found["publish_100_callers_per_s"][size] = _published(child, server.url, rounds)
        bench.close()
    return found


def _published(child: Child, url: str, rounds: int) -> float:
    order = {"do": "publish", "url": url, "way": "concurrent", "count": 20_000, "most_s": 5}
    return float(statistics.median(child.ask(**order)["rate"] for _ in range(rounds)))


async def handlers(counts: list[int], url: str) -> Curves:
    """Handlers in one worker: deliveries per second in all; an event on an idle topic."""
    found: Curves = {"deliveries_per_s": {}, "server_cpu_us_per_event": {}, "worker_cpu_us": {}}
    events = [DocumentCreated(**f) for f in make_fields(4 * BATCH)]
    for count in counts:
        async with Bus.connect(url, topics=[Topic("bench")]) as bus:
            await bus.redis.flushall()
            handled = 0

            async def handle(_: DocumentCreated) -> None:
                nonlocal handled
                handled += 1

            made = [event_handler(DocumentCreated, group=f"h{n}")(handle) for n in range(count)]
            published = max(2_000, 40_000 // count)
            for start in range(0, published, BATCH):
                await bus.publish_many(events[start % len(events) :][:BATCH])
            async with Worker(bus, handlers=made) as worker:
                started = time.perf_counter()
                await worker.drained(120)
                found["deliveries_per_s"][count] = handled / (time.perf_counter() - started)
                idle, own_idle = await _cpu_us(bus, lambda: asyncio.sleep(3))
                busy, own_busy = await _cpu_us(bus, lambda: _now_and_then(bus, events, 100))
                if handled != count * (published + 100):
                    raise SystemExit(f"{handled} handled of {count} x {published + 100}")
                found["server_cpu_us_per_event"][count] = (busy - idle) / 100
                found["worker_cpu_us"][count] = (own_busy - own_idle) / 100
    return found


async def _now_and_then(bus: Bus, events: list[DocumentCreated], count: int) -> None:
    for event in events[:count]:
        await bus.publish(event)
        await asyncio.sleep(3 / count)
    await asyncio.sleep(0.3)


async def _cpu_us(bus: Bus, doing: Callable[[], Awaitable[None]]) -> tuple[float, float]:
    """Return what the server and this process have used meanwhile."""

    async def server_us() -> float:
        info = await bus.redis.info("cpu")
        return 1e6 * float(info["used_cpu_user"] + info["used_cpu_sys"])

    before, own = await server_us(), time.process_time()
    await doing()
    return await server_us() - before, 1e6 * (time.process_time() - own)


async def partitions(counts: list[int], url: str) -> Curves:
    """Partitions of a topic, one worker: consuming."""
    found: Curves = {"consume_per_s": {}}
    for count in counts:
        async with Bus.connect(url) as bus:
            await bus.redis.flushall()  # also what is recorded of the topic
        async with Bus.connect(url, topics=[Topic("growth", partitions=count)]) as bus:
            handled = 0

            async def handle(_: Spread) -> None:
                nonlocal handled
                handled += 1

            for first in range(0, 60_000, BATCH):
                await bus.publish_many(
                    [Spread(key=f"k{n}", n=n) for n in range(first, first + BATCH)]
                )
            async with Worker(bus, handlers=[event_handler(Spread, group="g")(handle)]) as worker:
                started = time.perf_counter()
                await worker.drained(60)
                found["consume_per_s"][count] = handled / (time.perf_counter() - started)
            if handled != 60_000:  # noqa: PLR2004 - as above
                raise SystemExit(f"{handled} handled of 60000")
    return found


async def sweeps(sizes: list[int], url: str) -> Curves:
    """What a worker's looks for due and orphaned entries cost the server, per second."""
    found: Curves = {"pending_us_per_s": {}, "parked_us_per_s": {}}
    events = [DocumentCreated(**f) for f in make_fields(4 * BATCH)]

    async def handle(_: DocumentCreated) -> None: ...

    async with Bus.connect(url, topics=[Topic("bench", keep=3_000_000, maxlen=6_000_000)]) as bus:
        for size in sizes:
            client: Any = bus.redis
            await client.flushall()
            for start in range(0, size, BATCH):
                await bus.publish_many(events[start % len(events) :][: min(BATCH, size)])
            await client.xgroup_create(STREAM, "g", "0")
            while await client.xreadgroup("g", "other", {STREAM: ">"}, count=5_000):
                pass
            # A worker that lives has them, for a minute, and is renewed by nobody meanwhile.
            await client.sadd(keys.workers(STREAM), "other")
            await client.set(keys.lease(STREAM, b"other"), "g", ex=600)
            made = event_handler(DocumentCreated, group="g", visibility_s=600)(handle)
            async with Worker(bus, handlers=[made]):
                used, _ = await _cpu_us(bus, lambda: asyncio.sleep(5))
            found["pending_us_per_s"][size] = used / 5
            start_id, lane = "-", f"parked:{int(time.time() * 1000) + 3_600_000}"
            while True:
                moved, last = await client.eval(_PARK, 1, STREAM, "g", start_id, "other", lane)
                if not moved:
                    break
                start_id = f"({last.decode()}"
            async with Worker(bus, handlers=[made]):
                used, _ = await _cpu_us(bus, lambda: asyncio.sleep(5))
            found["parked_us_per_s"][size] = used / 5
    return found


def draw(found: dict[str, Curves], path: Path) -> None:
    """Draw all curves into one picture."""
    import matplotlib as mpl  # noqa: PLC0415 - only `make bench-growth` has it

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415 - as above

    panels = [(part, name) for part, curves in found.items() for name in curves]
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(13, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (part, name) in zip(axes.flat, panels, strict=False):
        curve = found[part][name]
        axis.plot(list(curve), list(curve.values()), marker="o", color="#1f5f8b")
        for x, y in curve.items():
            axis.annotate(f"{y:,.0f}", (x, y), textcoords="offset points", xytext=(4, 6), size=8)
        axis.set_xscale("log")
        axis.set_ylim(0, 1.25 * max(*curve.values(), 1e-9))
        axis.set_title(f"{part}: {name.replace('_', ' ')}", size=10)
        axis.grid(visible=True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(rounds: int) -> int:
    """Measure, print, write and draw everything."""
    found: dict[str, Curves] = {"backlog": backlog([10_000, 100_000, 1_000_000], rounds)}
    runs: dict[str, Callable[[str], Awaitable[Curves]]] = {
        "handlers": lambda url: handlers([1, 10, 50], url),
        "partitions": lambda url: partitions([1, 2, 4, 8, 16], url),
        "sweeps": lambda url: sweeps([1_000, 100_000, 1_000_000], url),
    }
    for part, run in runs.items():
        with EmbeddedServer() as server:
            found[part] = uvloop.run(run(server.url))  # type: ignore[arg-type] # a coroutine it is
    for part, curves in found.items():
        for name, curve in curves.items():
            figures = "   ".join(f"{x:,}: {y:,.1f}" for x, y in curve.items())
            print(f"{part:11} {name:26} {figures}")
    folder = ROOT / "docs"
    (folder / "growth.json").write_text(json.dumps(found, indent=2) + os.linesep, encoding="utf-8")
    draw(found, folder / "growth.png")
    return 0
