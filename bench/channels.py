"""Many channels at once: connections, memory here and on the server, and how fast they are read.

Each has three deltas and then the fourth and its end, while a tail of this process follows it.
"""

import asyncio
import os
import time
from pathlib import Path

import redis
import uvloop

from bus import Bus, ChannelTail, Event
from bus.embedded import EmbeddedServer

_AT_ONCE = 500
_SERVER_BYTES_AT_MOST = 5_000  # a stream's node is made with 4 KB, whatever is in it
_PROCESS_BYTES_AT_MOST = 20_000


class Delta(Event, type="bench.delta"):
    """A piece of text, about as long as a token."""

    n: int
    text: str = " token"


async def _count(tail: ChannelTail) -> int:
    return len([envelope async for envelope in tail])


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def _run(url: str, client: redis.Redis, channels: int) -> tuple[int, float, float]:
    """Return connections of the bus, and bytes per channel on the server and here."""
    async with Bus.connect(url) as bus:
        made = [bus.channel(f"run-{n}") for n in range(channels)]
        hundreds = [made[n : n + _AT_ONCE] for n in range(0, channels, _AT_ONCE)]
        server, here, start = client.info("memory")["used_memory_dataset"], _rss_bytes(), _now()
        for some in hundreds:
            await asyncio.gather(*(c.publish(Delta(n=n)) for c in some for n in range(3)))
        print(f"publish  {3 * channels / (_now() - start):>10,.0f}/s")
        server_bytes = (client.info("memory")["used_memory_dataset"] - server) / channels
        start, reading = _now(), []
        for some in hundreds:
            tails = [c.tail() for c in some]
            for tail in tails:
                assert (await anext(tail)).entry_id
            reading += [asyncio.create_task(_count(t)) for t in tails]
        print(f"follow   {channels / (_now() - start):>10,.0f} channels/s")
        process_bytes = (_rss_bytes() - here) / channels
        connections = len(client.client_list()) - 1
        start = _now()
        for some in hundreds:
            await asyncio.gather(*(c.publish(Delta(n=3)) for c in some))
            await asyncio.gather(*(c.end() for c in some))
        counts = await asyncio.gather(*reading)
        assert counts == [3] * channels, "each has heard all of its channel, and nothing else"
        print(f"to end   {2 * channels / (_now() - start):>10,.0f}/s, published and heard")
    return connections, server_bytes, process_bytes


def _now() -> float:
    return time.perf_counter()


def main(channels: int = 10_000) -> int:
    """Run it; the exit code is 1 when a figure misses its mark."""
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        connections, there, here = uvloop.run(_run(server.url, client, channels))
    print(f"{channels:,} channels, {connections} connections")
    print(f"server   {there:>10,.0f} B a channel, at most {_SERVER_BYTES_AT_MOST:,}")
    print(
        f"process  {here:>10,.0f} B a channel that is followed, at most {_PROCESS_BYTES_AT_MOST:,}"
    )
    return int(there > _SERVER_BYTES_AT_MOST or here > _PROCESS_BYTES_AT_MOST or connections > 4)  # noqa: PLR2004 - commands, publishing, history, tails
